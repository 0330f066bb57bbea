"""Which frames of a camera the memory gets to see."""

from collections import deque
from statistics import median_low


class FrameSampler:
    """Keeps every `stride`-th frame, and of those one every 1/`fps` of capture time; None keeps all.

    The frame nearest to each due time is kept, so that jitter does not matter: a frame is taken as soon as it is less
    than half the camera's own interval early. Due times keep their phase until a frame is late by a whole period; then
    the phase starts anew with that frame. A camera slower than `fps` is kept whole.
    """

    def __init__(self, fps: float | None = None, stride: int = 1) -> None:
        self._period_ns = 1e9 / fps if fps else 0.0
        self._stride = stride
        self._num_seen = 0
        self._due_ns: float | None = None
        self._last_ns: int | None = None
        # The median of a few intervals is the camera's own, whatever a stall or a burst does.
        self._intervals_ns: deque[int] = deque(maxlen=5)

    def keep(self, stream_ns: int) -> bool:
        """Whether to keep the frame seen at `stream_ns`. Call it once for each frame, in order."""
        is_nth = self._num_seen % self._stride == 0
        self._num_seen += 1
        return is_nth and (not self._period_ns or self._is_due(stream_ns))

    def _is_due(self, stream_ns: int) -> bool:
        tolerance_ns = self._tolerance_ns(stream_ns)
        if self._due_ns is None:
            self._due_ns = stream_ns
        late_ns = stream_ns - self._due_ns
        if late_ns < -tolerance_ns:
            return False
        keeps_phase = late_ns < self._period_ns
        self._due_ns = (self._due_ns if keeps_phase else stream_ns) + self._period_ns
        return True

    def _tolerance_ns(self, stream_ns: int) -> float:
        if self._last_ns is not None and stream_ns > self._last_ns:
            self._intervals_ns.append(stream_ns - self._last_ns)
        self._last_ns = stream_ns
        if not self._intervals_ns:
            return 0.0
        return min(median_low(self._intervals_ns), self._period_ns) / 2
