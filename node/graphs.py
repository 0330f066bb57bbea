"""CUDA graphs: work on a GPU recorded once, and replayed on what its inputs hold by then."""

import logging
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Generic, TypeVar

import torch

logger = logging.getLogger(__name__)

T = TypeVar("T")

_OFTEN = 3  # times that a key comes without a place until it takes that of another


@dataclass(frozen=True, slots=True, eq=False)
class Recording(Generic[T]):
    """A graph, and its results: the same tensors every time, valid until the next replay of a recording beside it."""

    graph: torch.cuda.CUDAGraph
    result: T

    def replay(self) -> T:
        self.graph.replay()
        return self.result


@cache
def _side_stream(_device: int) -> torch.cuda.Stream:
    """One for all recorders of a device: each that multiplies matrices keeps megabytes of workspace for good."""
    return torch.cuda.Stream()


class Recorder:
    """Makes recordings that share one pool of memory: they are replayed one after the other."""

    def __init__(self) -> None:
        self._stream = _side_stream(torch.cuda.current_device())
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
    """What was recorded for each of a few keys, at its first use.

    Of more than `max_kept` keys, one that comes again and again takes the place of one that does not: to record takes
    a second, so keys that come by turns must not drive each other out.
    """

    def __init__(self, what: str, max_kept: int) -> None:
        self._what = what
        self._max_kept = max_kept
        self._kept: OrderedDict[Hashable, T | None] = OrderedDict()  # the last used last
        self._missed: dict[Hashable, Counter[Hashable]] = {}  # uses without a place, since each of those kept was used

    def get(self, key: Hashable, record: Callable[[], T]) -> T | None:
        """What `record` makes for a key.

        None where there is no place for it, or, with the reason in the log, where that fails: the work runs as it is.
        """
        if key not in self._kept:
            if len(self._kept) >= self._max_kept and not self._take_place(key):
                return None
            try:
                made = record()
            except Exception:
                logger.warning(
                    "%s %s cannot be captured and are launched kernel by kernel", self._what, key, exc_info=True
                )
                made = None
            self._kept[key] = made
        self._missed[key] = Counter()
        self._kept.move_to_end(key)
        return self._kept[key]

    def _take_place(self, key: Hashable) -> bool:
        """Let go of the key that was used the longest ago, if this one has come often since."""
        for missed in self._missed.values():
            missed[key] += 1
        oldest = next(iter(self._kept))
        if self._missed[oldest][key] < _OFTEN:
            return False
        del self._kept[oldest], self._missed[oldest]
        torch.cuda.empty_cache()  # the memory of a graph that is gone serves nobody before that
        return True


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
