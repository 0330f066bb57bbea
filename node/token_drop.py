"""Which tokens of a chunk say nothing new: those that look like what was kept last at their place in the picture.

After DTD of TimeChat-Online (arXiv 2504.17343), which compares with the patch before; here it is the last one that
was kept, so that a slow change is seen as soon as it has come far enough. What is kept has the positions that it
would have had: to the language model it is the whole prompt with the others masked.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .layout import Span
from .vision import Vision

FORGOTTEN = -1  # in place of a chunk's number


@dataclass(frozen=True, slots=True, eq=False)
class _Kept:
    """The feature kept last at each place of a grid, and the number of the chunk that has it."""

    grid: tuple[int, int]  # rows, columns
    features: Tensor  # (num_places, hidden)
    chunks: np.ndarray  # (num_places,), int64; FORGOTTEN where the memory has lost it
    num_dropped: int = 0  # of the tokens of the newest chunk


class Sifted(NamedTuple):
    """What is left of a chunk for the language model to read."""

    span: Span
    vision: Vision


class TokenDrop:
    """Sifts the chunks of one memory, and knows what it holds for each place of the picture.

    At every place the last feature that was kept is in the memory, or the next one is kept.
    """

    def __init__(self, max_similarity: float) -> None:
        """Tokens are dropped whose cosine similarity is above `max_similarity`; at 1 none is."""
        self._max_similarity = max_similarity
        self._kept: _Kept | None = None
        self._next: _Kept | None = None  # with the chunk that was sifted last

    @torch.inference_mode()
    def sift(self, span: Span, vision: Vision, grid: tuple[int, int], number: int) -> Sifted:
        """Leave out the tokens of chunk `number` that say nothing new; its grid is (rows, columns) of merged tokens.

        Of every temporal patch at least one token stays, the least similar. Changes nothing until `commit`.
        """
        patches = vision.embeds.split(grid[0] * grid[1])
        kept = self._kept
        if kept is None or kept.grid != grid:
            kept = _Kept(grid, patches[0], np.full(len(patches[0]), FORGOTTEN))
        last, masks = kept.features, []
        is_forgotten = torch.from_numpy(kept.chunks == FORGOTTEN).to(last.device)
        for patch in patches:
            similarity = F.cosine_similarity(patch.float(), last.float(), dim=-1).clamp(max=1)
            similarity = similarity.masked_fill(is_forgotten, -torch.inf)
            is_new = ~(similarity > self._max_similarity)
            is_new.index_fill_(0, similarity.argmin(dim=0, keepdim=True), True)
            last = torch.where(is_new[:, None], patch, last)
            masks.append(is_new)
            is_forgotten = torch.zeros_like(is_forgotten)
        stays = torch.stack(masks).cpu().numpy()
        self._next = _Kept(grid, last, np.where(stays.any(axis=0), number, kept.chunks), int((~stays).sum()))
        return _sifted(span, vision, stays.flatten())

    def commit(self) -> int:
        """Note that the chunk that was sifted last is in the memory; returns how many of its tokens are not."""
        assert self._next is not None, "a chunk is sifted first"
        self._kept, self._next = self._next, None
        return self._kept.num_dropped

    def retain(self, numbers: Collection[int]) -> None:
        """Note that only the chunks of these numbers are left in the memory."""
        if self._kept is not None:
            self._kept.chunks[~np.isin(self._kept.chunks, list(numbers))] = FORGOTTEN


def _sifted(span: Span, vision: Vision, is_new: np.ndarray) -> Sifted:
    stays = ~span.visual
    stays[span.visual] = is_new
    rows = torch.from_numpy(np.flatnonzero(is_new)).to(vision.embeds.device)
    deepstack = None if vision.deepstack is None else [layer[rows.to(layer.device)] for layer in vision.deepstack]
    return Sifted(
        Span(span.ids[stays], span.positions[:, stays], span.visual[stays], span.next_position),
        Vision(vision.embeds[rows], deepstack, is_whole=bool(is_new.all())),
    )
