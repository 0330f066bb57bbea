import gc
import weakref
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from checkpoints import FAMILIES, Checkpoints, DirectedModel, are_equal, arena, chunk, memory, rows
from msgspec import UNSET

from onlooker.node.chunk import Chunk, ChunkRefused
from onlooker.node.layout import LAYOUTS, LayoutState, Patches
from onlooker.node.memory import Addition, StreamMemory, append_together
from onlooker.node.model import VisionLanguageModel
from onlooker.node.options import StreamOptions
from onlooker.node.passes import Prefill


def next_logits(model: VisionLanguageModel, stream: StreamMemory) -> torch.Tensor:
    question = stream.layout.question(stream.now.layout, "What do you see?")
    return model.logits(model.read(question, Prefill([stream.extent(stream.now)])))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_chunk_adds_its_span_and_moves_nothing(checkpoints: Checkpoints, family: str, layout: str):
    model = checkpoints.model(family)
    factor = model.geometry.factor
    stream = memory(model, layout=layout)
    before: list[torch.Tensor] = []
    state, num_tokens = LayoutState(), 0
    for first_seq in (0, 2, 4):
        new = chunk(first_seq, factor=factor)
        encoded = stream.append(new)
        times = tuple(picture.stream_ns for picture in new.pictures)
        span, state = stream.layout.extend(state, Patches(2, 3, ((times[0], times[1]),)))
        num_tokens += len(span)
        assert encoded.num_tokens == len(span) and stream.now.num_tokens == num_tokens
        assert stream.now.layout == state
        now = rows(stream)
        assert are_equal([tensor[: len(old)] for tensor, old in zip(now, before or now, strict=True)], before or now)
        assert all(tensor.isfinite().all() for tensor in now)
        before = now


@pytest.mark.parametrize("family", FAMILIES)
def test_frames_that_differ_are_remembered_differently(checkpoints: Checkpoints, family: str):
    model = checkpoints.model(family)
    streams = [memory(model), memory(model)]
    for first_seq, stream in zip((0, 100), streams, strict=True):
        stream.append(chunk(first_seq, factor=model.geometry.factor))
    assert (next_logits(model, streams[0])[-1] - next_logits(model, streams[1])[-1]).abs().max() > 1e-2


def test_the_size_as_encoded_and_the_times_are_reported(model: DirectedModel):
    encoded = memory(model).append(chunk(grid=(2, 3)))
    assert encoded.encoded_size == (84, 56)
    assert min(encoded.preprocess_ms, encoded.vision_ms, encoded.prefill_ms) > 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_chunks_of_several_memories_are_encoded_together_as_each_by_itself(
    checkpoints: Checkpoints, family: str, layout: str
):
    model = checkpoints.model(family)
    factor, drop = model.geometry.factor, 0.9
    pairs = [[memory(model, layout=layout, drop=drop if i == 1 else None) for _ in range(2)] for i in range(3)]
    alone, together = zip(*pairs, strict=True)
    for number, stream in enumerate((*alone, *together)):
        for first_seq in range(0, 2 * (number % 3), 2):
            stream.append(chunk(first_seq, factor=factor))
    new = [chunk(20 + 4 * i, 2 if i else 4, factor=factor) for i in range(3)]
    apart = [stream.append(each) for stream, each in zip(alone, new, strict=True)]
    encoded = append_together([Addition(stream, stream.plan(each)) for stream, each in zip(together, new, strict=True)])
    assert [each.num_tokens for each in encoded] == [each.num_tokens for each in apart]
    assert [each.num_dropped_tokens for each in encoded] == [each.num_dropped_tokens for each in apart]
    assert [stream.now for stream in together] == [stream.now for stream in alone]
    for mine, other in zip(alone, together, strict=True):
        for a, b in zip(rows(mine), rows(other), strict=True):
            assert (a - b).abs().max() <= 1e-5 * a.abs().max()


def test_if_chunks_encoded_together_fail_no_memory_has_its_own(model: DirectedModel):
    streams = [memory(model, drop=0.9), memory(model)]
    for stream in streams:
        stream.append(chunk(0))
    before = [(stream.now, rows(stream)) for stream in streams]
    model.fail_with = torch.OutOfMemoryError("in layer 1")
    with pytest.raises(ChunkRefused, match="no device memory"):
        append_together([Addition(stream, stream.plan(chunk(4))) for stream in streams])
    for stream, (now, held) in zip(streams, before, strict=True):
        assert stream.now == now and are_equal(rows(stream), held)
    model.fail_with = None
    for stream in streams:
        never_failed = memory(model, drop=stream.options.drop)
        for first_seq in (0, 4):
            never_failed.append(chunk(first_seq))
        stream.append(chunk(4))
        assert stream.now == never_failed.now and are_equal(rows(stream), rows(never_failed))


