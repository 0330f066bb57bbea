from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from onlooker.node.arena import Arena, Extent, KVShape
from onlooker.node.attention import attend_causal, grouped, merge
from onlooker.node.passes import DecodeStep, Place, Prefill

KV_HEADS, HEADS, HEAD_DIM, LAYERS = 2, 6, 16, 2
SCALE = 0.25
DEVICES = (torch.device("cpu"),) * LAYERS
SLOT = 8

# (stream, what it sees of it, its own tokens with the one that this step writes)
CASES = {
    "one answer": [(0, 20, 3)],
    "answers of different lengths": [(0, 20, 3), (0, 20, 8), (0, 20, 1)],
    "one stream asked at different lengths": [(0, 20, 2), (0, 31, 4), (0, 25, 1), (0, 31, 2)],
    "two streams at once": [(0, 20, 2), (1, 7, 4), (0, 20, 5), (1, 7, 1)],
    "two streams at different lengths": [(1, 9, 2), (0, 20, 4), (1, 7, 1), (0, 33, 8), (0, 20, 1)],
    "a memory of nothing": [(0, 0, 3), (0, 0, 1)],
    "a memory of nothing among others": [(0, 20, 3), (0, 0, 5), (1, 7, 2), (0, 31, 1)],
    "a memory of one token": [(0, 1, 1), (0, 2, 1)],
}


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def arena(capacity: int, seed: int, dtype: torch.dtype = torch.float32) -> Arena:
    whole = Arena(KVShape(KV_HEADS, HEAD_DIM, dtype, DEVICES), capacity)
    for i, tensor in enumerate((*whole.keys, *whole.values)):
        tensor.copy_(rand(*tensor.shape, seed=seed + i))
    return whole


