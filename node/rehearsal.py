"""What is done before a model's first frame: chunks and answers on memories that are thrown away.

What a device loads, compiles, captures or reserves at its first use, it does here, and what is faster than the layers
kernel by kernel is used only if it computes the same.
"""

import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .answer import decode_tokens
from .branch import Branch, Scratch
from .chunk import Chunk, Picture
from .compilation import Compilation, CompileSetting, should_compile
from .memory import StreamMemory
from .model import VisionLanguageModel
from .options import StreamOptions
from .steps import QUESTION_SIZES, sizes_up_to

logger = logging.getLogger(__name__)

_NUM_TOKENS = 1024
_SIDE = 6  # tokens: more than one window of the vision tower, and parts of windows
_TEXT = "What? " * QUESTION_SIZES[-1]  # at least a token a word
# Of the largest logit: how far apart two orders of summation may come out in some layers.
_MAX_GAP = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 2e-1}


class Rehearsal:
    """The same chunks and steps again and again; the first time tells what is right."""

    def __init__(self, model: VisionLanguageModel, scratch: Scratch) -> None:
        """Play it kernel by kernel. All slots of the scratch must be free, now and later."""
        self._model = model
        self._scratch = scratch
        self._expected = self.play()

    def play(self) -> Tensor:
        """Two chunks, and steps of every size, of questions and of answers; returns all logits (num, vocabulary)."""
        model, num_bytes = self._model, _NUM_TOKENS * self._model.kv_shape.bytes_per_token
        side = _SIDE * model.geometry.factor
        options = StreamOptions("rehearsal", chunk_frames=4, encode_size=(side, side), memory_bytes=num_bytes)
        memory = StreamMemory(model, options)
        pixels = np.zeros((side, side, 3), np.uint8)
        for first in (0, 4):
            memory.append(Chunk(tuple(Picture(pixels, seq, 0, "media", 0) for seq in range(first, first + 4))))
        branches: list[Branch] = []
        try:
            while self._scratch.num_free:
                branches.append(Branch(model, memory, memory.now, self._scratch))
            return torch.stack(self._ask(memory, branches))
        finally:
            for branch in branches:
                branch.close()

    def _ask(self, memory: StreamMemory, branches: list[Branch]) -> list[Tensor]:
        logits: list[Tensor] = []
        sizes = sizes_up_to(len(branches))
        whole = memory.layout.question(memory.now.layout, _TEXT)
        for num in QUESTION_SIZES:
            if not logits or branches[0].num_own + num + len(sizes) <= branches[0].slot_tokens:
                logits.append(branches[0].prefill(whole.first(num)))
        token = int(logits[0].argmax())
        for num in sizes:
            logits += decode_tokens(self._model, [(token, branch) for branch in branches[:num]]).clone()
        branches[0].continuations(np.full((2, 3), token), np.full((2, 3), token))
        return logits

    def adopt(self, what: str, use: Callable[[], bool], give_up: Callable[[], None]) -> None:
        """Use what is faster, where it can be had, and give it up again if it fails or computes something else."""
        if use() and not self._is_right(what):
            give_up()

    def _is_right(self, what: str) -> bool:
        """Whether it comes out as the first time; the log says where it does not."""
        bound = _MAX_GAP[self._model.dtype] * float(self._expected.abs().max())
        try:
            gap = float((self.play() - self._expected).abs().max())
        except Exception:
            logger.exception("%s failed: they are not used", what)
            return False
        if not gap <= bound:
            logger.error("%s are off by %g, at most %g was expected: they are not used", what, gap, bound)
            return False
        logger.info("%s are off by %g at most, and up to %g was expected", what, gap, bound)
        return True


def warm_up(model: VisionLanguageModel, scratch: Scratch, compile: CompileSetting) -> None:
    """Make a model as fast as it gets. What fails of it is in the log, and costs speed alone."""
    model.choose_kernels()
    rehearsal = Rehearsal(model, scratch)
    is_compiled = should_compile(compile, model.device, model.weights_bytes)
    compilation = Compilation(model.tower, model.language)
    if is_compiled:
        rehearsal.adopt("compiled layers", lambda: compilation.use(rehearsal.play), compilation.give_up)
    rehearsal.adopt("captured steps", lambda: scratch.capture_steps(model), scratch.launch_steps)
    rehearsal.adopt("captured chunks", model.record_chunks, model.launch_chunks)
    if is_compiled:
        compilation.finish()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()  # what compilers tried out, and activations of other sizes than a stream's
