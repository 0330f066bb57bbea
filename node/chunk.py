"""The unit of work between the cameras and the engine: a few decoded pictures of one stream."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..protocol.messages import MemoryLimit, TimeKind

CHUNK_FRAMES = (1, 2, 4, 6, 8)


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """One decoded frame.

    `ts` is the time its publisher wrote on it. `stream_ns` is the same instant on the stream's own clock, which
    never runs backwards, not even when a replayed file starts over: positions are computed from it.
    """

    pixels: np.ndarray  # uint8, RGB, (height, width, 3), C-contiguous
    seq: int
    ts: int
    ts_kind: TimeKind
    stream_ns: int

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.pixels.shape[1], self.pixels.shape[0]


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Pictures of one size, oldest first: one (image mode) or an even number.

    The last `num_padded` pictures repeat the one before them: they fill a chunk at the end of a stream.
    """

    pictures: tuple[Picture, ...]
    num_padded: int = 0
    decode_ms: float = 0.0

    def __post_init__(self) -> None:
        num = len(self.pictures)
        if num != 1 and (num == 0 or num % 2):
            raise ValueError(f"a chunk holds 1 or an even number of pictures, got {num}")
        if not 0 <= self.num_padded < num:
            raise ValueError(f"num_padded must be within 0..{num - 1}, got {self.num_padded}")
        sizes = {picture.size for picture in self.pictures}
        if len(sizes) > 1:
            raise ValueError(f"the pictures of a chunk must have one size, got {sorted(sizes)}")

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.pictures[0].size

    @property
    def num_frames(self) -> int:
        """Real frames, padding not counted."""
        return len(self.pictures) - self.num_padded


@dataclass(frozen=True, slots=True)
class Encoded:
    """What became of a chunk that is now in the memory."""

    num_tokens: int
    encoded_size: tuple[int, int]  # width and height as the model saw them
    preprocess_ms: float
    vision_ms: float
    prefill_ms: float
    num_forgotten_frames: int = 0  # by the memory to make room, since the chunk before this one was encoded
    num_dropped_tokens: int = 0  # of its own, which said nothing new


class Unchanged(NamedTuple):
    """Pictures that looked like the encoded one at `stream_ns` came until `until_ns`, as their publisher has it."""

    stream_ns: int
    until_ns: int


class ChunkRefused(Exception):
    """The memory did not take a chunk; nothing of it remains. `reason` is a drop reason of PROTOCOL.md.

    `limit` is what a memory has no more of that is full by now.
    """

    def __init__(self, reason: str, message: str, limit: MemoryLimit | None = None) -> None:
        self.reason = reason
        self.limit: MemoryLimit | None = limit
        super().__init__(message)
