import pytest

from onlooker.node.rate import Rate


def rate_of(times: list[float], now: float, num: int = 1) -> float | None:
    rate = Rate(window_s=5.0)
    for time in times:
        rate.add(time, num)
    return rate.per_second(now)


def test_it_is_unknown_until_there_are_two_events():
    assert rate_of([], 0.0) is None
    assert rate_of([1.0], 1.0) is None


@pytest.mark.parametrize("fps", [2, 30, 200])
def test_a_steady_rate_is_measured_at_any_moment(fps):
    times = [n / fps for n in range(fps * 8)]
    for lag in (0.0, 0.4, 0.9):
        assert rate_of(times, times[-1] + lag / fps) == pytest.approx(fps)


def test_events_of_several_things_count_them_all():
    assert rate_of([0.0, 1.0, 2.0], 2.0, num=4) == pytest.approx(4.0)


def test_a_silence_lowers_it_and_a_long_one_makes_it_zero():
    times = [n / 10 for n in range(11)]
    assert rate_of(times, 4.0) == pytest.approx(10 / 4)
    assert rate_of(times, 60.0) == 0.0
