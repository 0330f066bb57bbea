"""Split-KV attention of a fixed number of rows, whose places and lengths are read from the device.

A row is one new token. It sees a part of a stream's memory and a part of a scratch, each up to a length of its
own. Rows that read the same rows of storage form a tile, so that they read them once; every tile's keys are
split over the whole card, and the splits are merged by log-sum-exp (flash-decoding). Nothing but the contents of
tensors changes from step to step, which is what a CUDA graph needs.
"""

import importlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .arena import Arena, Extent, KVShape
from .language import AttentionWeights

ROWS_PER_TILE = 8
_OWN_SPLITS = 4
_MAX_SPLITS = 128
_MERGED_WIDTH = 16  # of a head that one program merges: more of them are sooner done
_LARGE_SHARED_BYTES = 128 << 10  # three stages take up to 112 KiB, two 80; a desktop card has 99
_TABLE = 5  # numbers of a tile beside its rows and lengths: see `attend_splits`


class Row(NamedTuple):
    """A token of a step: what it is, and what it sees."""

    token: int
    position: int
    memory: Extent  # from the start of a stream's arena; may be empty
    own: Extent  # of the scratch, up to and including the token's own row
    aside: tuple[Extent, ...] = ()  # further rows of the stream's arena; no captured step reads any


class _Tile(NamedTuple):
    """Rows of the step that read the same storage from the same start."""

    first: Extent
    rows: list[int]
    lengths: list[int]
    is_own: bool


