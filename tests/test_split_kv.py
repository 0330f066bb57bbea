import os
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from onlooker.node.arena import Arena, KVShape
from onlooker.node.language import AttentionWeights, rotate
from onlooker.node.split_kv import Row, SplitAttention, attend_rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Triton's own interpreter runs the kernels on the CPU, where Triton is installed and TRITON_INTERPRET=1.
needs_triton = pytest.mark.skipif(
    DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU, or Triton's interpreter"
)

LAYERS, SLOT = 2, 96

# (heads, kv_heads, head_dim)
SHAPES = [(4, 2, 16), (8, 1, 64), (6, 2, 80), (7, 1, 128), (3, 3, 64)]

# (stream, what it sees of it, slot, its own tokens with the one that this step writes)
CASES = {
    "one row": [(0, 130, 0, 3)],
    "rows of one stream at different lengths": [(0, 130, 0, 3), (0, 64, 1, 70), (0, 1, 2, 1)],
    "rows of two streams": [(0, 100, 0, 2), (1, 33, 1, 4), (0, 130, 2, 65), (1, 7, 3, 1)],
    "a memory of nothing": [(0, 0, 0, 3), (0, 0, 1, 1)],
    "a memory of nothing among others": [(0, 20, 0, 3), (0, 0, 1, 5), (1, 40, 2, 1)],
    "a question of several tokens": [(0, 129, 1, 5 + i) for i in range(11)],
}


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def arena(shape: KVShape, capacity: int, seed: int) -> Arena:
    whole = Arena(shape, capacity)
    for i, tensor in enumerate((*whole.keys, *whole.values)):
        tensor.copy_(rand(*tensor.shape, seed=seed + i))
    return whole


class Table:
    """Two streams and a scratch; what lies beyond what any row sees is not a number."""

    def __init__(self, case: Sequence[tuple[int, int, int, int]], heads: tuple[int, int, int], dtype: torch.dtype):
        num_heads, kv_heads, head_dim = heads
        shape = KVShape(kv_heads, head_dim, dtype, (DEVICE,) * LAYERS)
        self.streams = [arena(shape, 140, seed=10), arena(shape, 50, seed=20)]
        self.scratch = arena(shape, 4 * SLOT, seed=30)
        self._forget(self.streams[0], [(0, seen) for stream, seen, _, _ in case if stream == 0])
        self._forget(self.streams[1], [(0, seen) for stream, seen, _, _ in case if stream == 1])
        self._forget(self.scratch, [(slot * SLOT, slot * SLOT + own) for _, _, slot, own in case])
        self.rows = [
            Row(0, 0, self.streams[stream].extent(0, seen), self.scratch.extent(slot * SLOT, slot * SLOT + own))
            for stream, seen, slot, own in case
        ]
        self.attention = SplitAttention(self.scratch, num_heads, len(case), max_tiles=2 * len(case))
        self.query = rand(len(case), num_heads, head_dim, seed=1).to(DEVICE, dtype)

    @staticmethod
    def _forget(whole: Arena, seen: list[tuple[int, int]]) -> None:
        is_seen = torch.zeros(whole.capacity, dtype=torch.bool, device=DEVICE)
        for start, stop in seen:
            is_seen[start:stop] = True
        for tensor in (*whole.keys, *whole.values):
            tensor[~is_seen] = float("nan")

    def tables(self) -> Tensor:
        host = np.zeros(self.attention.table_size, np.int64)
        self.attention.write_tables(self.rows, host)
        return torch.from_numpy(host).to(DEVICE)


@needs_triton
@pytest.mark.parametrize("heads", SHAPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_kernels_give_what_plain_torch_gives(case: list[tuple[int, int, int, int]], heads: tuple[int, int, int]):
    table = Table(case, heads, torch.float32)
    out = table.attention.attend(1, table.query, table.tables(), 0.3)
    assert (out - attend_rows(1, table.query, table.rows, 0.3)).abs().max() <= 1e-5


@needs_triton
def test_a_step_finds_nothing_of_the_step_before_it():
    heads = SHAPES[0]
    table, other = (Table(CASES[case], heads, torch.float32) for case in ("one row", "a memory of nothing"))
    table.attention.attend(0, table.query, table.tables(), 0.3)
    table.rows = [table.rows[0]._replace(memory=other.streams[0].extent(0, 0))]
    out = table.attention.attend(0, table.query, table.tables(), 0.3)
    assert (out - attend_rows(0, table.query, table.rows, 0.3)).abs().max() <= 1e-5


@needs_triton
@pytest.mark.skipif(DEVICE.type == "cpu", reason="the interpreter knows no bfloat16 product")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_in_bfloat16_the_kernels_are_within_a_hundredth(case: list[tuple[int, int, int, int]]):
    table = Table(case, (16, 2, 128), torch.bfloat16)
    out = table.attention.attend(1, table.query, table.tables(), 0.09)
    assert (out - attend_rows(1, table.query, table.rows, 0.09)).abs().max() <= 2e-2


@needs_triton
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("heads", SHAPES)
def test_rotated_rows_are_where_they_belong(heads: tuple[int, int, int], has_bias: bool, has_norm: bool):
    num_heads, kv_heads, head_dim = heads
    table, places = Table(CASES["rows of two streams"], heads, torch.float32), [7, 130, 2, 383]
    num_all = num_heads + 2 * kv_heads
    qkv, bias, cos, sin = (
        rand(*shape, seed=seed).to(DEVICE)
        for seed, shape in enumerate([(4, num_all * head_dim), (num_all * head_dim,), *[(4, 1, head_dim)] * 2])
    )
    query_norm, key_norm = (rand(head_dim, seed=seed).to(DEVICE) if has_norm else None for seed in (8, 9))
    weights = AttentionWeights(bias, bias, bias if has_bias else None, query_norm, key_norm, 1e-6, num_heads, kv_heads)
    scratch = table.scratch
    before = [tensor.clone() for tensor in (*scratch.keys, *scratch.values)]
    at = torch.tensor(places, device=DEVICE)
    query = table.attention.put_rotated(1, qkv, cos, sin, weights, at)
    expected, before[1][places], before[LAYERS + 1][places] = rotate(qkv, cos, sin, weights)
    assert (query - expected).abs().max() <= 1e-5
    for mine, wanted in zip((*scratch.keys, *scratch.values), before, strict=True):
        assert torch.allclose(mine, wanted, rtol=0, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_row_is_in_one_tile_over_its_memory_and_one_over_its_own(case: list[tuple[int, int, int, int]]):
    table = Table(case, SHAPES[0], torch.float32)
    num, width = table.attention.max_tiles, table.attention._rows_per_tile
    numbers = table.tables().tolist()
    places, lengths = numbers[num * 5 : num * (5 + width)], numbers[num * (5 + width) :]
    seen: dict[int, list[int]] = {}
    for place, length in zip(places, lengths, strict=True):
        if place >= 0:
            seen.setdefault(place, []).append(length)
    assert seen == {i: [seen, own] for i, (_, seen, _, own) in enumerate(case)}


def test_more_tiles_than_there_is_room_for_are_refused():
    table = Table(CASES["rows of two streams"], SHAPES[0], torch.float32)
    table.attention.max_tiles = 3
    with pytest.raises(AssertionError, match="more than 3 tiles"):
        table.tables()
