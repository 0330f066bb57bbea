import pytest
from msgspec import UNSET, UnsetType

from onlooker.node.session_gate import SessionGate
from onlooker.protocol.codec import ReceivedFrame
from onlooker.protocol.messages import FrameHeader


def frame(session: str, seq: int, eos: bool = False, fps: float | UnsetType = UNSET) -> ReceivedFrame:
    return ReceivedFrame(FrameHeader(session=session, stream="front", ts=0, enc="jpeg", eos=eos, fps=fps), seq, b"x")


def test_the_first_live_session_has_the_stream():
    gate = SessionGate(takeover_s=2.0)
    placed = [gate.admit(frame("ab"[n % 2], n // 2), now=n * 0.5) for n in range(6)]
    assert placed == ["next", "second_publisher"] * 3


def test_another_session_takes_over_after_silence():
    gate = SessionGate(takeover_s=2.0)
    gate.admit(frame("a", 50), now=0.0)
    assert gate.admit(frame("b", 0), now=1.9) == "second_publisher"
    assert gate.admit(frame("b", 1), now=2.1) == "next"
    assert gate.admit(frame("a", 51), now=2.2) == "second_publisher"
    assert (gate.session, gate.last_seq, gate.gaps) == ("b", 1, 0)


def test_an_end_of_stream_frees_the_stream_at_once():
    gate = SessionGate(takeover_s=2.0)
    gate.admit(frame("a", 0), now=0.0)
    assert gate.admit(frame("a", 1, eos=True), now=0.1) == "next"
    assert gate.has_ended and not gate.is_live(0.1)
    assert gate.admit(frame("a", 2), now=0.2) == "after_eos"
    assert gate.admit(frame("b", 0), now=0.3) == "next"
    assert not gate.has_ended


def test_a_repeated_end_of_stream_means_nothing():
    gate = SessionGate()
    for seq in (0, 1):
        gate.admit(frame("a", seq), now=0.0)
    assert gate.admit(frame("a", 1, eos=True), now=0.1) == "duplicate"
    assert not gate.has_ended


def test_a_camera_of_one_frame_in_ten_seconds_is_not_taken_for_silent():
    gate = SessionGate(takeover_s=2.0)
    gate.admit(frame("a", 0, fps=0.1), now=0.0)
    assert gate.admit(frame("b", 0), now=29.0) == "second_publisher"
    assert gate.admit(frame("b", 1), now=30.5) == "next"


@pytest.mark.parametrize("fps", [1e-300, 0.001])
def test_a_rate_near_zero_cannot_hold_the_stream_for_ever(fps):
    gate = SessionGate(takeover_s=2.0)
    gate.admit(frame("a", 0, fps=fps), now=0.0)
    assert not gate.is_live(61.0)


def test_gaps_of_all_sessions_add_up_and_stay_within_64_bits():
    gate = SessionGate(takeover_s=0.0)
    gate.admit(frame("a", 0), now=0.0)
    gate.admit(frame("a", 4), now=0.0)
    gate.admit(frame("b", 7), now=1.0)
    gate.admit(frame("b", 9), now=1.0)
    assert gate.gaps == 4
    for n, session in enumerate("cde"):
        gate.admit(frame(session, 0), now=2.0 + n)
        gate.admit(frame(session, 2**64 - 1), now=2.0 + n)
    assert gate.gaps == 2**63 - 1