def test_a_plan_changes_nothing_and_what_is_appended_by_it_is_what_it_said(model: DirectedModel):
    stream, seqs = memory(model, num_tokens=50), iter(range(0, 60, 2))
    with pytest.raises(ChunkRefused, match="does not fit"):
        while True:
            new, before = chunk(next(seqs)), stream.info()
            plan = stream.plan(new)
            assert stream.info() == before
            assert stream.append(new, plan=plan).num_tokens == len(plan.span)
    assert stream.now.num_chunks > 1 and not stream.info().full
    with pytest.raises(ChunkRefused, match="does not fit"):
        stream.append(chunk(60))
    assert stream.info().full and stream.info().limit == "memory"


def test_one_giant_frame_does_not_make_the_memory_full_for_the_small_ones(model: DirectedModel):
    stream = memory(model, num_tokens=80)
    for seq in (0, 4):  # in a memory that is empty, and in one that is not
        with pytest.raises(ChunkRefused, match="does not fit"):
            stream.append(chunk(seq, grid=(12, 12)))
        assert not stream.info().full
        stream.append(chunk(seq))
        stream.append(chunk(seq + 2))


def test_an_enormous_encode_size_is_refused_before_anything_of_that_size_is_made(model: DirectedModel):
    options = StreamOptions("front", chunk_frames=2, encode_size=(10**7, 10**7), memory_bytes=1 << 20)
    stream = StreamMemory(model, options)
    with pytest.raises(ChunkRefused, match="does not fit"):  # its positions alone would take 4 TB
        stream.append(chunk(0, num=2))
    assert stream.info().num_tokens == 0


def test_the_length_that_the_model_was_trained_for_is_a_limit(model: DirectedModel):
    stream = memory(model)
    stream.append(chunk(0))
    before = arena(stream)
    hours_later = chunk(10**6)
    with pytest.raises(ChunkRefused, match="position") as refused:
        stream.append(hours_later)
    assert refused.value.reason == "memory_full" and stream.info().full
    assert are_equal(arena(stream), before)


def test_positions_used_and_left_add_up_to_what_the_model_was_trained_for(model: DirectedModel):
    stream = memory(model)
    stream.append(chunk(0))
    info = stream.info()
    assert info.positions_used == stream.now.layout.next_position > 0
    assert info.positions_left == model.max_positions - info.positions_used
    assert model.max_positions == 32768


# Failures


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_failure_in_the_middle_takes_the_chunk_back_from_every_layer(
    checkpoints: Checkpoints, family: str, layout: str
):
    model = DirectedModel(checkpoints.model(family))
    factor = model.geometry.factor
    stream, sound = memory(model, layout=layout), memory(model, layout=layout)
    for seq in (0, 2, 4):
        now = stream.now
        model.fail_with = RuntimeError("in layer 1")
        with pytest.raises(RuntimeError, match="in layer 1"):
            stream.append(chunk(seq, factor=factor))
        assert stream.now == now
        model.fail_with = None
        assert are_equal(rows(stream), rows(sound))
        stream.append(chunk(seq, factor=factor))
        sound.append(chunk(seq, factor=factor))
    assert are_equal(rows(stream), rows(sound))
    assert stream.now == sound.now
    assert torch.equal(next_logits(model, stream), next_logits(model, sound))


def test_out_of_device_memory_refuses_the_chunk(model: DirectedModel):
    stream = memory(model)
    stream.append(chunk(0))
    now, before = stream.now, rows(stream)
    model.fail_with = torch.OutOfMemoryError("no more")
    with pytest.raises(ChunkRefused, match="no more") as refused:
        stream.append(chunk(2))
    assert refused.value.reason == "out_of_memory"
    assert stream.now == now and are_equal(rows(stream), before) and not stream.info().full


def test_a_refusal_does_not_keep_the_activations_of_the_failed_pass_alive(model: DirectedModel):
    activations = []

    class Greedy(DirectedModel):
        def read(self, *args: object) -> torch.Tensor:  # type: ignore[override]
            hidden = torch.zeros(8)
            activations.append(weakref.ref(hidden))
            raise torch.OutOfMemoryError(f"no room beside {hidden.numel()} values")

    stream = memory(Greedy(model))
    with pytest.raises(ChunkRefused) as refused:
        stream.append(chunk(0))
    gc.collect()
    assert refused.value.__cause__ is not None
    assert activations[0]() is None


def test_a_sliver_of_a_frame_is_an_encode_error(model: DirectedModel):
    pictures = [replace(picture, pixels=picture.pixels[:1].repeat(300, axis=1)) for picture in chunk(0).pictures]
    stream = memory(model)
    with pytest.raises(ChunkRefused, match="longer than wide") as refused:
        stream.append(Chunk(tuple(pictures)))
    assert refused.value.reason == "encode_error" and stream.now.num_chunks == 0


def test_a_budget_below_one_token_is_refused(model: DirectedModel):
    with pytest.raises(ValueError, match="one token"):
        StreamMemory(model, StreamOptions("front", memory_bytes=model.kv_shape.bytes_per_token - 1))


