"""Steps: passes of a few new tokens through the language model, each size as one CUDA graph.

A decode step takes one token of every running answer, a question's step all tokens of one question. Everything
that changes between two steps is in one tensor of integers; a graph is captured once for each size, and fewer
rows than it has are made up by repeating the last one, which writes the same values to the same place.
"""

import logging
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from .arena import Arena
from .graphs import Recorder, Recording
from .language import rotate
from .model import VisionLanguageModel
from .split_kv import ROWS_PER_TILE, Row, SplitAttention, attend_rows

logger = logging.getLogger(__name__)

QUESTION_SIZES = (32, 64)  # tokens of a question with the words around it; longer ones are prefilled like chunks


class Step:
    """A pass of `num_rows` tokens, of which some give logits. On the CPU it runs as it is, for tests."""

    def __init__(
        self, model: VisionLanguageModel, scratch: Arena, num_rows: int, *, num_logits: int, max_tiles: int
    ) -> None:
        self.num_rows = num_rows
        self._model = model
        self._scratch = scratch
        self._num_logits = num_logits
        self._attention = SplitAttention(scratch, model.language.num_heads, num_rows, max_tiles)
        sizes = [num_rows, num_rows, num_rows, num_logits, self._attention.table_size]
        is_cuda = model.device.type == "cuda"
        host = torch.zeros(sum(sizes), dtype=torch.int64, pin_memory=is_cuda)
        self._host = host
        self._copied = torch.cuda.Event() if is_cuda else None
        self._inputs = torch.zeros_like(host, device=model.device)
        self._host_parts = [part.numpy() for part in host.split(sizes)]
        self._ids, self._positions, self._newest, self._wanted, self._tables = self._inputs.split(sizes)
        self._write_empty()
        self._rows: Sequence[Row] = ()
        self._recording: Recording[Tensor] | None = None

    @torch.inference_mode()
    def record(self, recorder: Recorder) -> None:
        """Record the graph; row 0 of the scratch is written to. Raises what CUDA raises."""
        self._recording = recorder.record(self._compute)

    @torch.inference_mode()
    def run(self, rows: Sequence[Row], wanted: Sequence[int]) -> Tensor:
        """Compute rows, write their keys and values to the scratch, and return logits of the wanted ones.

        Logits (num wanted, vocabulary), float32, are valid until the next run.
        """
        padded = [*rows, *[rows[-1]] * (self.num_rows - len(rows))]
        if self._copied is not None:
            self._copied.synchronize()  # a busy device may not have read the step before this one yet
        ids, positions, newest, places, tables = self._host_parts
        ids[:] = [row.token for row in padded]
        positions[:] = [row.position for row in padded]
        newest[:] = [row.own.stop - 1 for row in padded]
        places[:] = [*wanted, *[wanted[-1]] * (self._num_logits - len(wanted))]
        self._attention.write_tables(padded, tables)
        self._inputs.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        if self._recording is not None:
            return self._recording.replay()[: len(wanted)]
        self._rows = padded
        logits = self._compute()
        self._rows = ()
        return logits[: len(wanted)]

    def _compute(self) -> Tensor:
        model = self._model
        language, x = model.language, model.embed(self._ids)
        cos, sin = language.tables(x[None], self._positions.expand(3, 1, -1))
        last, qkv = language.num_layers - 1, language.enter(x)
        for layer in range(last):
            x, qkv = language.cross(layer, x, self._attend(layer, qkv, cos, sin))
        x = language.end(last, x, self._attend(last, qkv, cos, sin))
        return model.logits(language.normed(x.index_select(0, self._wanted)))

    def _attend(self, layer: int, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """From a layer's products to what `LanguageModel.end` takes; keys and values are written to the scratch."""
        language = self._model.language
        weights = language.weights(layer)
        if qkv.device.type == "cuda":
            query = self._attention.put_rotated(layer, qkv, cos, sin, weights, self._newest)
            return self._attention.attend(layer, query, self._tables, language.scale).flatten(1)
        query, key, value = rotate(qkv, cos, sin, weights)
        self._scratch.keys[layer].index_copy_(0, self._newest, key)
        self._scratch.values[layer].index_copy_(0, self._newest, value)
        return attend_rows(layer, query, self._rows, language.scale).flatten(1)

    def _write_empty(self) -> None:
        """Tables in which no tile has any row."""
        self._attention.write_tables([], self._host_parts[-1])
        self._inputs.copy_(self._host)


class Steps:
    """The steps of one scratch: decode steps by number of answers, question steps by number of tokens."""

    def __init__(self, model: VisionLanguageModel, scratch: Arena, max_answers: int) -> None:
        self._decode = [
            Step(model, scratch, num, num_logits=num, max_tiles=2 * num) for num in sizes_up_to(max_answers)
        ]
        self._question = [
            Step(model, scratch, num, num_logits=1, max_tiles=2 * -(-num // ROWS_PER_TILE)) for num in QUESTION_SIZES
        ]

    def capture(self) -> None:
        """Record all graphs, the largest first: they share their memory."""
        began, recorder = time.monotonic(), Recorder()
        for step in sorted([*self._decode, *self._question], key=lambda step: -step.num_rows):
            step.record(recorder)
        sizes = [[step.num_rows for step in steps] for steps in (self._decode, self._question)]
        seconds = time.monotonic() - began
        logger.info("captured steps of %s answers and of questions of %s tokens in %.1f s", *sizes, seconds)

    def decode(self, rows: Sequence[Row]) -> Tensor | None:
        """Logits (num_rows, vocabulary) after each row, valid until the next step; None if there is no such step."""
        step = None if any(row.aside for row in rows) else _first_that_fits(self._decode, len(rows))
        return None if step is None else step.run(rows, range(len(rows)))

    def question(self, rows: Sequence[Row]) -> Tensor | None:
        """Logits (vocabulary,) after the last row; None if there is no such step."""
        step = _first_that_fits(self._question, len(rows))
        return None if step is None else step.run(rows, [len(rows) - 1])[0].clone()


def captured_steps(model: VisionLanguageModel, scratch: Arena, max_answers: int) -> Steps | None:
    """Steps as CUDA graphs, or None with the reason in the log where they cannot be had.

    `scratch` is written to. What fails here does so before a stream is there, and costs speed alone.
    """
    if model.device.type != "cuda" or len(set(scratch.shape.layer_devices)) > 1:
        return None
    try:
        steps = Steps(model, scratch, max_answers)
        steps.capture()
    except Exception:  # a missing Triton, a layer that cannot be captured, a compiler's failure
        logger.warning("no CUDA graphs: steps are launched kernel by kernel", exc_info=True)
        return None
    return steps


def sizes_up_to(num: int) -> list[int]:
    """Powers of two, and `num` itself."""
    return sorted({1 << i for i in range(num.bit_length()) if 1 << i < num} | {num})


def _first_that_fits(steps: Sequence[Step], num_rows: int) -> Step | None:
    return next((step for step in steps if step.num_rows >= num_rows), None)
