"""Sees to it that streams give up quality while their node has too little time or memory, and get it back.

Only streams with `degrade` do; `ladder` says in which steps.
"""

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

from msgspec import UNSET

from ..protocol.errors import ErrorCode, NodeError
from ..protocol.forecast import room_of
from ..protocol.messages import StreamStats
from .ladder import Bounds, Ladder, Seen, Step
from .options import StreamOptions
from .state import NodeState
from .telemetry import Announce

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 1.0
STEP_EVENTS = {True: ("degraded", "down"), False: ("restored", "up")}  # by whether a step is one down


class Degradation:
    """Looks at the streams once a period, on its own thread from `start` to `close`. Its verbs are for any thread."""

    def __init__(self, state: NodeState, announce: Announce, bounds: Bounds, period_s: float) -> None:
        self._state = state
        self._announce = announce
        self._bounds = bounds
        self._period_s = period_s
        self._ladders: dict[str, Ladder] = {}
        self._lock = threading.Lock()
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="degradation", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._is_closing.set()
        if self._thread.ident is not None:
            self._thread.join(CLOSE_TIMEOUT_S)

    def add(self, options: StreamOptions) -> None:
        """Look after a stream that was just added, if it wants that."""
        if options.degrade:
            with self._lock:
                self._ladders[options.name] = Ladder(options, self._bounds)

    def remove(self, stream: str) -> None:
        with self._lock:
            self._ladders.pop(stream, None)

    def relieve(self, stream: str) -> StreamOptions | None:
        """The device has no memory for a chunk: what to try once more with, or None."""
        with self._lock:
            ladder = self._ladders.get(stream)
            steps = ladder.relieve(time.monotonic()) if ladder else []
            if not steps:
                return None
            self._take(stream, steps, {})
            return steps[-1].options

    def _run(self) -> None:
        while not self._is_closing.wait(self._period_s):
            try:
                self._look()
            except Exception:  # whoever looks after streams must not be what ends them
                logger.exception("a look after the streams failed")

    def _look(self) -> None:
        streams = self._state.stream_stats()
        room = room_of(self._state.engine.vram())
        load = sum(stats.load for stats in streams if stats.load is not UNSET)
        with self._lock:
            for stats in streams:
                if (ladder := self._ladders.get(stats.stream)) is not None:
                    seen = _seen(stats, load, None if room is None else room.free_bytes)
                    if (step := ladder.look(time.monotonic(), seen)) is not None:
                        self._take(stats.stream, [step], _figures(seen))

    def _take(self, stream: str, steps: Sequence[Step], figures: dict[str, Any]) -> None:
        """Go on with what steps leave of a stream's options, and tell of each."""
        options, taken = steps[-1].options, self._ladders[stream].taken
        try:
            self._state.intake.adjust(stream, options, taken)
            self._state.engine.adjust(stream, options)
        except NodeError as error:
            if error.code != ErrorCode.UNKNOWN_STREAM:  # it has just been removed
                raise
            return
        for step in steps:
            kind, way = STEP_EVENTS[step.is_down]
            message = f"a step {way}, {step.rung.replace('_', ' ')}: {step.reason.replace('_', ' ')}"
            told = {"rung": step.rung, "reason": step.reason, "degraded": taken}
            self._announce(kind, message, stream=stream, **told, **figures)


def _seen(stats: StreamStats, load: float, free_bytes: int | None) -> Seen:
    dropped = stats.frames.dropped
    return Seen(
        num_encoded=stats.frames.encoded,
        num_ring_full=dropped.get("ring_full", 0),
        num_out_of_memory=dropped.get("out_of_memory", 0),
        lag_ms=None if stats.lag_ms is UNSET else stats.lag_ms,
        load=load,
        free_bytes=free_bytes,
    )


def _figures(seen: Seen) -> dict[str, Any]:
    known = {"lag_ms": seen.lag_ms, "free_bytes": seen.free_bytes, "load": seen.load, "ring_full": seen.num_ring_full}
    return {name: value for name, value in known.items() if value is not None}
