"""Keys and values of many tokens in storage reserved once.

Per layer one K and one V tensor, (capacity, kv_heads, head_dim), on that layer's device. Rows are written in
place, and moved by `gather` alone: until then a reader may go on reading rows that lie below the length it saw,
whatever is written above it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_FINGERPRINT_ROWS = 16
_ROWS_AT_ONCE = 8192  # that are on their way while rows move: 4 MiB where a row of a layer has 512 bytes


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one token costs in this model."""

    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    layer_devices: tuple[torch.device, ...]  # one a layer

    @property
    def num_layers(self) -> int:
        return len(self.layer_devices)

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


class Extent(NamedTuple):
    """Rows [start, stop) of an arena."""

    arena: "Arena"
    start: int
    stop: int

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start

    def rows(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V of a layer, (num_tokens, kv_heads, head_dim), as views."""
        return self.arena.keys[layer][self.start : self.stop], self.arena.values[layer][self.start : self.stop]


class Turn(NamedTuple):
    """Rows [start, stop) whose keys are to be rotated."""

    start: int
    stop: int
    cos: Tensor  # (head_dim,), float32
    sin: Tensor


class Arena:
    """Storage for `capacity` tokens. Which rows are in use is its owner's knowledge."""

    def __init__(self, shape: KVShape, capacity: int) -> None:
        """Reserve the storage; raises torch.OutOfMemoryError (CUDA) or RuntimeError (CPU) if it can't be had."""
        self.shape = shape
        self.capacity = capacity
        self.keys = self._reserve()
        self.values = self._reserve()

    def _reserve(self) -> list[Tensor]:
        """A tensor for each layer; those of one device are one block of storage."""
        shape, devices = self.shape, self.shape.layer_devices
        row = (self.capacity, shape.num_kv_heads, shape.head_dim)
        blocks = {
            device: iter(torch.empty(devices.count(device), *row, dtype=shape.dtype, device=device))
            for device in dict.fromkeys(devices)
        }
        return [next(blocks[device]) for device in devices]

    @property
    def layer_stride(self) -> int:
        """Elements between a row of one layer and the same row of the next, where all are on one device."""
        return self.capacity * self.shape.num_kv_heads * self.shape.head_dim

    def release(self) -> None:
        """Give the storage back, whoever still refers to the arena: no row can be read any more."""
        self.keys.clear()
        self.values.clear()

    def extent(self, start: int, stop: int) -> Extent:
        assert 0 <= start <= stop <= self.capacity, (start, stop, self.capacity)
        return Extent(self, start, stop)

    def write(self, layer: int, start: int, key: Tensor, value: Tensor) -> None:
        """Write rows of one layer; key, value (kv_heads, n, head_dim), keys already rotated."""
        stop = start + key.shape[1]
        assert stop <= self.capacity, (start, stop, self.capacity)
        self.keys[layer][start:stop].copy_(key.transpose(0, 1))
        self.values[layer][start:stop].copy_(value.transpose(0, 1))

    @torch.inference_mode()
    def gather(self, rows: np.ndarray, to: int, num_at_once: int = _ROWS_AT_ONCE) -> None:
        """Move rows down in every layer, or to above all of them: row `to + i` becomes what rows[i] holds.

        rows (n,), int64, ascend, and none lies below its place, or all lie below `to`. Works in place, by way of a
        small stage. Raises torch.OutOfMemoryError before anything has moved.
        """
        is_down = bool((rows >= np.arange(to, to + len(rows))).all())
        assert to + len(rows) <= self.capacity and (is_down or rows[-1] < to), (to, rows)
        moves = {
            device: self._moves(rows, min(len(rows), num_at_once), device)
            for device in dict.fromkeys(self.shape.layer_devices)
        }
        for tensors in (self.keys, self.values):
            for tensor, device in zip(tensors, self.shape.layer_devices, strict=True):
                index, stage = moves[device]
                for first in range(0, len(rows), num_at_once):
                    some = index[first : first + num_at_once]
                    staged = stage[: len(some)]
                    # Later rows are read from no lower than their own places, which these never reach.
                    torch.index_select(tensor, 0, some, out=staged)
                    tensor[to + first : to + first + len(some)].copy_(staged)

    @torch.inference_mode()
    def take(self, other: "Arena", rows: np.ndarray) -> None:
        """Copy rows (n,), int64, of another arena of this shape to the first n here."""
        for mine, theirs in zip((*self.keys, *self.values), (*other.keys, *other.values), strict=True):
            torch.index_select(theirs, 0, torch.from_numpy(rows).to(theirs.device), out=mine[: len(rows)])

    def _moves(self, rows: np.ndarray, num_staged: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Where rows come from, and the stage that they go through."""
        shape = self.shape
        stage = torch.empty(num_staged, shape.num_kv_heads, shape.head_dim, dtype=shape.dtype, device=device)
        return torch.from_numpy(rows).to(device), stage

    @torch.inference_mode()
    def rotate(self, turns: Sequence[Turn], num_at_once: int = _ROWS_AT_ONCE) -> None:
        """Rotate keys in every layer, in float32. Raises torch.OutOfMemoryError before any has changed."""
        shape = self.shape
        row = (shape.num_kv_heads, shape.head_dim)
        num_staged = min(num_at_once, max((turn.stop - turn.start for turn in turns), default=0))
        on = {
            device: (
                torch.empty(2, num_staged, *row, device=device),
                [turn._replace(cos=turn.cos.to(device), sin=turn.sin.to(device)) for turn in turns],
            )
            for device in dict.fromkeys(shape.layer_devices)
        }
        for keys, device in zip(self.keys, shape.layer_devices, strict=True):
            stage, turns_here = on[device]
            for start, stop, cos, sin in turns_here:
                for first in range(start, stop, num_at_once):
                    some = keys[first : min(first + num_at_once, stop)]
                    old, new = stage[:, : len(some)]
                    _rotate(old.copy_(some), cos, sin, new)
                    some.copy_(new)

    def logical_bytes(self, num_tokens: int) -> int:
        """Bytes of the first `num_tokens` rows over all layers, counted on the tensors themselves."""
        return sum(t[:num_tokens].numel() * t.element_size() for t in (*self.keys, *self.values))

    @property
    def resident_bytes(self) -> int:
        """Bytes of the storage behind all layers, each storage counted once."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in (*self.keys, *self.values)}
        return sum(storage.nbytes() for storage in storages.values())

    def fingerprint(self, rows: np.ndarray) -> str:
        """Digest of K and V of some rows in three layers.

        It is a cheap witness that a memory was not written to, not a proof that nothing collides.
        """
        if not len(rows):
            return ""
        layers = sorted({0, self.shape.num_layers // 2, self.shape.num_layers - 1})
        digest = hashlib.blake2b(digest_size=8)
        for layer in layers:
            for tensor in (self.keys[layer], self.values[layer]):
                digest.update(tensor[rows.tolist()].cpu().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def sampled(num_tokens: int) -> np.ndarray:
    """Rows sampled evenly over the first `num_tokens`, the last among them."""
    last = num_tokens - 1
    return np.array(sorted({last - last * i // _FINGERPRINT_ROWS for i in range(_FINGERPRINT_ROWS + 1) if num_tokens}))


def _rotate(keys: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """As the layers rotate, without room of its own; keys, out (..., head_dim)."""
    half = keys.shape[-1] // 2
    torch.mul(keys, cos, out=out)
    out[..., :half].addcmul_(keys[..., half:], sin[:half], value=-1)
    out[..., half:].addcmul_(keys[..., :half], sin[half:])
