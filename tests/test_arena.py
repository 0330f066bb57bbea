import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onlooker.node.arena import Arena, KVShape, sampled

CPU = torch.device("cpu")


def arena(capacity: int = 64, layers: int = 3, dtype: torch.dtype = torch.float32) -> Arena:
    whole = Arena(KVShape(num_kv_heads=2, head_dim=8, dtype=dtype, layer_devices=(CPU,) * layers), capacity)
    generator = torch.Generator().manual_seed(0)
    for tensor in (*whole.keys, *whole.values):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return whole


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_bytes_are_tokens_times_bytes_per_token(dtype: torch.dtype, size: int):
    whole = arena(capacity=10, layers=3, dtype=dtype)
    assert whole.shape.bytes_per_token == 2 * 3 * 2 * 8 * size
    assert whole.logical_bytes(7) == 7 * whole.shape.bytes_per_token
    assert whole.logical_bytes(0) == 0
    assert whole.resident_bytes == 10 * whole.shape.bytes_per_token


def test_resident_bytes_count_a_shared_storage_once():
    whole = arena(capacity=10)
    whole.values = whole.keys
    assert whole.resident_bytes == 10 * whole.shape.bytes_per_token // 2


def test_rows_are_written_in_place_and_only_there():
    whole = arena()
    before = [tensor.clone() for tensor in (*whole.keys, *whole.values)]
    addresses = [tensor.data_ptr() for tensor in (*whole.keys, *whole.values)]
    key, value = torch.ones(2, 5, 8), torch.full((2, 5, 8), 2.0)
    whole.write(1, 10, key, value)
    assert torch.equal(whole.keys[1][10:15], torch.ones(5, 2, 8))
    assert torch.equal(whole.values[1][10:15], torch.full((5, 2, 8), 2.0))
    for layer, (now, then) in enumerate(zip((*whole.keys, *whole.values), before, strict=True)):
        assert torch.equal(now[:10], then[:10]) and torch.equal(now[15:], then[15:])
        if layer % 3 != 1:
            assert torch.equal(now, then)
    assert addresses == [tensor.data_ptr() for tensor in (*whole.keys, *whole.values)]


def test_an_extent_is_a_view_of_its_rows():
    whole = arena()
    extent = whole.extent(3, 9)
    key, value = extent.rows(2)
    assert extent.num_tokens == 6 and key.shape == value.shape == (6, 2, 8)
    assert key.data_ptr() == whole.keys[2][3:].data_ptr() and value.data_ptr() == whole.values[2][3:].data_ptr()


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (5, 4), (0, 65)])
def test_an_extent_outside_the_arena_is_refused(start: int, stop: int):
    with pytest.raises(AssertionError):
        arena().extent(start, stop)


def test_a_write_past_the_end_is_refused_before_anything_is_written():
    whole = arena()
    before = whole.keys[0].clone()
    with pytest.raises(AssertionError):
        whole.write(0, 62, torch.zeros(2, 3, 8), torch.zeros(2, 3, 8))
    assert torch.equal(whole.keys[0], before)


@pytest.mark.parametrize("num_tokens", [1, 2, 16, 17, 18, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fingerprint_sees_the_first_and_the_last_row_and_nothing_beyond(num_tokens: int, dtype: torch.dtype):
    whole = arena(dtype=dtype)
    before = whole.fingerprint(sampled(num_tokens))
    whole.keys[0][num_tokens:] = 0
    assert whole.fingerprint(sampled(num_tokens)) == before
    seen = {before}
    for layer in range(3):
        for tensor in (whole.keys[layer], whole.values[layer]):
            for row in {0, num_tokens - 1}:
                tensor[row, 1, 7] += 1
                seen.add(whole.fingerprint(sampled(num_tokens)))
    assert len(seen) == 1 + 3 * 2 * len({0, num_tokens - 1})


def test_an_empty_memory_has_an_empty_fingerprint():
    assert arena().fingerprint(sampled(0)) == ""


def test_memory_that_cannot_be_had_is_an_error_not_a_crash():
    with pytest.raises(RuntimeError):
        arena(capacity=1 << 56, layers=1)


@settings(max_examples=60, deadline=None)
@given(to=st.integers(0, 64), kept=st.lists(st.booleans(), min_size=64, max_size=64), num_at_once=st.integers(1, 70))
def test_rows_that_are_gathered_keep_their_bits_in_every_layer(to: int, kept: list[bool], num_at_once: int):
    whole = arena(dtype=torch.bfloat16)
    before = [tensor.clone() for tensor in (*whole.keys, *whole.values)]
    rows = np.flatnonzero(kept)
    rows = rows[rows >= to]
    whole.gather(rows, to, num_at_once)
    for now, then in zip((*whole.keys, *whole.values), before, strict=True):
        assert torch.equal(now[to : to + len(rows)], then[rows])
        assert torch.equal(now[:to], then[:to])
        assert torch.equal(now[to + len(rows) :], then[to + len(rows) :])
