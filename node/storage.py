"""Where a memory lies, and who reads it: what is read stays as it is, wherever the memory's own rows are moved."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from ..protocol.quantity import bytes_text
from .arena import Arena, KVShape, sampled
from .ledger import ChunkRecord, Snapshot
from .reading import Reading


class Storage:
    """An arena, and the readings of it and of those before it."""

    def __init__(self, shape: KVShape, capacity: int) -> None:
        """Reserve the arena. Raises MemoryError if it can't be had."""
        self._shape = shape
        self.arena = _reserve(shape, capacity)
        self._readings: list[Reading] = []
        self._late: list[Reading] = []  # of arenas that were the memory's once

    def read(self, snapshot: Snapshot, records: Sequence[ChunkRecord]) -> Reading:
        """Keep the rows of a snapshot, which holds these records, until `end_reading`."""
        rows = sampled(snapshot.num_tokens)
        held = tuple(records[: snapshot.num_chunks])
        reading = Reading(self.arena, snapshot, rows, self.arena.fingerprint(rows), held)
        self._readings.append(reading)
        return reading

    def end_reading(self, reading: Reading) -> None:
        if reading.arena is self.arena:
            self._readings.remove(reading)
        else:
            self._late.remove(reading)
            self._let_go(reading.arena)

    @property
    def is_read(self) -> bool:
        """Whether what is in the arena now is read."""
        return bool(self._readings)

    @property
    def top(self) -> int:
        """The first of the rows put aside: the memory itself ends below it."""
        return min(
            (extent.start for reading in self._readings for extent in reading.aside), default=self.arena.capacity
        )

    def keep(self, kept: np.ndarray, forget: Callable[[Sequence[Snapshot]], Sequence[Snapshot]]) -> None:
        """Move rows to the beginning of the arena; what is read of the others goes aside.

        kept (n,), int64, ascend. `forget` is called when they are there, with the snapshots that are read, and
        returns what is left of each. Raises torch.OutOfMemoryError.
        """
        num_read = max((reading.snapshot.num_tokens for reading in self._readings), default=0)
        gone = np.setdiff1d(np.arange(num_read), kept)
        aside = self.arena.extent(self.top - len(gone), self.top)
        self.arena.gather(gone, aside.start)
        still = int((kept == np.arange(len(kept))).cumprod().sum())
        self.arena.gather(kept[still:], still)
        left = forget([reading.snapshot for reading in self._readings])
        places = np.arange(self.arena.capacity)
        places[kept], places[gone] = np.arange(len(kept)), np.arange(aside.start, aside.stop)
        for reading, snapshot in zip(self._readings, left, strict=True):
            reading.move(places, gone, aside, snapshot)

    def renew(self, capacity: int, kept: np.ndarray) -> None:
        """Go on in another arena with rows of this one; who reads goes on reading this one, which goes then.

        Raises MemoryError if it can't be had.
        """
        arena, before = _reserve(self._shape, capacity), self.arena
        arena.take(before, kept)
        self._late += self._readings
        self.arena, self._readings = arena, []
        self._let_go(before)

    def release(self) -> None:
        """Give all of it back, whoever refers to it still; it is of no use any more."""
        for arena in {self.arena, *(reading.arena for reading in self._late)}:
            arena.release()
        self._release_cached()

    def _let_go(self, arena: Arena) -> None:
        """Give a former arena back, unless somebody reads it still."""
        if all(reading.arena is not arena for reading in self._late):
            arena.release()
            self._release_cached()

    def _release_cached(self) -> None:
        """Let the device have what torch keeps of it for later."""
        if any(device.type == "cuda" for device in self._shape.layer_devices):
            torch.cuda.empty_cache()


def _reserve(shape: KVShape, capacity: int) -> Arena:
    try:
        return Arena(shape, capacity)
    except (torch.OutOfMemoryError, RuntimeError) as error:  # the CPU allocator has no error class of its own
        error.__traceback__ = None  # its frames hold the layers that could be had
        num_bytes = capacity * shape.bytes_per_token
        raise MemoryError(f"cannot reserve {bytes_text(num_bytes)} for {capacity} tokens: {error}") from error
