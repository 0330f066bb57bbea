"""How much of a video a node will remember: worked out from a few chunks, before the rest is sent.

What a prediction starts from is measured, or told by the node: bytes a token takes, tokens and positions a chunk takes,
the node's free memory, and what it needs beside the memory while it encodes.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from ..protocol.forecast import Room, fit, tokens_of
from ..protocol.messages import Footprint, MemoryLimit

Limit = Literal[MemoryLimit, "file"]


class MeasuredFootprint(Footprint, frozen=True, kw_only=True):
    """What the first chunks of a video took."""

    received_size: tuple[int, int]
    encoded_size: tuple[int, int]
    chunk_s: float  # from the first frame sent until the chunk is in the memory
    room: Room | None  # on the device, for the memory of a stream; None if the node does not tell

    def tokens(self, num_chunks: int) -> int:
        """That so many chunks take."""
        return tokens_of(self, num_chunks)


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """What fits, and what ends it."""

    memory_bytes: int
    capacity_tokens: int
    num_chunks: int
    num_frames: int
    num_tokens: int
    logical_bytes: int
    seconds: float | None  # of the video; None if its rate is unknown
    encode_s: float
    fps: float
    limit: Limit


def predict(
    footprint: MeasuredFootprint, *, capacity_tokens: int, fps: float | None, file_frames: int | None
) -> Prediction:
    """What a memory of so many tokens holds of a video of so many frames that shows `fps` of them a second."""
    fits = fit(footprint, capacity_tokens, fps)
    num_chunks, limit = fits.num_chunks, fits.limit
    num_frames = num_chunks * footprint.chunk_frames
    if file_frames is not None and file_frames <= num_frames:
        num_frames, limit = file_frames, "file"
        num_chunks = -(-file_frames // footprint.chunk_frames)
    num_tokens = footprint.tokens(num_chunks)
    return Prediction(
        memory_bytes=capacity_tokens * footprint.bytes_per_token,
        capacity_tokens=capacity_tokens,
        num_chunks=num_chunks,
        num_frames=num_frames,
        num_tokens=num_tokens,
        logical_bytes=num_tokens * footprint.bytes_per_token,
        seconds=num_frames / fps if fps else None,
        encode_s=num_chunks * footprint.chunk_s,
        fps=footprint.chunk_frames / footprint.chunk_s,
        limit=limit,
    )