class Table:
    """Two streams, and a scratch whose free rows hold garbage."""

    def __init__(self, case: Sequence[tuple[int, int, int]], dtype: torch.dtype = torch.float32) -> None:
        self.streams = [arena(40, seed=10, dtype=dtype), arena(12, seed=20, dtype=dtype)]
        self.scratch = arena(SLOT * 6, seed=30, dtype=dtype)
        self.places = []
        for i, (stream, seen, own) in enumerate(case):
            slot = (5 - i) * SLOT  # the last slot of the scratch is in use: its end is the arena's end
            for tensor in (*self.scratch.keys, *self.scratch.values):
                tensor[slot + own - 1 : slot + SLOT] = float("nan")
            place = Place(self.streams[stream].extent(0, seen), self.scratch.extent(slot, slot + own))
            self.places.append(place)
        self.query = rand(len(case), HEADS, 1, HEAD_DIM, seed=1).to(dtype)
        self.key = rand(len(case), KV_HEADS, 1, HEAD_DIM, seed=2).to(dtype)
        self.value = rand(len(case), KV_HEADS, 1, HEAD_DIM, seed=3).to(dtype)

    def step(self, indexes: Sequence[int], layer: int = 1) -> Tensor:
        rows = list(indexes)
        step = DecodeStep([self.places[i] for i in rows])
        return step.attend(layer, self.query[rows], self.key[rows], self.value[rows], SCALE)

    def expected(self, i: int, layer: int = 1) -> Tensor:
        """Attention of one answer over all it sees, in float64, (1, heads, head_dim)."""
        memory, own, aside = self.places[i]
        parts = [
            *(extent.rows(layer) for extent in (memory, *aside)),
            Extent(own.arena, own.start, own.stop - 1).rows(layer),
        ]
        newest = self.key[i].transpose(0, 1), self.value[i].transpose(0, 1)
        key, value = (torch.cat(x).double().transpose(0, 1) for x in zip(*parts, newest, strict=True))
        key, value = (x.repeat_interleave(HEADS // KV_HEADS, dim=0) for x in (key, value))
        scores = self.query[i].double() @ key.transpose(-1, -2) * SCALE
        return (scores.softmax(-1) @ value).transpose(0, 1)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_answers_decoded_together_equal_each_by_itself(case: list[tuple[int, int, int]]):
    table = Table(case)
    together = table.step(range(len(case)))
    assert together.shape == (len(case), 1, HEADS, HEAD_DIM)
    for i in range(len(case)):
        assert (together[i] - Table(case).step([i])[0]).abs().max() <= 1e-5
        assert (together[i] - table.expected(i)).abs().max() <= 1e-5


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_order_of_the_answers_is_kept(case: list[tuple[int, int, int]]):
    forward = Table(case).step(range(len(case)))
    backward = Table(case).step(range(len(case) - 1, -1, -1))
    assert (forward - backward.flip(0)).abs().max() <= 1e-5


def test_an_answer_sees_what_was_put_aside_for_it_as_well():
    table = Table([(0, 10, 1), (0, 10, 3), (0, 14, 2), (1, 5, 2)])
    stream = table.streams[0]
    for i, aside in enumerate([(stream.extent(30, 34),), (stream.extent(24, 27), stream.extent(30, 32))]):
        table.places[i] = table.places[i]._replace(aside=aside)
    together = table.step(range(4))
    for i in range(4):
        assert (together[i] - table.expected(i)).abs().max() <= 1e-5


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_in_bfloat16_a_step_is_within_a_hundredth_of_exact_attention(case: list[tuple[int, int, int]]):
    table = Table(case, torch.bfloat16)
    together = table.step(range(len(case)))
    assert together.dtype == torch.bfloat16
    for i in range(len(case)):
        assert (together[i] - table.expected(i)).abs().max() <= 2e-2


def test_a_step_writes_the_newest_row_of_each_answer_and_no_other():
    case = CASES["two streams at different lengths"]
    table = Table(case)
    tensors = [t for whole in (*table.streams, table.scratch) for t in (*whole.keys, *whole.values)]
    before = [tensor.clone() for tensor in tensors]
    table.step(range(len(case)), layer=1)
    newest = [place.own.stop - 1 for place in table.places]
    for now, then in zip(tensors, before, strict=True):
        changed = (now.view(torch.int32) != then.view(torch.int32)).any(-1).any(-1).nonzero().flatten().tolist()
        is_written = now is table.scratch.keys[1] or now is table.scratch.values[1]
        assert changed == (sorted(newest) if is_written else [])
    assert torch.equal(table.scratch.keys[1][newest], table.key[:, :, 0])
    assert torch.equal(table.scratch.values[1][newest], table.value[:, :, 0])


def test_a_prefill_sees_its_extents_and_itself_and_is_written_after_them():
    past, n = arena(20, seed=10), 4
    other = arena(6, seed=40)
    query, key, value = (rand(1, heads, n, HEAD_DIM, seed=heads) for heads in (HEADS, KV_HEADS, KV_HEADS))
    reads = [past.extent(0, 11), other.extent(2, 5)]
    out = Prefill(reads, (past, 11)).attend(0, query, key, value, SCALE)
    assert torch.equal(past.keys[0][11:15], key[0].transpose(0, 1))
    keys, values = (
        torch.cat([*(extent.rows(0)[i] for extent in reads), past.extent(11, 15).rows(0)[i]]) for i in (0, 1)
    )
    visible = torch.ones(n, 14 + n, dtype=torch.bool).tril(14)
    keys, values = (x.double().transpose(0, 1).repeat_interleave(HEADS // KV_HEADS, dim=0) for x in (keys, values))
    scores = (query[0].double() @ keys.transpose(-1, -2) * SCALE).masked_fill(~visible, float("-inf"))
    assert (out[0] - (scores.softmax(-1) @ values).transpose(0, 1)).abs().max() <= 1e-5


def test_a_prefill_reads_no_row_of_an_empty_extent():
    query, key, value = (rand(1, heads, 3, HEAD_DIM, seed=heads) for heads in (HEADS, KV_HEADS, KV_HEADS))
    alone = Prefill([]).attend(0, query, key, value, SCALE)
    assert torch.equal(Prefill([arena(4, seed=1).extent(2, 2)]).attend(0, query, key, value, SCALE), alone)
    assert torch.equal(merge([attend_causal(grouped(query, KV_HEADS), key, value, SCALE)]), alone)


def test_a_prefill_without_a_place_writes_nothing():
    past = arena(20, seed=10)
    before = [tensor.clone() for tensor in (*past.keys, *past.values)]
    query, key, value = (rand(3, heads, 4, HEAD_DIM, seed=heads) for heads in (HEADS, KV_HEADS, KV_HEADS))
    Prefill([past.extent(0, 20)]).attend(0, query, key, value, SCALE)
    assert all(torch.equal(a, b) for a, b in zip((*past.keys, *past.values), before, strict=True))


def test_rows_of_a_batch_cannot_be_written_to_one_place():
    past = arena(20, seed=10)
    query, key, value = (rand(2, heads, 4, HEAD_DIM, seed=heads) for heads in (HEADS, KV_HEADS, KV_HEADS))
    with pytest.raises(AssertionError):
        Prefill([], (past, 0)).attend(0, query, key, value, SCALE)
