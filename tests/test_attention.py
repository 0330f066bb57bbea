import pytest
import torch
from torch import Tensor

from onlooker.node import attention
from onlooker.node.attention import (
    Partial,
    attend_causal,
    attend_ragged,
    attend_recent,
    attend_shared,
    grouped,
    merge,
    reads_recent,
)

KV_HEADS, GROUP, HEAD_DIM = 2, 3, 16
SCALE = 0.31

HEADS = [(1, 1), (2, 1), (1, 4), (2, 3)]  # K/V heads, query heads for each


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def reference(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Attention in float64 over a mask, with K and V repeated, (batch, heads, n, head_dim), and its log-sum-exp.

    key, value (batch, kv_len, kv_heads, head_dim); visible (batch, n, kv_len).
    """
    repeats = query.shape[1] // key.shape[2]
    key, value = (x.double().transpose(1, 2).repeat_interleave(repeats, dim=1) for x in (key, value))
    scores = query.double() @ key.transpose(-1, -2) * SCALE
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


def assert_close(partial: Partial, expected: tuple[Tensor, Tensor], bound: float = 1e-6) -> None:
    assert distance(partial.out.flatten(1, 2), expected[0]) <= bound
    assert distance(partial.lse.flatten(1, 2), expected[1]) <= bound * 4
    assert partial.lse.dtype == torch.float32


@pytest.mark.parametrize(("kv_heads", "group"), HEADS)
@pytest.mark.parametrize(("batch", "q_len", "kv_len"), [(1, 1, 1), (1, 5, 7), (3, 1, 33), (3, 4, 130)])
def test_every_row_sees_the_whole_shared_segment(batch: int, q_len: int, kv_len: int, kv_heads: int, group: int):
    query = rand(batch, kv_heads * group, q_len, HEAD_DIM)
    key, value = rand(kv_len, kv_heads, HEAD_DIM, seed=1), rand(kv_len, kv_heads, HEAD_DIM, seed=2)
    everything = torch.ones(batch, q_len, kv_len, dtype=torch.bool)
    expected = reference(query, key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1), everything)
    assert_close(attend_shared(grouped(query, kv_heads), key, value, SCALE), expected)


@pytest.mark.parametrize(("kv_heads", "group"), HEADS)
@pytest.mark.parametrize(("batch", "n"), [(1, 1), (1, 70), (3, 9)])
def test_new_tokens_see_themselves_and_those_before_them(batch: int, n: int, kv_heads: int, group: int):
    query = rand(batch, kv_heads * group, n, HEAD_DIM)
    key, value = rand(batch, kv_heads, n, HEAD_DIM, seed=1), rand(batch, kv_heads, n, HEAD_DIM, seed=2)
    past = torch.ones(n, n, dtype=torch.bool).tril().expand(batch, -1, -1)
    expected = reference(query, key.transpose(1, 2), value.transpose(1, 2), past)
    assert_close(attend_causal(grouped(query, kv_heads), key, value, SCALE), expected)


@pytest.mark.parametrize(("kv_heads", "group"), HEADS)
@pytest.mark.parametrize(("num_past", "num_new"), [(0, 1), (0, 9), (1, 4), (40, 1), (33, 70)])
def test_the_newest_tokens_see_what_was_before_them_and_each_other(
    num_past: int, num_new: int, kv_heads: int, group: int
):
    query = rand(1, kv_heads * group, num_new, HEAD_DIM)
    key, value = (rand(num_past + num_new, kv_heads, HEAD_DIM, seed=seed) for seed in (1, 2))
    visible = torch.ones(num_new, num_past + num_new, dtype=torch.bool).tril(num_past)[None]
    expected = reference(query, key[None], value[None], visible)[0].transpose(1, 2)
    assert distance(merge(attend_recent(grouped(query, kv_heads), key, value, SCALE)), expected) <= 1e-6


@pytest.mark.parametrize(("first_sees", "is_so"), [(2, True), (1, False), (3, False)])
def test_a_kernel_that_counts_causality_from_the_start_is_found_out(first_sees: int, is_so: bool):
    def kernel(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        assert causal
        num_new, num_keys = query.shape[2], key.shape[2]
        visible = torch.ones(num_new, num_keys, dtype=torch.bool).tril(first_sees - 1)
        scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~visible, float("-inf"))
        return scores.softmax(-1) @ value, scores.logsumexp(-1)

    assert reads_recent(kernel, torch.device("cpu"), torch.float32) == is_so


@pytest.mark.parametrize(("kv_heads", "group"), HEADS)
@pytest.mark.parametrize("lengths", [[1], [5], [1, 1], [1, 4, 2, 5]])
def test_each_row_sees_as_many_of_its_own_tokens_as_it_has(lengths: list[int], kv_heads: int, group: int):
    batch, longest = len(lengths), max(lengths)
    query = rand(batch, kv_heads * group, 1, HEAD_DIM)
    key, value = rand(batch, longest, kv_heads, HEAD_DIM, seed=1), rand(batch, longest, kv_heads, HEAD_DIM, seed=2)
    visible = torch.arange(longest) < torch.tensor(lengths)[:, None]
    expected = reference(query, key, value, visible[:, None])
    for x in (key, value):
        x[~visible] = float("nan")  # rows that were never written hold anything
    assert_close(attend_ragged(grouped(query, kv_heads), key, value, torch.tensor(lengths), SCALE), expected)


@pytest.mark.parametrize("num_new", [1, 4])
def test_wherever_the_past_is_split_the_merge_is_attention_over_all_of_it(num_new: int):
    num_past = 9
    query = rand(1, KV_HEADS * GROUP, num_new, HEAD_DIM)
    key, value = (rand(num_past + num_new, KV_HEADS, HEAD_DIM, seed=seed) for seed in (1, 2))
    visible = torch.ones(num_new, num_past + num_new, dtype=torch.bool).tril(num_past)[None]
    expected = reference(query, key[None], value[None], visible)[0].transpose(1, 2)
    query = grouped(query, KV_HEADS)
    new_key, new_value = (x[num_past:].transpose(0, 1)[None] for x in (key, value))
    own = attend_causal(query, new_key, new_value, SCALE)
    for first in range(num_past + 1):
        for second in range(first, num_past + 1):
            bounds = [(0, first), (first, second), (second, num_past)]
            past = [attend_shared(query, key[a:b], value[a:b], SCALE) for a, b in bounds if b > a]
            assert distance(merge([*past, own]), expected) <= 1e-6, (first, second)
            assert distance(merge([own, *reversed(past)]), expected) <= 1e-6, (first, second)


def test_a_row_that_sees_nothing_of_a_segment_gives_it_no_weight():
    query = grouped(rand(2, KV_HEADS * GROUP, 1, HEAD_DIM), KV_HEADS)
    key, value = rand(2, KV_HEADS, 1, HEAD_DIM, seed=1), rand(2, KV_HEADS, 1, HEAD_DIM, seed=2)
    own = attend_causal(query, key, value, SCALE)
    nothing = Partial(torch.zeros_like(own.out), torch.full_like(own.lse, float("-inf")))
    assert torch.equal(merge([own, nothing]), merge([own]))


def test_huge_scores_do_not_overflow_the_merge():
    query = grouped(rand(1, KV_HEADS * GROUP, 1, HEAD_DIM), KV_HEADS) * 1e3
    key, value = rand(6, KV_HEADS, HEAD_DIM, seed=1), rand(6, KV_HEADS, HEAD_DIM, seed=2)
    whole = merge([attend_shared(query, key, value, SCALE)])
    parts = [attend_shared(query, key[a:b], value[a:b], SCALE) for a, b in ((0, 3), (3, 6))]
    assert distance(merge(parts), whole) <= 1e-5


def test_bfloat16_parts_stay_within_a_hundredth_of_exact_attention():
    num_past, num_new = 200, 8
    query = rand(1, KV_HEADS * GROUP, num_new, HEAD_DIM, dtype=torch.bfloat16)
    key, value = (rand(num_past + num_new, KV_HEADS, HEAD_DIM, seed=s, dtype=torch.bfloat16) for s in (1, 2))
    visible = torch.ones(num_new, num_past + num_new, dtype=torch.bool).tril(num_past)[None]
    expected = reference(query, key[None], value[None], visible)[0].transpose(1, 2)
    query = grouped(query, KV_HEADS)
    new_key, new_value = (x[num_past:].transpose(0, 1)[None] for x in (key, value))
    parts = [attend_shared(query, key[a:b], value[a:b], SCALE) for a, b in ((0, 64), (64, num_past))]
    merged = merge([*parts, attend_causal(query, new_key, new_value, SCALE)])
    assert merged.dtype == torch.bfloat16
    assert distance(merged, expected) <= 1e-2


def test_a_float32_query_row_is_the_same_alone_and_among_others():
    query = rand(4, KV_HEADS * GROUP, 1, HEAD_DIM)
    key, value = rand(50, KV_HEADS, HEAD_DIM, seed=1), rand(50, KV_HEADS, HEAD_DIM, seed=2)
    together = merge([attend_shared(grouped(query, KV_HEADS), key, value, SCALE)])
    for row in range(4):
        alone = merge([attend_shared(grouped(query[row : row + 1], KV_HEADS), key, value, SCALE)])
        assert distance(alone[0], together[row]) <= 1e-6


@pytest.mark.parametrize("num_past", [0, 1, 16, 87])
def test_a_past_by_pieces_is_attended_to_as_a_whole(monkeypatch: pytest.MonkeyPatch, num_past: int):
    monkeypatch.setattr(attention, "PIECES", ((8, 4), (8, 1), (2, 2), (2, 1)))
    monkeypatch.setattr(attention, "_TILE", 4)
    calls: list[tuple[int, ...]] = []

    def kernel(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        calls.append((len(key), key.shape[2], query.shape[2]))
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        return attention._unfused(query, key, value, causal, scale)

    num_new = 5
    query = rand(1, KV_HEADS * GROUP, num_new, HEAD_DIM)
    key, value = (rand(num_past + num_new, KV_HEADS, HEAD_DIM, seed=seed) for seed in (1, 2))
    visible = torch.ones(num_new, num_past + num_new, dtype=torch.bool).tril(num_past)[None]
    expected = reference(query, key[None], value[None], visible)[0].transpose(1, 2)
    partials = attention._attend_by_pieces(kernel, grouped(query, KV_HEADS), key, value, SCALE)
    assert distance(merge(partials), expected) <= 1e-6
    assert calls[:4] == [(4, 8, 8), (1, 8, 8), (2, 2, 8), (1, 2, 8)], "all are built for at once, for whole tiles"
    if num_past == 87:
        some = [(4, 8), (4, 8), (1, 8), (1, 8), (2, 2), (1, 2), (1, 8)]
        assert calls[4:] == [(*each, 8) for each in some]
    num_calls = len(calls)
    attention._attend_by_pieces(kernel, grouped(query, KV_HEADS), key, value, SCALE)
    assert calls[num_calls:] == calls[4:num_calls], "nothing is built for anew"
    assert len(partials) <= attention.MAX_PARTIALS
