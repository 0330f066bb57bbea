"""CUDA graphs: work on a GPU recorded once, and replayed on what its inputs hold by then."""

import logging
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Recording(Generic[T]):
    """A graph, and its results: the same tensors every time, valid until the next replay of a recording beside it."""

    graph: torch.cuda.CUDAGraph
    result: T

    def replay(self) -> T:
        self.graph.replay()
        return self.result


class Recorder:
    """Makes recordings that share one side stream and one pool of memory: they are replayed one after the other."""

    def __init__(self) -> None:
        # One stream for all: each that multiplies matrices keeps tens of megabytes of workspace for good.
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, compute: Callable[[], T]) -> Recording[T]:
        """Run something thrice, the third time into a graph. Raises what CUDA raises; then no capture is left open."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                compute()  # what a kernel loads or compiles at its first use must not be in the graph
                with _never_waiting():
                    compute()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(self._stream):
                # Not through torch.cuda.graph, which gives back all cached memory each time.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    result = compute()
                finally:
                    graph.capture_end()
        except Exception:
            torch.cuda.set_stream(current)  # a capture that could not be ended leaves its own in place
            torch.cuda.synchronize()
            raise
        return Recording(graph, result)


class Recorded(Generic[T]):
    """What was recorded for each of a few keys, at its first use; of more than `max_kept` keys the last used stay."""

    def __init__(self, what: str, max_kept: int) -> None:
        self._what = what
        self._max_kept = max_kept
        self._kept: OrderedDict[Hashable, T | None] = OrderedDict()

    def get(self, key: Hashable, record: Callable[[], T]) -> T | None:
        """What `record` makes for a key; None, with the reason in the log, where it fails: the work runs as it is."""
        if key not in self._kept:
            try:
                made = record()
            except Exception:
                logger.warning(
                    "%s %s cannot be captured and are launched kernel by kernel", self._what, key, exc_info=True
                )
                made = None
            self._kept[key] = made
            while len(self._kept) > self._max_kept:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]


@contextmanager
def _never_waiting() -> Iterator[None]:
    """Have torch raise RuntimeError where it would wait for the device.

    A capture that meets such a place is lost, and the allocator never hears of its end.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
