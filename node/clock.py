"""The stream's own time: what a frame's timestamp means after restarts, loops and clock changes."""

import math

from msgspec import UNSET

from ..protocol.messages import FrameHeader

DEFAULT_INTERVAL_NS = 33_333_333  # between two frames, while nothing better is known
MAX_BACKWARDS_FRAMES = 32


def nominal_interval_ns(header: FrameHeader) -> int | None:
    """Time between two frames at the rate that the source states, if it states a credible one (0.001 to 10,000 Hz)."""
    fps = header.fps
    if fps is UNSET or not math.isfinite(fps) or not 1e-3 <= fps <= 1e4:
        return None
    return round(1e9 / fps)


class StreamClock:
    """Maps capture times to nanoseconds since the stream's first frame; the result never decreases.

    Within a session, time advances as the timestamps do, and a frame from before the last one has no place. A new
    session, a new kind of timestamp or a new loop that starts earlier continues one frame interval after the last
    frame. A new session that starts later keeps the true gap, unless its times count from the start of a
    medium and thus mean nothing between sessions.

    Two things a camera's clock does must not cost the stream: a leap ahead counts as `max_gap_s` at most (a board that
    boots in 1970 and then finds a time server would use up all positions), and after `MAX_BACKWARDS_FRAMES`
    frames in a row from before the last one, the clock was set back, and time goes on from there.
    """

    def __init__(self, max_gap_s: float = 3600.0) -> None:
        self._max_gap_ns = round(max_gap_s * 1e9)
        self._last: FrameHeader | None = None
        self._last_ns = 0
        self._interval_ns: int | None = None
        self._num_backwards = 0

    def advance(self, header: FrameHeader) -> int | None:
        """The frame's `stream_ns`, or None if its time runs backwards and the frame must be dropped."""
        step_ns = self._step_ns(header)
        if step_ns is None:
            self._num_backwards += 1
            return None
        self._num_backwards = 0
        self._last = header
        self._last_ns += min(step_ns, self._max_gap_ns)
        return self._last_ns

    def _step_ns(self, header: FrameHeader) -> int | None:
        last = self._last
        if last is None:
            return 0
        elapsed_ns = header.ts - last.ts
        if not _comparable(last, header):
            return self._one_interval_ns(header)
        if elapsed_ns >= 0:
            if header.session == last.session and header.loop == last.loop:
                self._interval_ns = elapsed_ns or self._interval_ns
            return elapsed_ns
        if header.session != last.session or header.loop != last.loop:
            return self._one_interval_ns(header)
        was_set_back = self._num_backwards >= MAX_BACKWARDS_FRAMES
        return self._one_interval_ns(header) if was_set_back else None

    def _one_interval_ns(self, header: FrameHeader) -> int:
        return nominal_interval_ns(header) or self._interval_ns or DEFAULT_INTERVAL_NS


def _comparable(last: FrameHeader, header: FrameHeader) -> bool:
    """Whether the difference of two timestamps is time that has passed."""
    same_session = last.session == header.session
    return last.ts_kind == header.ts_kind and (same_session or header.ts_kind != "media")
