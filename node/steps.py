"""Steps: passes of a few new tokens through the language model, each size as one CUDA graph.

A decode step takes one token of every running answer, a question's step all tokens of one question. Everything
that changes between two steps is in one tensor of integers; a graph is captured once for each size, and fewer
rows than it has are made up by repeating the last one, which writes the same values to the same place.
"""

import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .arena import Arena
from .attention import MemoryPass
from .model import VisionLanguageModel
from .split_kv import ROWS_PER_TILE, Row, SplitAttention, attend_rows

logger = logging.getLogger(__name__)

QUESTION_SIZES = (32, 64)  # tokens of a question with the words around it; longer ones are prefilled like chunks


class Step(MemoryPass):
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
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits = torch.empty(0)

    @torch.inference_mode()
    def capture(self, stream: torch.cuda.Stream, pool: object) -> None:
        """Record the graph on a side stream; row 0 of the scratch is written to. Raises what CUDA raises."""
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._compute()  # what a kernel loads or compiles at its first use must not be in the graph
            with _never_waiting():
                self._compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):  # type: ignore[arg-type]
            self._logits = self._compute()
        self._graph = graph

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
        if self._graph is None:
            self._rows = padded
            self._logits = self._compute()
            self._rows = ()
        else:
            self._graph.replay()
        return self._logits[: len(wanted)]

    def _compute(self) -> Tensor:
        model = self._model
        hidden = model.language.run(model.embed(self._ids)[None], self._positions.expand(3, 1, -1), self)
        return model.logits(hidden[0].index_select(0, self._wanted))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        self._scratch.keys[layer].index_copy_(0, self._newest, key[0].transpose(0, 1))
        self._scratch.values[layer].index_copy_(0, self._newest, value[0].transpose(0, 1))
        rows = query[0].transpose(0, 1).contiguous()
        if query.device.type == "cuda":
            return self._attention.attend(layer, rows, self._tables, scale)[None]
        return attend_rows(layer, rows, self._rows, scale)[None]

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
        # One stream for all: each that multiplies matrices keeps tens of megabytes of workspace for good.
        began, stream, pool = time.monotonic(), torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        for step in sorted([*self._decode, *self._question], key=lambda step: -step.num_rows):
            step.capture(stream, pool)
        torch.cuda.synchronize()
        sizes = [[step.num_rows for step in steps] for steps in (self._decode, self._question)]
        seconds = time.monotonic() - began
        logger.info("captured steps of %s answers and of questions of %s tokens in %.1f s", *sizes, seconds)

    def decode(self, rows: Sequence[Row]) -> Tensor | None:
        """Logits (num_rows, vocabulary) after each row, valid until the next step; None if there is no such step."""
        step = _first_that_fits(self._decode, len(rows))
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
    current = torch.cuda.current_stream(model.device)
    try:
        steps = Steps(model, scratch, max_answers)
        steps.capture()
    except Exception:  # a missing Triton, a layer that cannot be captured, a compiler's failure
        logger.warning("no CUDA graphs: steps are launched kernel by kernel", exc_info=True)
        torch.cuda.set_stream(current)  # a capture that could not be ended leaves its own in place
        torch.cuda.synchronize()
        return None
    return steps


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


def sizes_up_to(num: int) -> list[int]:
    """Powers of two, and `num` itself."""
    return sorted({1 << i for i in range(num.bit_length()) if 1 << i < num} | {num})


def _first_that_fits(steps: Sequence[Step], num_rows: int) -> Step | None:
    return next((step for step in steps if step.num_rows >= num_rows), None)
