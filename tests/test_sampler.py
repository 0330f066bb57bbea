import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onlooker.node.sampler import FrameSampler


def times_ns(fps: float, num: int, jitter_ms: float = 0.0, seed: int = 0) -> list[int]:
    noise = random.Random(seed)
    return [round(n * 1e9 / fps + noise.uniform(-jitter_ms, jitter_ms) * 1e6) for n in range(num)]


def kept(sampler: FrameSampler, times: list[int]) -> list[int]:
    return [n for n, ns in enumerate(times) if sampler.keep(ns)]


def test_without_a_rate_or_a_stride_all_are_kept():
    assert kept(FrameSampler(), times_ns(30, 20)) == list(range(20))


def test_a_stride_keeps_every_nth():
    assert kept(FrameSampler(stride=4), times_ns(30, 20)) == [0, 4, 8, 12, 16]


@pytest.mark.parametrize("jitter_ms", [0.0, 3.0])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("camera_fps", "fps", "nth"), [(30, 10, 3), (30, 15, 2), (60, 10, 6), (25, 5, 5), (30, 1, 30)])
def test_a_whole_fraction_keeps_exactly_every_nth_despite_jitter(camera_fps, fps, nth, jitter_ms, seed):
    times = times_ns(camera_fps, 600, jitter_ms, seed)
    assert kept(FrameSampler(fps), times) == list(range(0, 600, nth))


@pytest.mark.parametrize("jitter_ms", [0.0, 3.0, 20.0])
def test_a_camera_at_the_rate_is_kept_whole(jitter_ms):
    assert kept(FrameSampler(10), times_ns(10, 500, jitter_ms)) == list(range(500))


@pytest.mark.parametrize("camera_fps", [9.9, 7.0, 2.0, 0.1])
def test_a_slower_camera_is_kept_whole(camera_fps):
    assert kept(FrameSampler(10), times_ns(camera_fps, 500, jitter_ms=3.0)) == list(range(500))


@pytest.mark.parametrize(("camera_fps", "fps"), [(25, 10), (30, 20), (29.97, 10), (24, 7), (30, 29)])
def test_any_other_rate_is_met_on_average(camera_fps, fps):
    num = 3000
    wanted = num / camera_fps * fps
    assert abs(len(kept(FrameSampler(fps), times_ns(camera_fps, num, jitter_ms=3.0))) - wanted) <= wanted * 0.01 + 1


def test_a_stall_does_not_make_it_catch_up():
    times = times_ns(30, 30) + [ns + 60 * 10**9 for ns in times_ns(30, 30)]
    assert kept(FrameSampler(10), times) == list(range(0, 60, 3))


def test_lost_frames_do_not_shift_the_phase():
    times = times_ns(30, 300)
    del times[90], times[90]  # the frames that were due at 3.000 s and the one after
    late = [n for n in kept(FrameSampler(10), times) if n > 100]
    assert [times[n] % 10**8 < 10**6 for n in late] == [True] * len(late)


def test_the_stride_is_taken_before_the_rate():
    assert kept(FrameSampler(5, stride=3), times_ns(30, 60)) == list(range(0, 60, 6))


@given(
    st.floats(min_value=1e-300, max_value=1e300),
    st.integers(1, 5),
    st.lists(st.integers(0, 10**12), min_size=1, max_size=80).map(sorted),
)
def test_the_first_frame_is_always_kept_and_nothing_breaks(fps: float, stride: int, times: list[int]):
    assert kept(FrameSampler(fps, stride), times)[0] == 0


@given(st.lists(st.integers(0, 10**10), min_size=2, max_size=200).map(sorted))
def test_no_more_are_kept_than_the_rate_allows(times: list[int]):
    num_periods = (times[-1] - times[0]) / 1e8
    assert len(kept(FrameSampler(10), times)) <= num_periods + 1.5