# Figures


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_exact(checkpoints: Checkpoints, family: str, dtype: torch.dtype):
    model = DirectedModel(checkpoints.model(family))
    model.kv_shape = replace(model.kv_shape, dtype=dtype)
    text = model.config.text_config
    head_dim = text.hidden_size // text.num_attention_heads
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim * dtype.itemsize
    stream = StreamMemory(model, StreamOptions("front", memory_bytes=100 * per_token + per_token - 1))
    info = stream.info()
    assert info.bytes_per_token == per_token
    assert (info.capacity_tokens, info.resident_bytes, info.logical_bytes) == (100, 100 * per_token, 0)
    if dtype == torch.float32:
        stream.append(chunk(0, factor=model.geometry.factor))
        assert stream.info().logical_bytes == stream.now.num_tokens * per_token > 0
        assert stream.info().resident_bytes == 100 * per_token


def test_an_empty_memory_leaves_out_what_it_does_not_know(model: DirectedModel):
    info = memory(model).info()
    unknown = {info.seconds, info.oldest_ns, info.newest_ns, info.newest_seq, info.seconds_until_full}
    assert unknown == {UNSET}
    assert (info.num_tokens, info.num_frames, info.positions_used, info.full) == (0, 0, 0, False)


def test_the_figures_follow_the_chunks(model: DirectedModel):
    stream = memory(model)
    stream.append(chunk(3, num=4))
    stream.append(chunk(7, num=4, num_padded=1))
    info = stream.info()
    assert (info.num_chunks, info.num_frames, info.num_padded_frames) == (2, 7, 1)
    assert (info.oldest_ns, info.newest_ns, info.newest_seq) == (1_500_000_007, 4_500_000_007, 9)
    assert info.seconds == 3.0
    left = info.capacity_tokens - info.num_tokens
    per_second = sum(record.num_tokens for record in stream.ledger.records) / 3.0
    assert info.seconds_until_full == pytest.approx(left / per_second)
    assert info.seconds_of_memory == pytest.approx((info.capacity_tokens - stream.now.num_anchor) / per_second)


def test_a_memory_whose_positions_end_first_says_when_and_then_that_it_was_they(model: DirectedModel):
    stream = memory(model)
    stream.append(chunk(0))
    model.config = deepcopy(model.config)
    model.config.text_config.max_position_embeddings = stream.now.layout.next_position + 6
    stream.append(chunk(2))
    info = stream.info()
    left = info.positions_left
    assert left is not UNSET and info.seconds_until_full == pytest.approx(left / 2)  # 2 positions a second
    seq = 4
    with pytest.raises(ChunkRefused):
        while seq < 40:
            stream.append(chunk(seq))
            seq += 2
    assert (stream.info().full, stream.info().limit) == (True, "positions")
    stream.reset()
    assert stream.info().limit is UNSET


# Marks and sizes


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_memory_rolled_back_goes_on_as_if_the_rest_had_never_been(checkpoints: Checkpoints, family: str):
    model = checkpoints.model(family)
    factor = model.geometry.factor
    stream, never = memory(model), memory(model)
    for each in (stream, never):
        each.append(chunk(0, factor=factor))
    stream.mark("here")
    stream.append(chunk(50, grid=(3, 3), factor=factor))
    stream.append(chunk(60, num=1, factor=factor))
    stream.rollback("here")
    assert stream.now == never.now
    for each in (stream, never):
        each.append(chunk(2, factor=factor))
    assert are_equal(rows(stream), rows(never))


def test_a_memory_that_was_reset_is_like_a_new_one(model: DirectedModel):
    stream, new = memory(model), memory(model)
    stream.append(chunk(50, num=8))
    stream.mark("here")
    stream.reset()
    assert stream.info() == new.info() and not stream.ledger.marks
    for each in (stream, new):
        each.append(chunk(0))
    assert are_equal(rows(stream), rows(new)) and stream.info() == new.info()


def test_a_new_frame_size_is_a_new_video_segment(model: DirectedModel):
    stream = memory(model)
    stream.append(chunk(0, grid=(2, 3)))
    encoded = stream.append(chunk(2, grid=(3, 4)))
    assert encoded.num_tokens == 2 + 12 and encoded.encoded_size == (112, 84)
    assert stream.append(chunk(4, grid=(3, 4))).num_tokens == 12


@pytest.mark.parametrize("chunk_frames", [1, 2, 4])
def test_the_encode_size_does_not_depend_on_the_chunk_size(model: DirectedModel, chunk_frames: int):
    options = StreamOptions("front", chunk_frames=chunk_frames, max_pixels=4 * 28 * 28)
    big = chunk(0, chunk_frames, grid=(9, 9))
    assert StreamMemory(model, options).append(big).encoded_size == (56, 56)


def test_an_explicit_encode_size_is_kept_whatever_comes(model: DirectedModel):
    stream = StreamMemory(model, StreamOptions("front", encode_size=(84, 56)))
    assert [stream.append(chunk(2 * i, grid=grid)).encoded_size for i, grid in enumerate([(2, 3), (9, 1), (1, 1)])] == [
        (84, 56)
    ] * 3
