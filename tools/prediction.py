"""How much of a video a node will remember: worked out from a few chunks, before the rest is sent.

Everything a prediction starts from is measured: bytes a token takes, tokens and positions a chunk takes, the node's
free memory, and what it needs beside the memory while it encodes.
"""

from __future__ import annotations

from typing import Literal

import msgspec

SAFETY_SHARE = 0.05  # of a card's memory, which is left alone

Limit = Literal["memory", "positions", "file"]


class Footprint(msgspec.Struct, frozen=True, kw_only=True):
    """What the first chunks of a video took. What the node does not tell is None."""

    received_size: tuple[int, int]
    encoded_size: tuple[int, int]
    chunk_frames: int
    bytes_per_token: int
    opening_tokens: int  # what the first chunk took beyond a later one
    tokens_per_chunk: int
    opening_positions: int
    positions_per_chunk: int
    max_positions: int | None
    chunk_s: float  # from the first frame sent until the chunk is in the memory
    workspace_bytes: int | None  # the most that encoding needs for a while
    free_bytes: int | None  # of the device, and what the node holds of it without using it
    total_bytes: int | None

    @property
    def safety_bytes(self) -> int | None:
        return None if self.total_bytes is None else round(self.total_bytes * SAFETY_SHARE)

    @property
    def room_bytes(self) -> int | None:
        """What a stream's memory may take of the device."""
        known = (self.free_bytes, self.workspace_bytes, self.safety_bytes)
        if any(each is None for each in known):
            return None
        free, workspace, safety = (each or 0 for each in known)
        return max(0, free - workspace - safety)

    def tokens(self, num_chunks: int) -> int:
        """That so many chunks take."""
        return self.opening_tokens + num_chunks * self.tokens_per_chunk if num_chunks else 0


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


def predict(footprint: Footprint, *, capacity_tokens: int, fps: float | None, file_frames: int | None) -> Prediction:
    """What a memory of so many tokens holds of a video of so many frames that shows `fps` of them a second."""
    num_chunks, limit = _chunks_by_tokens(footprint, capacity_tokens), "memory"
    by_positions = _chunks_by_positions(footprint)
    if by_positions is not None and by_positions < num_chunks:
        num_chunks, limit = by_positions, "positions"
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


def _chunks_by_tokens(footprint: Footprint, capacity_tokens: int) -> int:
    return max(0, capacity_tokens - footprint.opening_tokens) // footprint.tokens_per_chunk


def _chunks_by_positions(footprint: Footprint) -> int | None:
    if footprint.max_positions is None or footprint.positions_per_chunk == 0:
        return None
    return max(0, footprint.max_positions - footprint.opening_positions) // footprint.positions_per_chunk
