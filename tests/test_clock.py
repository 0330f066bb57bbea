import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

from onlooker.node.clock import MAX_BACKWARDS_FRAMES, StreamClock, nominal_interval_ns
from onlooker.protocol.messages import FrameHeader

MS = 1_000_000


def header(ts: int, session: str = "a", **fields) -> FrameHeader:
    return FrameHeader(session=session, stream="front", ts=ts, **fields)


def advance(*headers: FrameHeader) -> list[int | None]:
    clock = StreamClock()
    return [clock.advance(header) for header in headers]


def test_time_starts_at_zero_and_follows_the_timestamps():
    assert advance(header(5_000 * MS), header(5_040 * MS), header(5_040 * MS), header(5_200 * MS)) == [
        0,
        40 * MS,
        40 * MS,
        200 * MS,
    ]


def test_a_frame_from_before_the_last_has_no_place_and_changes_nothing():
    assert advance(header(100), header(50), header(120)) == [0, None, 20]


def test_a_new_session_that_starts_later_keeps_the_true_gap():
    assert advance(header(0), header(40 * MS), header(9_040 * MS, "b")) == [0, 40 * MS, 9_040 * MS]


def test_a_new_session_that_starts_earlier_continues_one_interval_later():
    assert advance(header(1000 * MS), header(1040 * MS), header(0, "b"), header(25 * MS, "b")) == [
        0,
        40 * MS,
        80 * MS,
        105 * MS,
    ]


def test_media_times_of_two_sessions_are_not_compared():
    frames = [header(0, ts_kind="media"), header(40 * MS, ts_kind="media")]
    assert advance(*frames, header(90_000 * MS, "b", ts_kind="media")) == [0, 40 * MS, 80 * MS]


def test_a_loop_continues_where_the_last_one_ended():
    frames = [header(ts * MS, ts_kind="media", loop=loop) for loop in range(3) for ts in (0, 40, 80)]
    assert advance(*frames) == [n * 40 * MS for n in range(9)]


def test_another_kind_of_timestamp_continues_one_interval_later():
    assert advance(header(0), header(20 * MS), header(10**18, ts_kind="publish")) == [0, 20 * MS, 40 * MS]


def test_the_stated_rate_is_the_interval_where_there_is_one():
    assert advance(header(100, fps=50.0), header(0, "b", fps=50.0)) == [0, 20 * MS]


def test_a_stall_is_true_time_but_a_leap_of_years_is_not():
    assert advance(header(0), header(600 * 10**9)) == [0, 600 * 10**9]
    clock = StreamClock(max_gap_s=3600)
    clock.advance(header(0))
    assert clock.advance(header(10**18)) == 3600 * 10**9


def test_a_camera_whose_clock_was_set_back_is_followed_after_a_while():
    clock = StreamClock()
    clock.advance(header(10**18))
    clock.advance(header(10**18 + 40 * MS))
    dropped = [clock.advance(header(n * 40 * MS)) for n in range(MAX_BACKWARDS_FRAMES)]
    assert dropped == [None] * MAX_BACKWARDS_FRAMES
    assert clock.advance(header(10_000 * MS)) == 80 * MS
    assert clock.advance(header(10_040 * MS)) == 120 * MS


@pytest.mark.parametrize("fps", [UNSET, math.nan, math.inf, -1.0, 0.0, 5e-324, 1e300])
def test_a_rate_that_cannot_be_is_not_believed(fps):
    assert nominal_interval_ns(header(0, fps=fps)) is None


headers = st.builds(
    header,
    st.integers(0, 2**63 - 1) | st.integers(0, 200),
    st.sampled_from(["a", "b", "c"]),
    ts_kind=st.sampled_from(["capture", "media", "publish"]),
    loop=st.none().map(lambda _: UNSET) | st.integers(0, 3),
    fps=st.none().map(lambda _: UNSET) | st.floats(),
)


@given(st.lists(headers, max_size=120))
def test_time_never_decreases_whatever_the_cameras_say(headers: list[FrameHeader]):
    times = [ns for ns in advance(*headers) if ns is not None]
    assert times == sorted(times)
    assert times[:1] == [0][: len(times)]


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=50), st.integers(0, 10**18))
def test_within_a_session_differences_are_those_of_the_timestamps(steps: list[int], start: int):
    times = [start + sum(steps[: n + 1]) for n in range(len(steps))]
    assert advance(*map(header, times)) == [ts - times[0] for ts in times]
