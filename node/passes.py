"""The two kinds of forward pass over a memory: prefill of new tokens, and one decode step of many answers."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .arena import Arena, Extent
from .attention import (
    MemoryPass,
    Partial,
    attend_causal,
    attend_ragged,
    attend_recent,
    attend_shared,
    grouped,
    merge,
)


class Prefill(MemoryPass):
    """New tokens see some extents as a whole, and themselves causally; they are written if there is a place.

    With several rows in the batch (the options of a choice, padded on the right) every row sees the same
    extents and its own tokens; then nothing is written.
    """

    def __init__(
        self, reads: Sequence[Extent], writes_to: tuple[Arena, int] | None = None, *, n_varies: bool = False
    ) -> None:
        """With `n_varies` each pass like this one has another number of tokens."""
        self._n_varies = n_varies
        self._reads = [extent for extent in reads if extent.num_tokens]
        self._writes_to = writes_to
        self._first = 0  # of the rows that end with the new ones, all of them seen
        if writes_to is not None:
            arena, self._first = writes_to
            if self._reads and self._reads[-1].arena is arena and self._reads[-1].stop == self._first:
                self._first = self._reads.pop().start

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        query = grouped(query, key.shape[1])
        partials = [attend_shared(query, *extent.rows(layer), scale) for extent in self._reads]
        if self._writes_to is None:
            return merge([*partials, attend_causal(query, key, value, scale)])
        arena, start = self._writes_to
        assert key.shape[0] == 1, "only one row can be written"
        arena.write(layer, start, key[0], value[0])
        rows = arena.extent(self._first, start + key.shape[2]).rows(layer)
        return merge([*partials, *attend_recent(query, *rows, scale, n_varies=self._n_varies)])


class Together(MemoryPass):
    """Passes over several memories as one: of a single row of tokens, each has its own stretch, one after the other."""

    def __init__(self, parts: Sequence[tuple[MemoryPass, int]]) -> None:
        """A pass, and how many tokens are its own."""
        self._parts = parts

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        nums = [num for _, num in self._parts]
        stretches = zip(query.split(nums, 2), key.split(nums, 2), value.split(nums, 2), strict=True)
        attended = [part.attend(layer, *qkv, scale) for (part, _), qkv in zip(self._parts, stretches, strict=True)]
        return torch.cat(attended, dim=1)


class Place(NamedTuple):
    """Where one answer stands: what it reads of its stream, and its own rows in the scratch."""

    memory: Extent
    own: Extent  # up to and including the row that this step writes
    aside: tuple[Extent, ...] = ()  # what the stream has forgotten since the question, but not for it


class DecodeStep(MemoryPass):
    """One new token for each of several answers.

    Answers that read the same stream share one pass over the rows that all of them see; what some see beyond
    that (questions asked later see more) comes as a tail of their own.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        assert len({id(place.own.arena) for place in places}) == 1, "one scratch holds all answers"
        self._places = places
        self._groups = _by_arena(places)
        self._order = _inverse([row for rows in self._groups for row in rows])
        self._indexes: dict[torch.device, _OwnIndex] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if len(self._places) == 1:
            return self._attend_one(self._places[0].own, layer, query, key, value, scale)
        index = self._own_index(query.device)
        scratch = self._places[0].own.arena
        scratch.keys[layer][index.newest] = key[:, :, 0]
        scratch.values[layer][index.newest] = value[:, :, 0]
        query = grouped(query, key.shape[1])
        own = attend_ragged(
            query, scratch.keys[layer][index.rows], scratch.values[layer][index.rows], index.lengths, scale
        )
        if len(self._groups) == 1:
            return merge([own, *self._attend_group(layer, query, self._groups[0], scale)])
        out = [merge([_take(own, rows), *self._attend_group(layer, query[rows], rows, scale)]) for rows in self._groups]
        return torch.cat(out)[self._order]

    def _attend_one(self, own: Extent, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """`attend` for a single answer, whose rows lie together: without an index a CPU is done a quarter sooner."""
        own.arena.write(layer, own.stop - 1, key[0], value[0])
        query = grouped(query, key.shape[1])
        return merge([attend_shared(query, *own.rows(layer), scale), *self._attend_group(layer, query, [0], scale)])

    def _attend_group(self, layer: int, query: Tensor, rows: list[int], scale: float) -> list[Partial]:
        """Partials over the stream that these rows read; query holds these rows alone."""
        memories = [self._places[row].memory for row in rows]
        shared = min(memory.stop for memory in memories)
        if shared == 0:
            assert all(memory.stop == 0 for memory in memories), "an empty memory is read by itself"
            return []
        partials = [attend_shared(query, *memories[0].arena.extent(0, shared).rows(layer), scale)]
        if any(memory.stop > shared for memory in memories):
            partials.append(self._attend_tails(layer, query, memories, shared, scale))
        aside = [{extent.start: extent for extent in self._places[row].aside} for row in rows]
        for start in sorted({start for extents in aside for start in extents}):
            tails = [extents.get(start, memories[0]._replace(start=start, stop=start)) for extents in aside]
            partials.append(self._attend_tails(layer, query, tails, start, scale))
        return partials

    def _attend_tails(self, layer: int, query: Tensor, memories: list[Extent], shared: int, scale: float) -> Partial:
        """What some rows see beyond the shared part; a row that sees no more gets weight zero."""
        out = torch.zeros_like(query)
        lse = torch.full(out.shape[:-1], float("-inf"), device=out.device)
        for stop in sorted({memory.stop for memory in memories if memory.stop > shared}):
            mine = [i for i, memory in enumerate(memories) if memory.stop == stop]
            extent = memories[mine[0]].arena.extent(shared, stop)
            out[mine], lse[mine] = attend_shared(query[mine], *extent.rows(layer), scale)
        return Partial(out, lse)

    def _own_index(self, device: torch.device) -> "_OwnIndex":
        """Where the answers' own rows lie, made once for each device the layers are on."""
        if device not in self._indexes:
            own = [place.own for place in self._places]
            starts = torch.tensor([extent.start for extent in own], device=device)
            lengths = torch.tensor([extent.num_tokens for extent in own], device=device)
            longest = torch.arange(max(extent.num_tokens for extent in own), device=device)
            # Past an answer's length the index runs into padding, which is masked, and must stay in bounds.
            rows = (starts[:, None] + longest).clamp_(max=own[0].arena.capacity - 1)
            self._indexes[device] = _OwnIndex(rows, lengths, starts + lengths - 1)
        return self._indexes[device]


class _OwnIndex(NamedTuple):
    rows: Tensor  # (batch, longest)
    lengths: Tensor  # (batch,)
    newest: Tensor  # (batch,): the row that this step writes


def _take(partial: Partial, rows: list[int]) -> Partial:
    return Partial(partial.out[rows], partial.lse[rows])


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _by_arena(places: Sequence[Place]) -> list[list[int]]:
    """Row numbers of the answers that read the same stream, stream by stream; an empty memory is apart."""
    groups: dict[tuple[int, bool], list[int]] = {}
    for row, place in enumerate(places):
        groups.setdefault((id(place.memory.arena), place.memory.stop == 0), []).append(row)
    return list(groups.values())
