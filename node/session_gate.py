"""Which publisher of a stream is listened to, and where its frames belong."""

from typing import Literal

from ..protocol.codec import ReceivedFrame
from .clock import nominal_interval_ns
from .sequence import Placed, SequenceWindow

MAX_SILENCE_S = 60.0

# Telemetry carries 64 bits; a publisher that leaps through all sequence numbers must not break it.
_MAX_GAPS = 2**63 - 1

Admission = Placed | Literal["second_publisher", "after_eos"]


class SessionGate:
    """Lets the frames of one session through, until it ends or falls silent; then the next may take over.

    The session heard first has the stream for as long as it is live: until its end of stream, or until no frame
    came for `takeover_s`, or for three frames at the rate it states if that is longer. A publisher that is
    restarted without saying goodbye therefore has to wait that long; two publishers with one stream name never mix.
    """

    def __init__(self, takeover_s: float = 2.0) -> None:
        self._takeover_s = takeover_s
        self.session: str | None = None
        self._window = SequenceWindow()
        self._num_missing_before = 0  # in sessions that are over
        self._silence_s = takeover_s
        self.heard_at: float | None = None
        self.has_ended = False

    @property
    def last_seq(self) -> int | None:
        """The newest sequence number of the session, that of an end of stream included."""
        return self._window.newest

    @property
    def gaps(self) -> int:
        """Sequence numbers that never came."""
        return min(self._num_missing_before + self._window.num_missing, _MAX_GAPS)

    def is_live(self, now: float) -> bool:
        """Whether a session has the stream at `now`, in `time.monotonic()` seconds."""
        return self.heard_at is not None and not self.has_ended and now - self.heard_at < self._silence_s

    def admit(self, frame: ReceivedFrame, now: float) -> Admission:
        """Place a frame; only `next` may pass."""
        session = frame.header.session
        if session != self.session:
            if self.is_live(now):
                return "second_publisher"
            self._begin(session)
        elif self.has_ended:
            return "after_eos"
        self.heard_at = now
        interval_s = (nominal_interval_ns(frame.header) or 0) / 1e9
        self._silence_s = min(max(self._takeover_s, 3 * interval_s), max(self._takeover_s, MAX_SILENCE_S))
        placed = self._window.place(frame.seq)
        self.has_ended = placed == "next" and frame.header.eos
        return placed

    def _begin(self, session: str) -> None:
        self.session = session
        self._num_missing_before += self._window.num_missing
        self._window = SequenceWindow()
        self.has_ended = False
