"""What a stream gives up, step by step, while its node has too little time or memory, and takes back afterwards.

Plain values in, plain values out: times are passed in, and what a step changes are the stream's options.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from .options import StreamOptions

MIN_CHANGE = 10.0  # of the gate, grey levels
MAX_SIMILARITY = 0.9  # of the tokens that are kept

Reason = Literal["lag", "ring_full", "device_memory", "out_of_memory", "recovered"]


@dataclass(frozen=True, slots=True)
class Rung:
    """One step down: what it is called, and what becomes of a stream's options."""

    name: str
    lower: Callable[[StreamOptions], StreamOptions]
    eases_chunk: bool = False  # a chunk that found too little memory takes less on it
    frees_storage: bool = False


@dataclass(frozen=True, slots=True)
class Bounds:
    """From where on there is too little, and when there is enough again."""

    max_lag_ms: float  # beyond the least one seen
    min_free_bytes: int  # of the device
    settle_s: float  # between two steps, so that the first can show what it does
    recover_s: float  # without shortage, before a step up
    recover_load: float  # of the engine's time; a step up may double it


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known of a stream and its node at one time. Counts are since the stream was added."""

    num_encoded: int
    num_ring_full: int
    num_out_of_memory: int
    lag_ms: float | None  # of the newest chunk
    load: float  # share of the engine's time that all streams take
    free_bytes: int | None  # of the device


class Step(NamedTuple):
    """A step that was taken: down onto a rung, or up from it again."""

    is_down: bool
    rung: str
    reason: Reason
    options: StreamOptions  # of the stream from now on


class Ladder:
    """The rungs of one stream, and on which of them it stands. Not for several threads at once."""

    def __init__(self, options: StreamOptions, bounds: Bounds) -> None:
        """It begins at the top, with the options as they were asked for."""
        self._bounds = bounds
        self._rungs: list[Rung] = []
        self._efforts = [options]  # by how many steps down
        for rung in RUNGS:
            lower = rung.lower(self._efforts[-1])
            if lower != self._efforts[-1]:  # what has been given up from the start cannot be given up again
                self._rungs.append(rung)
                self._efforts.append(lower)
        self._num_down = 0
        self._stepped_at = float("-inf")
        self._well_since: float | None = None
        self._seen: Seen | None = None
        self._least_lag_ms = float("inf")

    @property
    def taken(self) -> list[str]:
        """The rungs that the stream has gone down, the first one first."""
        return [rung.name for rung in self._rungs[: self._num_down]]

    def look(self, now: float, seen: Seen) -> Step | None:
        """Take a step, if it is time for one; `now` is in seconds and never goes back."""
        before, self._seen = self._seen, seen
        if seen.lag_ms is not None:
            self._least_lag_ms = min(self._least_lag_ms, seen.lag_ms)
        reason = self._shortage(before or seen, seen)
        if reason is not None:
            self._well_since = None
            return self._down(now, reason) if now >= self._stepped_at + self._bounds.settle_s else None
        if not self._is_well(seen):
            self._well_since = None
        elif self._well_since is None:
            self._well_since = now
        elif now >= max(self._well_since, self._stepped_at) + self._bounds.recover_s:
            return self._up(now)
        return None

    def relieve(self, now: float) -> list[Step]:
        """A chunk found too little memory: go down at once to where it takes less, if there is such a rung."""
        eases = [rung.eases_chunk for rung in self._rungs[self._num_down :]]
        num_steps = eases.index(True) + 1 if True in eases else 0
        steps = [self._down(now, "out_of_memory") for _ in range(num_steps)]
        return [step for step in steps if step]

    def _shortage(self, before: Seen, seen: Seen) -> Reason | None:
        bounds = self._bounds
        if seen.num_out_of_memory > before.num_out_of_memory:
            return "out_of_memory"
        if seen.free_bytes is not None and seen.free_bytes < bounds.min_free_bytes and self._can_ease:
            return "device_memory"
        if seen.num_ring_full > before.num_ring_full:
            return "ring_full"
        # While nothing is encoded the lag is an old one. A camera's clock may be off by more than any lag.
        is_late = seen.lag_ms is not None and seen.lag_ms - self._least_lag_ms > bounds.max_lag_ms
        return "lag" if is_late and seen.num_encoded > before.num_encoded else None

    @property
    def _can_ease(self) -> bool:
        """Whether less device memory is taken further down; the other rungs save none."""
        return any(rung.eases_chunk or rung.frees_storage for rung in self._rungs[self._num_down :])

    def _is_well(self, seen: Seen) -> bool:
        """Whether there is room for more, and not just enough."""
        bounds = self._bounds
        has_memory = seen.free_bytes is None or seen.free_bytes >= 2 * bounds.min_free_bytes
        return has_memory and seen.load <= bounds.recover_load

    def _down(self, now: float, reason: Reason) -> Step | None:
        if self._num_down == len(self._rungs):
            return None
        self._num_down += 1
        return self._stepped(now, Step(True, self._rungs[self._num_down - 1].name, reason, self._effort))

    def _up(self, now: float) -> Step | None:
        if self._num_down == 0:
            return None
        self._num_down -= 1
        return self._stepped(now, Step(False, self._rungs[self._num_down].name, "recovered", self._effort))

    @property
    def _effort(self) -> StreamOptions:
        return self._efforts[self._num_down]

    def _stepped(self, now: float, step: Step) -> Step:
        self._stepped_at, self._well_since = now, None
        return step


def _slower(options: StreamOptions) -> StreamOptions:
    return replace(options, stride=2 * options.stride) if options.fps is None else replace(options, fps=options.fps / 2)


def _gated(options: StreamOptions) -> StreamOptions:
    return replace(options, gate=MIN_CHANGE) if options.gate is None else options


def _dropping(options: StreamOptions) -> StreamOptions:
    has_none = options.drop is None and not options.last_frames  # these are whole
    return replace(options, drop=MAX_SIMILARITY) if has_none else options


def _smaller(options: StreamOptions) -> StreamOptions:
    return replace(options, encode_scale=options.encode_scale / 2)


def _thinner(options: StreamOptions) -> StreamOptions:
    """Of a stream that forgets by and by; what one of the others holds is not given up."""
    return replace(options, retention="thin", memory_share=1 / 2) if _forgets_by_and_by(options) else options


def _newest(options: StreamOptions) -> StreamOptions:
    return replace(options, retention="window", memory_share=1 / 8) if _forgets_by_and_by(options) else options


def _forgets_by_and_by(options: StreamOptions) -> bool:
    return options.retention in ("window", "thin")


RUNGS = (
    Rung("frame_rate", _slower),
    Rung("gate", _gated),
    Rung("drop", _dropping),
    Rung("encode_size", _smaller, eases_chunk=True),
    Rung("thin", _thinner, frees_storage=True),
    Rung("newest", _newest, frees_storage=True),
)
