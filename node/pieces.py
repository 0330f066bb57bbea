"""Passes of chunks through the language layers in pieces: what lies between two attention calls as one CUDA graph.

A chunk of a few hundred tokens keeps a GPU busy for less time than a host needs to launch its kernels one by one.
Attention over a growing past is no fixed work, and stays outside (as in vLLM's piecewise graphs).
"""

import logging
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .attention import MemoryPass
from .graphs import Recorded, Recorder, Recording
from .language import LanguageModel

logger = logging.getLogger(__name__)

MAX_TOKENS = 1024  # of a chunk: more of them keep a GPU busy for longer than the host needs
_MULTIPLE = 32  # of tokens: stamps in words make chunks a token longer or shorter
# Kept; streams of one size have up to three, by how many are encoded together. Each takes about 0.2 MB a token at 3
# billion parameters.
_MAX_SIZES = 6


class Pieces:
    """The pieces of one language model by their number of tokens, recorded when a chunk of that size first comes."""

    def __init__(self, language: LanguageModel, *, is_recorded: bool = True) -> None:
        """Without `is_recorded` the same computation is launched as it is, for tests on a CPU."""
        self._language = language
        self._is_recorded = is_recorded
        self._sizes: Recorded[_Pieces] = Recorded("chunks of (tokens, deepstack)", _MAX_SIZES)

    def run(
        self,
        embeds: Tensor,
        positions: Tensor,
        memory: MemoryPass,
        deepstack: Sequence[Tensor],
        between: Callable[[], None] | None,
    ) -> Tensor | None:
        """As `LanguageModel.run`, for a batch of one; None where there are no pieces of this size.

        No other pass may run by pieces until it returns, in `between` neither.
        """
        size = -(-embeds.shape[1] // _MULTIPLE) * _MULTIPLE
        tables = self._language.tables(embeds, positions)
        pieces = self._sizes.get((size, len(deepstack)), lambda: self._make(size, len(deepstack), embeds, tables[0]))
        return None if pieces is None else pieces.run(embeds, tables, memory, deepstack, between)

    def _make(self, size: int, num_deepstack: int, embeds: Tensor, table: Tensor) -> "_Pieces":
        pieces = _Pieces(self._language, size, num_deepstack, embeds, table)
        if self._is_recorded:
            began = time.monotonic()
            pieces.record(Recorder())
            logger.info("captured chunks of up to %d tokens in %.1f s", size, time.monotonic() - began)
        return pieces


class _Pieces:
    """Pieces of one size: piece 0 begins the first layer, the others end a layer and begin the next one."""

    def __init__(self, language: LanguageModel, size: int, num_deepstack: int, like: Tensor, table: Tensor) -> None:
        self._language = language
        num_rows = language.num_heads * table.shape[-1]
        self._x = like.new_zeros(size, like.shape[-1])
        self._cos, self._sin = (table.new_zeros(size, 1, table.shape[-1]) for _ in range(2))
        self._attended = like.new_zeros(size, num_rows)
        self._deepstack = [torch.zeros_like(self._x) for _ in range(num_deepstack)]
        self._recordings: list[Recording[tuple[Tensor, ...]]] = []

    @torch.inference_mode()
    def record(self, recorder: Recorder) -> None:
        """Raises what CUDA raises."""
        x = self._x
        for number in range(self._language.num_layers + 1):
            recording = recorder.record(lambda number=number, x=x: self._compute(number, x))
            # Hidden states are known to the next piece alone; once it is recorded, later ones may use their memory.
            x, *rows = recording.result
            self._recordings.append(Recording(recording.graph, (x,) if not rows else (self._x, *rows)))

    def run(
        self,
        embeds: Tensor,
        tables: tuple[Tensor, Tensor],
        memory: MemoryPass,
        deepstack: Sequence[Tensor],
        between: Callable[[], None] | None,
    ) -> Tensor:
        n, num_layers = embeds.shape[1], self._language.num_layers
        inputs = [embeds[0], *tables, *(added[0] for added in deepstack)]
        for own, given in zip([self._x, self._cos, self._sin, *self._deepstack], inputs, strict=True):
            own[:n].copy_(given)
        x, *rows = self._piece(0, self._x)
        for number in range(num_layers):
            q, k, v = (part[:n].transpose(0, 1)[None] for part in rows)
            attended = memory.attend(number, q, k, v, self._language.scale)
            self._attended[:n].copy_(attended.reshape(n, -1))
            x, *rows = self._piece(number + 1, x)
            if between is not None:
                between()
        return x[:n].clone()[None]

    def _piece(self, number: int, x: Tensor) -> tuple[Tensor, ...]:
        return self._recordings[number].replay() if self._recordings else self._compute(number, x)

    def _compute(self, number: int, x: Tensor) -> tuple[Tensor, ...]:
        """Hidden states (size, hidden), and q, k and v of the layer that begins."""
        language = self._language
        if number:
            x = language.end(number - 1, x, self._attended)
            if number <= len(self._deepstack):
                x = x + self._deepstack[number - 1]
        if number == language.num_layers:
            return (language.normed(x),)
        return x, *language.begin(number, x, self._cos, self._sin)
