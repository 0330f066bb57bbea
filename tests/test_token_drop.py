"""Tokens that say nothing new are left out, the rest is exact, and nothing stands in for what the memory has lost."""

import contextlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, FRAME_NS, Checkpoints, DirectedModel, are_equal, rows
from checkpoints import memory as any_memory
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from one_pass import OnePass, Prompt
from torch import Tensor

from onlooker.node.chunk import Chunk, ChunkRefused, Picture
from onlooker.node.layout import LAYOUTS, Span
from onlooker.node.memory import StreamMemory
from onlooker.node.model import VisionLanguageModel
from onlooker.node.passes import Prefill
from onlooker.node.retention import POLICIES
from onlooker.node.token_drop import FORGOTTEN, TokenDrop
from onlooker.node.vision import Vision

QUESTION = "What do you see?"
GRID = (2, 3)
DROP = 0.9


def memory(
    model: VisionLanguageModel, drop: float | None = DROP, num_tokens: int = 512, layout: str = "native", **options
) -> StreamMemory:
    chunk_frames = options.pop("chunk_frames", 4)
    return any_memory(model, num_tokens, layout, chunk_frames, drop=drop, **options)


def still(first_seq: int, num: int = 4, *, moving: int = 0, factor: int = 28, grid: tuple[int, int] = GRID) -> Chunk:
    """Noisy pictures of one scene, the first `moving` tokens of which are another in every pair of pictures."""
    height, width = grid[0] * factor, grid[1] * factor
    base = np.random.default_rng(1000).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pictures = []
    for seq in range(first_seq, first_seq + num):
        rng = np.random.default_rng(seq // 2)
        pixels = (base // 2 + 64 + rng.normal(0, 8, base.shape)).astype(np.uint8)
        fresh = rng.integers(0, 256, base.shape, dtype=np.uint8)
        for place in range(moving):
            row, column = divmod(place, grid[1])
            part = np.s_[row * factor : (row + 1) * factor, column * factor : (column + 1) * factor]
            pixels[part] = fresh[part]
        pictures.append(Picture(pixels, seq, seq * FRAME_NS + 7, "media", seq * FRAME_NS))
    return Chunk(tuple(pictures))


def numbers(stream: StreamMemory) -> set[int]:
    return {record.number for record in stream.ledger.records}


def standing(stream: StreamMemory) -> set[int]:
    """The chunks whose tokens stand for what is dropped."""
    drop = stream._drop
    assert drop is not None
    return set() if drop._kept is None else set(drop._kept.chunks.tolist())


def next_logits(model: VisionLanguageModel, stream: StreamMemory) -> Tensor:
    question = stream.layout.question(stream.now.layout, QUESTION)
    return model.logits(model.read(question, Prefill([stream.extent(stream.now)])))[-1]


def thinned(prompt: Prompt, drop: float, num_places: int) -> tuple[Prompt, list[float]]:
    """A prompt without its tokens that look like the last one kept at their place, one by one; and all similarities."""
    kept: dict[int, Tensor] = {}
    spans, similarities = [], []
    for span, seen in zip(prompt.spans, prompt.seen, strict=False):
        features = seen.pooler_output if isinstance(seen.pooler_output, Tensor) else torch.cat(seen.pooler_output)
        stays = []
        for patch in features.double().split(num_places):
            alike = [
                float(torch.cosine_similarity(patch[i], kept[i], dim=0)) if i in kept else -1.0
                for i in range(num_places)
            ]
            similarities += alike
            new = {i for i in range(num_places) if alike[i] <= drop} | {int(np.argmin(alike))}
            kept |= {i: patch[i] for i in new}
            stays += [i in new for i in range(num_places)]
        mask = ~span.visual
        mask[span.visual] = stays
        spans.append(Span(span.ids[mask], span.positions[:, mask], span.visual[mask], span.next_position))
        seen.pooler_output = features[stays]
        if getattr(seen, "deepstack_features", None):
            seen.deepstack_features = [layer[stays] for layer in seen.deepstack_features]
    return Prompt([*spans, prompt.spans[-1]], prompt.seen), similarities


# Exactness


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept_answers_as_one_pass_over_it_at_its_own_positions(
    checkpoints: Checkpoints, one_pass: Callable[[str], OnePass], family: str, layout: str
):
    model = checkpoints.model(family)
    stream = memory(model, layout=layout)
    chunks = [still(4 * i, moving=i % 4, factor=model.geometry.factor) for i in range(4)]
    encoded = [stream.append(chunk) for chunk in chunks]
    reference = one_pass(family)
    whole = reference.logits(reference.prompt(layout, chunks, QUESTION))[-1]
    prompt, similarities = thinned(reference.prompt(layout, chunks, QUESTION), DROP, 6)
    assert min(abs(s - DROP) for s in similarities) > 1e-4  # none is a matter of rounding
    assert stream.now.num_tokens == sum(len(span) for span in prompt.spans[:-1])
    assert 0 < sum(each.num_dropped_tokens for each in encoded) == stream.info().num_dropped_tokens < 4 * 12
    answered = next_logits(model, stream)
    assert (answered - reference.logits(prompt)[-1]).abs().max() <= 1e-5
    assert (answered - whole).abs().max() > 1e-4  # what was dropped made a difference


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_at_one_nothing_is_dropped_and_the_memory_is_the_same_bit_for_bit(checkpoints: Checkpoints, family: str):
    model = checkpoints.model(family)
    kept, plain = memory(model, 1.0), memory(model, None)
    for stream in (kept, plain):
        for i in range(3):
            assert stream.append(still(4 * i, factor=model.geometry.factor)).num_dropped_tokens == 0
    assert are_equal(rows(kept), rows(plain))


def test_later_tokens_have_the_positions_that_they_would_have_had(model: DirectedModel):
    dropping, plain = memory(model), memory(model, None)
    for i in range(5):
        dropping.append(still(4 * i))
        plain.append(still(4 * i))
        assert dropping.now.layout == plain.now.layout
    assert dropping.now.num_tokens < plain.now.num_tokens == dropping.now.num_tokens + dropping.now.num_dropped


# What is dropped


def test_of_a_still_scene_one_token_a_temporal_patch_is_left(model: DirectedModel):
    stream = memory(model)
    first = stream.append(still(0))
    second = stream.append(still(4))
    assert (first.num_dropped_tokens, second.num_dropped_tokens) == (5, 10)
    assert second.num_tokens == 2
    assert [record.num_dropped for record in stream.ledger.records] == [5, 10]


@pytest.mark.parametrize("num", [1, 2, 8])
def test_every_chunk_size_and_single_images_drop_alike(model: DirectedModel, num: int):
    stream = memory(model, chunk_frames=num)
    num_patches = max(1, num // 2)
    dropped = [stream.append(still(num * i, num)).num_dropped_tokens for i in range(3)]
    assert dropped == [5 * (num_patches - 1), 5 * num_patches, 5 * num_patches]


def test_a_new_size_begins_with_a_whole_picture(model: DirectedModel):
    stream = memory(model)
    stream.append(still(0))
    assert stream.append(still(4, grid=(3, 2))).num_dropped_tokens == 5
    assert stream.append(still(8)).num_dropped_tokens == 5


def test_features_are_compared_with_the_last_kept_and_not_the_one_before():
    turn = [torch.tensor([[float(np.cos(a)), float(np.sin(a))]]) for a in np.arange(10) * 0.1]
    two = Span(np.zeros(2, np.int64), np.zeros((3, 2), np.int64), np.ones(2, bool), 2)
    drop = TokenDrop(float(np.cos(0.25)))
    kept = []
    for number, feature in enumerate(turn):
        # Beside it a place that changes all the time, so that the slow one is never the least similar.
        beside = torch.tensor([[1.0, 0.0]]) * (-1) ** number
        sifted = drop.sift(two, Vision(torch.cat([feature, beside]), None), (1, 2), number)
        kept.append(len(sifted.span) == 2)
        drop.commit()
    assert [n for n, is_kept in enumerate(kept) if is_kept] == [0, 3, 6, 9]


def test_no_graph_is_recorded_for_a_number_of_tokens_that_seldom_comes_again(model: DirectedModel):
    sizes: list[int] = []

    class Pieces:
        def run(self, embeds: Tensor, *_: object) -> None:
            sizes.append(embeds.shape[1])

    model.pieces = Pieces()  # type: ignore[assignment]
    dropping, plain = memory(model, chunk_frames=2), memory(model, None, chunk_frames=2)
    for i in range(3):
        dropping.append(still(2 * i, 2))
    assert sizes == [dropping.ledger.records[0].num_tokens + dropping.now.num_anchor]
    plain.append(still(0, 2))
    assert len(sizes) == 2


# What the memory has lost


def test_after_a_reset_the_first_picture_is_whole(model: DirectedModel):
    stream = memory(model)
    stream.append(still(0))
    stream.reset()
    assert stream.append(still(4)).num_dropped_tokens == 5
    assert stream.info().num_dropped_tokens == 5


def test_a_rollback_brings_back_what_was_kept_up_to_the_mark_and_no_more(model: DirectedModel):
    stream = memory(model)
    stream.append(still(0))
    stream.mark("here")
    stream.append(still(4, moving=2))
    stream.rollback("here")
    assert stream.info().num_dropped_tokens == 5
    # Two places were kept anew after the mark: they, and they alone, have nothing left to stand for them.
    assert stream.append(still(8)).num_tokens == 2 + 1


def test_a_chunk_that_failed_stands_for_nothing(model: DirectedModel):
    stream, never = memory(model), memory(model)
    for each in (stream, never):
        each.append(still(0))
    model.fail_with = torch.OutOfMemoryError("no more")
    with pytest.raises(ChunkRefused, match="no more"):
        stream.append(still(4, moving=6))
    model.fail_with = None
    for each in (stream, never):
        each.append(still(8))
    assert are_equal(rows(stream), rows(never)) and stream.now == never.now


def test_what_was_forgotten_is_kept_anew(model: DirectedModel):
    stream = memory(model, num_tokens=60, retention="window")
    num_tokens = []
    for i in range(30):
        num_tokens.append(stream.append(still(4 * i)).num_tokens)
        assert standing(stream) <= numbers(stream)
    assert stream.now.forgotten.num_chunks > 0
    assert num_tokens[1] == 2 < max(num_tokens[1:])


def test_a_memory_without_room_for_a_whole_chunk_is_full(model: DirectedModel):
    stream = memory(model, num_tokens=45)
    with pytest.raises(ChunkRefused, match="does not fit") as refused:
        for i in range(20):
            stream.append(still(4 * i))
    assert refused.value.reason == "memory_full" and stream.info().full
    assert stream.now.num_tokens > 45 - 12


class DroppingKeepsItsPromises(RuleBasedStateMachine):
    """Whatever happens, the counts agree, and what stands for a place is in the memory."""

    model: DirectedModel

    @initialize(retention=st.sampled_from(sorted(POLICIES)))
    def begin(self, retention: str) -> None:
        self.stream = memory(self.model, num_tokens=90, retention=retention)
        self.seq = 0

    @rule(num=st.sampled_from([2, 4]), moving=st.integers(0, 6), fails=st.sampled_from([False, False, False, True]))
    def append(self, num: int, moving: int, fails: bool) -> None:
        self.model.fail_with = torch.OutOfMemoryError("no more") if fails else None
        with contextlib.suppress(ChunkRefused):
            self.stream.append(still(self.seq, num, moving=moving))
            assert standing(self.stream) <= numbers(self.stream)
        self.seq += num

    @rule(name=st.sampled_from("ab"))
    def mark(self, name: str) -> None:
        self.stream.mark(name)

    @precondition(lambda self: self.stream.ledger.marks)
    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        self.stream.rollback(data.draw(st.sampled_from(sorted(self.stream.ledger.marks))))

    @rule()
    def reset(self) -> None:
        self.stream.reset()

    @invariant()
    def promises(self) -> None:
        if not hasattr(self, "stream"):
            return
        now, records = self.stream.now, self.stream.ledger.records
        assert now.num_tokens == now.num_anchor + sum(record.num_tokens for record in records) <= 90
        assert all(record.num_tokens + record.num_dropped >= 6 * record.num_frames // 2 for record in records)
        if not now.forgotten.num_chunks:
            assert now.num_dropped == sum(record.num_dropped for record in records)
        assert standing(self.stream) <= numbers(self.stream) | {FORGOTTEN}


def test_in_any_order_counts_agree_and_nothing_stands_for_what_is_lost(model: DirectedModel):
    class OnOurModel(DroppingKeepsItsPromises):
        pass

    OnOurModel.model = model
    case = OnOurModel.TestCase
    case.settings = settings(max_examples=12, stateful_step_count=20, deadline=None)
    case().runTest()