class SplitAttention:
    """The tables and buffers of one step of `num_rows` rows, and attention by them.

    The tables are a part of the step's inputs (int64, on the device), which the owner fills with `write_tables`.
    Raises ValueError if the rows of an arena are no whole multiple of what a GPU reads at once.
    """

    def __init__(self, scratch: Arena, num_heads: int, num_rows: int, max_tiles: int) -> None:
        shape = scratch.shape
        if shape.num_kv_heads * shape.head_dim % 8:
            raise ValueError(f"rows of {shape.num_kv_heads} x {shape.head_dim} numbers are not aligned")
        self._scratch = scratch
        self._shape = shape
        self._num_heads = num_heads
        self._rows_per_tile = min(ROWS_PER_TILE, _power_of_2(num_rows))
        self.max_tiles = max_tiles
        self._memory_splits = _num_splits(shape, num_rows, self._rows_per_tile)
        self._num_splits = self._memory_splits + _OWN_SPLITS
        self._num_stages = _num_stages(shape)
        device = shape.layer_devices[0]
        self._partial_out = torch.empty(num_rows, num_heads, self._num_splits, shape.head_dim, device=device)
        self._partial_lse = torch.empty(num_rows, num_heads, self._num_splits, device=device)

    @property
    def table_size(self) -> int:
        """Numbers that the tables take."""
        return self.max_tiles * (_TABLE + 2 * self._rows_per_tile)

    def write_tables(self, rows: Sequence[Row], out: np.ndarray) -> None:
        """Write the tables of these rows into out (table_size,)."""
        num, width = self.max_tiles, self._rows_per_tile
        table, places, lengths = np.split(out, [num * _TABLE, num * (_TABLE + width)])
        table, places, lengths = table.reshape(num, _TABLE), places.reshape(num, width), lengths.reshape(num, width)
        table[:], places[:], lengths[:] = 0, -1, 0
        for number, tile in enumerate(_tiles(rows, width)):
            assert number < num, f"more than {num} tiles for {len(rows)} rows"
            table[number] = self._addresses(tile)
            places[number, : len(tile.rows)] = tile.rows
            lengths[number, : len(tile.rows)] = tile.lengths

    def _addresses(self, tile: _Tile) -> tuple[int, int, int, int, int]:
        """Key and value offsets from the scratch in elements, the stride between layers, and the tile's splits."""
        arena, start = tile.first.arena, tile.first.start
        row = self._shape.num_kv_heads * self._shape.head_dim
        base, size = self._scratch.keys[0].data_ptr(), self._shape.dtype.itemsize
        key, value = ((t[0].data_ptr() - base) // size + start * row for t in (arena.keys, arena.values))
        first, num = (self._memory_splits, _OWN_SPLITS) if tile.is_own else (0, self._memory_splits)
        return key, value, arena.layer_stride, first, num

    def attend(self, layer: int, query: Tensor, tables: Tensor, scale: float) -> Tensor:
        """Attention of query (num_rows, heads, head_dim), contiguous, by tables (table_size,); needs Triton."""
        kernels: Any = importlib.import_module(".split_kv_kernels", __package__)
        shape, num, width = self._shape, self.max_tiles, self._rows_per_tile
        table, places, lengths = tables.split([num * _TABLE, num * width, num * width])
        out = torch.empty_like(query)
        block_d = max(16, _power_of_2(shape.head_dim))
        is_wide = shape.dtype == torch.float32
        kernels.attend_splits[(num, shape.num_kv_heads, self._memory_splits)](
            query,
            self._scratch.keys[0],
            table,
            places,
            lengths,
            self._partial_out,
            self._partial_lse,
            layer,
            scale * math.log2(math.e),
            NUM_HEADS=self._num_heads,
            NUM_KV_HEADS=shape.num_kv_heads,
            NUM_SPLITS=self._num_splits,
            HEAD_DIM=shape.head_dim,
            ROWS=width,
            BLOCK_M=max(16, _power_of_2(width * self._num_heads // shape.num_kv_heads)),
            BLOCK_N=32 if is_wide else 64,
            BLOCK_D=block_d,
            PRECISION="ieee" if is_wide else "tf32",
            num_warps=4,
            num_stages=self._num_stages,
        )
        kernels.merge_splits[(query.shape[0] * self._num_heads, block_d // _MERGED_WIDTH)](
            self._partial_out,
            self._partial_lse,
            out,
            NUM_SPLITS=self._num_splits,
            HEAD_DIM=shape.head_dim,
            BLOCK_S=64,
            BLOCK_D=_MERGED_WIDTH,
            num_warps=4,
        )
        return out

    def put_rotated(
        self, layer: int, qkv: Tensor, cos: Tensor, sin: Tensor, weights: AttentionWeights, places: Tensor
    ) -> Tensor:
        """Queries (num_rows, heads, head_dim) of qkv, the products without their bias; needs Triton.

        As `language.rotate`; keys and values are written to the rows `places` (num_rows,) of the scratch. cos, sin
        (num_rows, 1, head_dim).
        """
        kernels: Any = importlib.import_module(".split_kv_kernels", __package__)
        num_rows, num_heads, shape = len(qkv), self._num_heads, self._shape
        query = qkv.new_empty(num_rows, num_heads, shape.head_dim)
        kernels.put_rotated[(num_rows, num_heads + 2 * shape.num_kv_heads)](
            qkv.contiguous(),
            qkv if weights.qkv_bias is None else weights.qkv_bias,
            qkv if weights.query_norm is None else weights.query_norm,
            qkv if weights.key_norm is None else weights.key_norm,
            cos.contiguous(),
            sin.contiguous(),
            query,
            self._scratch.keys[layer],
            self._scratch.values[layer],
            places,
            weights.eps,
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=shape.num_kv_heads,
            HEAD_DIM=shape.head_dim,
            HAS_BIAS=weights.qkv_bias is not None,
            HAS_NORM=weights.query_norm is not None,
            BLOCK_D=_power_of_2(shape.head_dim),
            num_warps=1,
        )
        return query


def attend_rows(layer: int, query: Tensor, rows: Sequence[Row], scale: float) -> Tensor:
    """The same in plain torch, row by row, in float32; query (num_rows, heads, head_dim)."""
    out = torch.empty_like(query)
    for number, row in enumerate(rows):
        parts = [extent.rows(layer) for extent in (row.memory, row.own)]
        key, value = (torch.cat(part).float() for part in zip(*parts, strict=True))
        group = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(group, dim=1) for part in (key, value))
        weights = (torch.einsum("hd,nhd->hn", query[number].float(), key) * scale).softmax(-1)
        out[number] = torch.einsum("hn,nhd->hd", weights, value).to(out.dtype)
    return out


def _tiles(rows: Sequence[Row], width: int) -> Iterator[_Tile]:
    """Tiles of at most `width` rows over the memories, then over the rows' own storage."""
    for is_own in (False, True):
        together: dict[tuple[int, int], list[int]] = {}
        seen = [row.own if is_own else row.memory for row in rows]
        for number, extent in enumerate(seen):
            together.setdefault((id(extent.arena), extent.start), []).append(number)
        for numbers in together.values():
            for at in range(0, len(numbers), width):
                some = numbers[at : at + width]
                yield _Tile(seen[some[0]], some, [seen[number].num_tokens for number in some], is_own)


def _num_splits(shape: KVShape, num_rows: int, rows_per_tile: int) -> int:
    """Splits of a memory's keys such that one stream's tiles fill the card about twice."""
    device = shape.layer_devices[0]
    num_cores = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    programs = shape.num_kv_heads * -(-num_rows // rows_per_tile)
    return max(_OWN_SPLITS, min(_MAX_SPLITS, _power_of_2(2 * num_cores // programs)))


def _num_stages(shape: KVShape) -> int:
    """Blocks of keys and values on their way at once: as many as the card's shared memory holds."""
    device = shape.layer_devices[0]
    if device.type != "cuda" or shape.dtype == torch.float32:
        return 2
    shared_bytes = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)
    return 3 if shared_bytes >= _LARGE_SHARED_BYTES else 2


def _power_of_2(n: int) -> int:
    """The smallest power of two that is no smaller."""
    return 1 << max(0, n - 1).bit_length()
