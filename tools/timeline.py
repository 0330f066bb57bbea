"""What became of a stream's frames, second by second, as far as its telemetry tells."""

from __future__ import annotations

import functools
import itertools
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TypeVar

from ..protocol.messages import FrameCounters, StreamStats
from .quantity import NS_PER_S

MAX_SPANS = 240
RATE_WINDOW_S = 3.0

# Frames that nobody wanted in the memory: the choice of sampler and gate, and the wish of those who steer.
ON_PURPOSE = frozenset({"sampled_out", "gated", "paused", "reset", "removed"})

_NO_FRAMES = FrameCounters(received=0, kept=0, encoded=0, pending=0, padded=0, dropped={}, gaps=0)

T = TypeVar("T")


@dataclass(slots=True)
class Span:
    """What happened to frames between two moments of the node's clock, in seconds since the Unix epoch."""

    start_s: float
    end_s: float
    encoded: int = 0
    remembered: int = 0  # of those encoded, still in the memory
    dropped: Counter[str] = field(default_factory=Counter)  # by reason
    is_earlier: bool = False  # before the first record: nobody knows since when

    @property
    def forgotten(self) -> int:
        return self.encoded - self.remembered

    @property
    def skipped(self) -> int:
        """Frames that were left out on purpose."""
        return sum(num for reason, num in self.dropped.items() if reason in ON_PURPOSE)

    @property
    def lost(self) -> int:
        return sum(self.dropped.values()) - self.skipped

    @property
    def num_frames(self) -> int:
        return self.encoded + sum(self.dropped.values())

    def joined(self, later: Span) -> Span:
        """Both as one."""
        return Span(
            start_s=self.start_s,
            end_s=later.end_s,
            encoded=self.encoded + later.encoded,
            remembered=self.remembered + later.remembered,
            dropped=self.dropped + later.dropped,
        )


@dataclass(eq=False)
class Timeline:
    """Spans of one stream, oldest first, at most `MAX_SPANS`; all but the newest grow coarser with time.

    Not for several threads.
    """

    spans: list[Span] = field(default_factory=list)
    _before: StreamStats | None = None
    _resolution_s: int = 1  # a power of two
    _kept: deque[tuple[float, int]] = field(default_factory=deque)  # when, and how many until then

    def take(self, stats: StreamStats) -> None:
        """Note what a record adds to the one before it. Counters that fall are those of a node that started anew."""
        before = self._before
        if before is not None and stats.frames.received < before.frames.received:
            self.forget()
            before = None
        earlier = _NO_FRAMES if before is None else before.frames
        end_s = stats.ts / NS_PER_S
        span = Span(end_s if before is None else before.ts / NS_PER_S, end_s)
        span.encoded = span.remembered = max(0, stats.frames.encoded - earlier.encoded)
        span.dropped = Counter(stats.frames.dropped) - Counter(earlier.dropped)
        if span.num_frames:
            span.is_earlier = before is None and not self.spans
            self.spans.append(span)
        self._forget(stats)
        self._before = stats
        self._note_kept(stats)
        if len(self.spans) > MAX_SPANS:
            self._join_spans()

    def _join_spans(self) -> None:
        """Join spans that end within the same so many seconds of the clock, twice as many until there is room."""
        while True:
            groups = itertools.groupby(self.spans, lambda span: (span.is_earlier, span.end_s // self._resolution_s))
            joined = [functools.reduce(Span.joined, group) for _, group in groups]
            if len(joined) <= MAX_SPANS // 2:
                self.spans = joined
                return
            self._resolution_s *= 2

    def _note_kept(self, stats: StreamStats) -> None:
        self._kept.append((stats.ts / NS_PER_S, stats.frames.kept))
        while len(self._kept) > 2 and self._kept[-1][0] - self._kept[1][0] >= RATE_WINDOW_S:
            self._kept.popleft()

    @property
    def fps_kept(self) -> float | None:
        """Frames a second that passed the sampler lately, if that can be told."""
        if len(self._kept) < 2:
            return None
        (start_s, num_before), (end_s, num) = self._kept[0], self._kept[-1]
        return (num - num_before) / (end_s - start_s) if end_s > start_s else None

    def _forget(self, stats: StreamStats) -> None:
        """Take away what the memory holds no more: the oldest where its beginning has moved, else the newest."""
        num_gone = self.num_remembered - stats.cache.num_frames
        has_moved = self._before is not None and stats.cache.oldest_ns != self._before.cache.oldest_ns
        for span in self.spans if has_moved else reversed(self.spans):
            num = max(0, min(num_gone, span.remembered))
            span.remembered -= num
            num_gone -= num

    def forget(self) -> None:
        """Note that the memory is gone, and the node's counters with it."""
        for span in self.spans:
            span.remembered = 0
        self._before = None
        self._kept.clear()

    @property
    def num_remembered(self) -> int:
        return sum(span.remembered for span in self.spans)


def thinned(items: list[T], max_items: int) -> list[T]:
    """Every second of them, the newest always, once there are more than `max_items`."""
    return items if len(items) <= max_items else items[::-2][::-1]
