"""How much fits into a memory: the arithmetic of those who say so before it is full."""

import math
from typing import NamedTuple

import msgspec
from msgspec import UNSET

from .messages import Footprint, MemoryLimit, Vram

SAFETY_SHARE = 0.05  # of a device's memory, which is left alone


class Fit(NamedTuple):
    """How many chunks a memory can hold, and what ends it."""

    num_chunks: int
    limit: MemoryLimit


def fit(footprint: Footprint, capacity_tokens: int, fps: float | None) -> Fit:
    """What so many tokens hold of frames that are kept `fps` a second; None if that is not known."""
    by_tokens = max(0, capacity_tokens - footprint.opening_tokens) // footprint.tokens_per_chunk
    by_positions = _chunks_by_positions(footprint, fps)
    return Fit(by_tokens, "memory") if by_tokens <= by_positions else Fit(int(by_positions), "positions")


def tokens_of(footprint: Footprint, num_chunks: int) -> int:
    """That so many chunks take."""
    return footprint.opening_tokens + num_chunks * footprint.tokens_per_chunk if num_chunks else 0


def seconds_of_positions(footprint: Footprint, fps: float | None) -> float | None:
    """How long a stream goes on until its model has no positions left; None if that cannot be told."""
    per_second = footprint.positions_per_second
    if fps:
        per_second += footprint.positions_per_chunk * fps / footprint.chunk_frames
    room = _positions_after_opening(footprint)
    return room / per_second if per_second and room < math.inf else None


def _chunks_by_positions(footprint: Footprint, fps: float | None) -> float:
    room, per_chunk = _positions_after_opening(footprint), float(footprint.positions_per_chunk)
    if fps:
        per_chunk += footprint.positions_per_second * footprint.chunk_frames / fps
    if footprint.picture_positions > room:
        return 0
    return room / per_chunk if per_chunk else math.inf


def _positions_after_opening(footprint: Footprint) -> float:
    if footprint.max_positions is UNSET:
        return math.inf
    return max(0, footprint.max_positions - footprint.opening_positions)


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """Device memory that a stream may still reserve."""

    free_bytes: int  # of the device, and what the node holds of it without using it
    workspace_bytes: int  # the most that encoding and answering need for a while
    safety_bytes: int

    @property
    def num_bytes(self) -> int:
        return max(0, self.free_bytes - self.workspace_bytes - self.safety_bytes)


def room_of(vram: Vram) -> Room | None:
    """The room that a device has left; None if that cannot be told, as on the CPU."""
    free, total, workspace = vram.free_bytes, vram.total_bytes, vram.activations_peak_bytes
    reserved, allocated = vram.torch_reserved_bytes, vram.torch_allocated_bytes
    if free is UNSET or total is UNSET or workspace is UNSET or reserved is UNSET or allocated is UNSET:
        return None
    return Room(
        free_bytes=free + reserved - allocated, workspace_bytes=workspace, safety_bytes=round(total * SAFETY_SHARE)
    )
