"""Small random checkpoints of every family, the streams that tests feed them, and a model that fails on demand."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onlooker.node.adapter import FAMILIES as _FAMILIES
from onlooker.node.attention import MemoryPass
from onlooker.node.chunk import Chunk, Picture
from onlooker.node.layout import Span
from onlooker.node.memory import StreamMemory
from onlooker.node.model import VisionLanguageModel, load_model
from onlooker.node.options import StreamOptions
from onlooker.node.random_checkpoint import write_checkpoint
from onlooker.node.vision import Vision

torch.set_num_threads(1)  # models this small only lose by more, and much when the machine is busy

FAMILIES = tuple(_FAMILIES)
FRAME_NS = 500_000_000


class Checkpoints:
    """Checkpoint folders by family, each written when it is first asked for and loaded once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._models: dict[str, VisionLanguageModel] = {}

    def path(self, family: str) -> Path:
        path = self._folder / family
        if not path.exists():
            write_checkpoint(path, family)
        return path

    def model(self, family: str) -> VisionLanguageModel:
        if family not in self._models:
            self._models[family] = load_model(str(self.path(family)), dtype="float32", device="cpu")
        return self._models[family]


class DirectedModel(VisionLanguageModel):
    """A model that shares the weights of another, and whose language model waits or fails as a test directs.

    `fail_with` is raised in layer 1, once that layer's keys and values are written; `hold` makes every forward pass
    wait until `let_go`.
    """

    def __init__(self, model: VisionLanguageModel) -> None:
        self.__dict__.update(model.__dict__)
        self.fail_with: BaseException | None = None
        self.num_reads = 0
        self._may_go = threading.Event()
        self._may_go.set()
        self._is_waiting = threading.Event()

    def hold(self) -> None:
        self._is_waiting.clear()
        self._may_go.clear()

    def wait_until_held(self) -> None:
        assert self._is_waiting.wait(20), "no forward pass came"

    def let_go(self) -> None:
        self._may_go.set()

    def read(
        self,
        span: Span,
        memory: MemoryPass,
        vision: Vision | None = None,
        between: Callable[[], None] | None = None,
    ) -> Tensor:
        return super().read(span, self._directed(memory), vision, between)

    def read_batch(self, ids: np.ndarray, positions: np.ndarray, memory: MemoryPass) -> Tensor:
        return super().read_batch(ids, positions, self._directed(memory))

    def _directed(self, memory: MemoryPass) -> MemoryPass:
        self.num_reads += 1
        if not self._may_go.is_set():
            self._is_waiting.set()
            assert self._may_go.wait(20), "nobody let the model go on"
        return memory if self.fail_with is None else FailingPass(memory, self.fail_with)


class FailingPass(MemoryPass):
    """Passes on to another pass, and raises once layer 1 is written."""

    def __init__(self, memory: MemoryPass, error: BaseException) -> None:
        self._memory = memory
        self._error = error

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        out = self._memory.attend(layer, query, key, value, scale)
        if layer == 1:
            raise self._error
        return out


def chunk(
    first_seq: int = 0,
    num: int = 2,
    *,
    grid: tuple[int, int] = (2, 3),
    factor: int = 28,
    num_padded: int = 0,
) -> Chunk:
    """Noise that depends on the sequence numbers alone; grid is merged tokens (rows, columns), two frames a second."""
    shape = (grid[0] * factor, grid[1] * factor, 3)
    pictures = []
    for seq in range(first_seq, first_seq + num - num_padded):
        pixels = np.random.default_rng(seq).integers(0, 256, shape, dtype=np.uint8)
        pictures.append(Picture(pixels, seq, seq * FRAME_NS + 7, "media", seq * FRAME_NS))
    pictures += pictures[-1:] * num_padded
    return Chunk(tuple(pictures), num_padded)


def memory(
    model: VisionLanguageModel,
    num_tokens: int = 512,
    layout: str = "native",
    chunk_frames: int = 2,
    **options: Any,
) -> StreamMemory:
    """A stream's memory with room for so many tokens, for pictures of any size; `options` are further ones."""
    stream_options = StreamOptions(
        "front",
        chunk_frames=chunk_frames,
        layout=layout,  # type: ignore[arg-type]
        min_pixels=1,
        memory_bytes=num_tokens * model.kv_shape.bytes_per_token,
        **options,
    )
    return StreamMemory(model, stream_options)


def rows(stream: StreamMemory) -> list[Tensor]:
    """K and V of a memory, a copy: a tensor each for every layer."""
    extent = stream.extent(stream.now)
    layers = range(extent.arena.shape.num_layers)
    return [tensor.clone() for layer in layers for tensor in extent.rows(layer)]


def arena(stream: StreamMemory) -> list[Tensor]:
    """The whole storage of a memory, also the rows that are not in use, as bits: a copy."""
    whole = stream.extent(stream.now).arena
    return [tensor.clone().view(torch.int32) for tensor in (*whole.keys, *whole.values)]


def are_equal(a: list[Tensor], b: list[Tensor]) -> bool:
    """Bit for bit."""
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
