"""A reading: what a question reads of a memory that goes on, and may forget, meanwhile."""

from dataclasses import dataclass

import numpy as np

from .arena import Arena, Extent
from .ledger import ChunkRecord, Snapshot


@dataclass(slots=True, eq=False)
class Reading:
    """Rows of a memory up to some length, wherever forgetting has moved them since.

    What the memory forgets of them is put aside, above its own rows, until the reading is over. No row changes a bit.
    """

    arena: Arena
    snapshot: Snapshot  # what is left of the one that the reading began with
    sampled: np.ndarray  # rows of the fingerprint
    fingerprint: str  # of them when the reading began
    records: tuple[ChunkRecord, ...]  # that it held then
    aside: tuple[Extent, ...] = ()

    @property
    def extents(self) -> list[Extent]:
        """All rows that are read."""
        return [self.extent, *self.aside]

    @property
    def extent(self) -> Extent:
        """Those that are not aside."""
        return self.arena.extent(0, self.snapshot.num_tokens)

    def move(self, places: np.ndarray, gone: np.ndarray, aside: Extent, left: Snapshot) -> None:
        """Follow rows to their new places.

        `gone`, ascending, are those that were put `aside`; `left` is what is left of the snapshot.
        """
        num_gone = int(np.searchsorted(gone, self.snapshot.num_tokens))
        if num_gone:
            self.aside += (aside._replace(stop=aside.start + num_gone),)
        self.sampled = places[self.sampled]
        self.snapshot = left
