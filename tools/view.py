"""What is known of one node from its telemetry."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from msgspec import UNSET

from ..protocol.messages import Event, Hello, NodeStats, StreamStats

MAX_EVENTS = 6
# A node is offline when it has been silent for so many of its periods.
OFFLINE_PERIODS = 3.5
DEFAULT_PERIOD_S = 1.0


@dataclass(eq=False)
class View:
    """What the telemetry of one node has said so far; times are `time.monotonic()` seconds."""

    endpoint: str
    hello: Hello | None = None
    stats: NodeStats | None = None
    streams: dict[str, StreamStats] = field(default_factory=dict)
    events: deque[Event] = field(default_factory=lambda: deque(maxlen=MAX_EVENTS))
    _heard: float | None = None
    # A report that was late is followed by one that comes early: the larger of two is no less than the period.
    _periods_s: deque[float] = field(default_factory=lambda: deque([DEFAULT_PERIOD_S], maxlen=2))

    def take(self, record: Hello | NodeStats | StreamStats | Event | None, now: float) -> None:
        """Note a record. A node that was restarted is known by its session, and starts from nothing."""
        self._heard = now
        match record:
            case Hello():
                self._take_hello(record)
            case NodeStats():
                self._take_stats(record)
            case StreamStats():
                self.streams[record.stream] = record
            case Event():
                self._take_event(record)

    def _take_hello(self, hello: Hello) -> None:
        if self.hello and self.hello.session != hello.session:
            self.stats = None
            self.streams.clear()
        # One that was removed while nobody listened is missed by its name alone.
        self.streams = {name: stats for name, stats in self.streams.items() if name in hello.streams}
        self.hello = hello

    def _take_stats(self, stats: NodeStats) -> None:
        if self.stats and stats.uptime_s > self.stats.uptime_s:
            self._periods_s.append(stats.uptime_s - self.stats.uptime_s)
        self.stats = stats

    def _take_event(self, event: Event) -> None:
        self.events.append(event)
        if event.kind == "stream_removed" and event.stream is not UNSET:
            self.streams.pop(event.stream, None)

    @property
    def period_s(self) -> float:
        """Seconds between two reports of the node."""
        return max(self._periods_s)

    def silent_s(self, now: float) -> float:
        """Seconds since the last record; infinite before the first."""
        return float("inf") if self._heard is None else now - self._heard

    def is_online(self, now: float) -> bool:
        return self.silent_s(now) < OFFLINE_PERIODS * self.period_s

    @property
    def is_whole(self) -> bool:
        """Whether the node, and each stream it names, has been heard of."""
        return self.hello is not None and self.stats is not None and set(self.hello.streams) <= self.streams.keys()

    @property
    def facts(self) -> dict[str, object]:
        """All that is known, for JSON."""
        return {"hello": self.hello, "stats": self.stats, "streams": list(self.streams.values())}
