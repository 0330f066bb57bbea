"""Positions that come back: what is kept stands where a shorter stream would have put it, and the stream goes on."""

from collections.abc import Callable
from copy import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, FRAME_NS, Checkpoints, DirectedModel, are_equal, chunk, rows
from checkpoints import memory as any_memory
from torch import Tensor

from onlooker.node.adapter import UnsupportedModelError, family_of
from onlooker.node.arena import Arena
from onlooker.node.attention import MemoryPass
from onlooker.node.chunk import ChunkRefused
from onlooker.node.language import AttentionWeights, before_attention
from onlooker.node.layout import LAYOUTS, Span
from onlooker.node.memory import StreamMemory
from onlooker.node.model import VisionLanguageModel
from onlooker.node.passes import Prefill
from onlooker.node.vision import Vision

HORIZON = 200
FORGETFUL = ("window", "thin")


class ShortSighted(DirectedModel):
    """A model that was trained for few positions, and that notes what it reads: positions, and keys before rotation."""

    def __init__(self, model: VisionLanguageModel, horizon: int = HORIZON) -> None:
        super().__init__(model)
        self._horizon = horizon
        self.language = copy(model.language)
        self.language.before = self._before
        self.seen: list[tuple[np.ndarray, list[Tensor]]] = []

    @property
    def max_positions(self) -> int:
        return self._horizon

    def read(
        self, span: Span, memory: MemoryPass, vision: Vision | None = None, between: Callable[[], None] | None = None
    ) -> Tensor:
        self.seen.append((span.positions, []))
        return super().read(span, memory, vision, between)

    def _before(self, x: Tensor, cos: Tensor, sin: Tensor, weights: AttentionWeights) -> tuple[Tensor, Tensor, Tensor]:
        plain = before_attention(x, torch.ones_like(cos), torch.zeros_like(sin), weights)[1]
        self.seen[-1][1].append(plain)
        return before_attention(x, cos, sin, weights)

    def rotated(self, plain: Tensor, positions: np.ndarray) -> Tensor:
        """Keys (n, kv_heads, head_dim) at positions (3, n), as the layers rotate them."""
        cos, sin = self.language._model.rotary_emb(plain, torch.from_numpy(positions)[:, None])
        a, b = plain.chunk(2, dim=-1)
        return plain * cos[0][:, None] + torch.cat([-b, a], dim=-1) * sin[0][:, None]


def memory(model: VisionLanguageModel, retention: str = "window", layout: str = "native", num_tokens: int = 120):
    return any_memory(model, num_tokens, layout, retention=retention)


def short_sighted(checkpoints: Checkpoints, family: str, layout: str = "native") -> ShortSighted:
    """For an open video without a clock, which takes one position for two frames, with fewer positions still."""
    is_slow = family == "qwen2_vl" and layout == "native"
    return ShortSighted(checkpoints.model(family), 45 if is_slow else HORIZON)


def feed(stream: StreamMemory, model: VisionLanguageModel, num: int, step: int = 2) -> None:
    for i in range(num):
        grid = (3, 2) if 10 <= i < 14 else (2, 3)
        stream.append(chunk(step * i, grid=grid, factor=model.geometry.factor))


def re_encoded(model: ShortSighted, stream: StreamMemory) -> list[Tensor]:
    """Keys of the chunks that are left, from the same hidden states, at the positions that the ledger states."""
    keys: list[list[Tensor]] = []
    num_anchor = stream.now.num_anchor
    for record in stream.ledger.records:
        positions, plain = model.seen[record.number]
        skipped = positions.shape[1] - record.num_tokens  # the anchor, of the first chunk
        positions = positions[:, skipped:]
        time, across = positions[0, 0] - record.reach.first, positions[1:].min() - record.reach.base
        moved = positions - np.array([time, across, across])[:, None]
        assert moved.min() >= num_anchor and moved.max() < model.max_positions
        keys.append([model.rotated(layer[skipped:], moved) for layer in plain])
    return [torch.cat(layer) for layer in zip(*keys, strict=True)]


@pytest.fixture
def model(checkpoints: Checkpoints) -> ShortSighted:
    return ShortSighted(checkpoints.model("qwen2_5_vl"))


@pytest.mark.parametrize("retention", FORGETFUL)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_kept_keys_are_what_encoding_at_the_new_positions_gives(
    checkpoints: Checkpoints, family: str, layout: str, retention: str
):
    model = short_sighted(checkpoints, family, layout)
    stream = memory(model, retention, layout)
    feed(stream, model, 24, step=28)
    expected, arena = re_encoded(model, stream), stream.extent(stream.now).arena
    assert any(model.seen[r.number][0][0, -1] > r.reach.first + 10 for r in stream.ledger.records)
    held = slice(stream.now.num_anchor, stream.now.num_tokens)
    assert max(float((arena.keys[i][held] - layer).abs().max()) for i, layer in enumerate(expected)) <= 1e-5
    question = stream.layout.question(stream.now.layout, "What do you see?")
    answered = model.logits(model.read(question, Prefill([stream.extent(stream.now)])))[-1]
    for i, layer in enumerate(expected):
        arena.keys[i][held] = layer
    anew = model.logits(model.read(question, Prefill([stream.extent(stream.now)])))[-1]
    assert (answered - anew).abs().max() <= 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_stream_goes_on_as_far_from_what_it_holds_as_if_nothing_had_moved(
    checkpoints: Checkpoints, family: str, layout: str
):
    model, unmoved = short_sighted(checkpoints, family, layout), checkpoints.model(family)
    stream, never = memory(model, layout=layout), memory(unmoved, layout=layout)
    feed(stream, model, 24, step=28)
    feed(never, unmoved, 24, step=28)
    mine, theirs = stream.ledger.records, never.ledger.records
    assert [record.number for record in mine[-3:]] == [21, 22, 23] and theirs[-1].reach.first > model.max_positions
    steps = [[b.reach.first - a.reach.first for a, b in pairwise(records[-3:])] for records in (mine, theirs)]
    assert steps[0] == steps[1]
    ends = [at.now.layout.next_position - at.ledger.records[-1].reach.first for at in (stream, never)]
    assert ends[0] == ends[1]


def test_values_and_the_opening_keep_their_bits(model: ShortSighted):
    stream = memory(model, num_tokens=512)
    feed(stream, model, 10, step=16)
    before = rows(stream)
    stream.append(chunk(240))
    num_anchor, (first, *_) = stream.now.num_anchor, stream.ledger.records
    kept = rows(stream)
    assert first.number > 0 and first.reach.base == num_anchor
    forgotten = before[0].shape[0] - (kept[0].shape[0] - stream.ledger.num_newest_tokens)
    for old, new in zip(before[1::2], kept[1::2], strict=True):
        held = new[: -stream.ledger.num_newest_tokens]
        assert torch.equal(old[:num_anchor], held[:num_anchor])
        assert torch.equal(old[num_anchor + forgotten :], held[num_anchor:])
    assert all(torch.equal(old[:num_anchor], new[:num_anchor]) for old, new in zip(before, kept, strict=True))


@pytest.mark.parametrize("retention", FORGETFUL)
def test_a_stream_that_forgets_never_ends(model: ShortSighted, retention: str):
    stream = memory(model, retention)
    for i in range(60):
        stream.append(chunk(8 * i))
        assert stream.info().positions_used <= HORIZON and not stream.info().full
    assert stream.now.num_seen == 60 and stream.now.until_stream_ns == 473 * FRAME_NS


def test_keys_rotate_seldom(model: ShortSighted):
    stream, turned = memory(model, "thin"), 0
    for i in range(150):
        before = stream.now.layout.next_position
        stream.append(chunk(2 * i))
        turned += stream.now.layout.next_position < before
    assert 1 <= turned <= 150 * 2 / (HORIZON / 4) + 1


def test_a_thinned_memory_forgets_its_oldest_part_when_it_reaches_as_far_as_the_positions(model: ShortSighted):
    stream = memory(model, "thin", num_tokens=150)
    for i in range(130):
        stream.append(chunk(2 * i))
        last_ns = stream.ledger.records[-1].first_stream_ns
        reaches_back_s = (last_ns - stream.ledger.records[0].first_stream_ns) / 1e9
        assert reaches_back_s <= HORIZON / 2  # two positions a second
        assert i < 100 or reaches_back_s >= HORIZON / 4
    assert stream.ledger.records[0].number > 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("retention", ["reset", *FORGETFUL])
def test_after_a_pause_longer_than_all_positions_a_stream_goes_on(model: ShortSighted, retention: str, layout: str):
    stream = memory(model, retention, layout)
    for first in (0, 2, 10**6, 10**6 + 2, 2 * 10**6):
        stream.append(chunk(first))
    assert stream.now.newest_seq == 2 * 10**6 + 1 and stream.info().positions_used <= HORIZON


def test_a_chunk_that_is_itself_longer_than_all_positions_is_refused_and_nothing_has_changed(model: ShortSighted):
    stream = memory(model)
    stream.append(chunk(0))
    before, now = rows(stream), stream.now
    late = chunk(10, 4)
    far = [*late.pictures[:2], *chunk(10**6, 2).pictures]
    with pytest.raises(ChunkRefused, match="past 200") as refused:
        stream.append(type(late)(tuple(far)))
    assert refused.value.reason == "memory_full" and stream.now == now and are_equal(rows(stream), before)
    stream.append(late)
    assert not stream.info().full


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_mark_moves_along(checkpoints: Checkpoints, family: str):
    model = short_sighted(checkpoints, family)
    factor = model.geometry.factor
    stream = memory(model, "window", num_tokens=200)
    step = 8
    for i in range(60):
        stream.append(chunk(step * i, factor=factor))
        if i % 2 == 0:
            stream.mark(f"at-{i}")
    marks, floor = stream.ledger.marks, stream.now.num_anchor
    assert {mark.num_frames > 0 for mark in marks.values()} == {True, False}
    for mark in marks.values():
        assert floor <= mark.layout.next_position <= model.max_positions
        newest = stream.ledger.records[: mark.num_chunks][-1:]
        assert all(mark.layout.next_position > record.reach.first for record in newest)
    stream.rollback("at-58")
    stream.append(chunk(step * 60, factor=factor))
    assert stream.now.num_seen == 60 and stream.ledger.records[-1].reach.first < model.max_positions
    stream.rollback("at-0")
    stream.append(chunk(step * 61, factor=factor))
    assert stream.now.num_chunks == 1 and stream.ledger.records[0].reach.first >= floor


def test_a_device_without_memory_for_rotating_keys_refuses_the_chunk_and_no_key_has_turned(
    model: ShortSighted, monkeypatch: pytest.MonkeyPatch
):
    def no_stage(self: Arena, *_: object) -> None:
        raise torch.OutOfMemoryError("no stage")

    stream = memory(model, num_tokens=512)
    feed(stream, model, 10, step=16)
    with monkeypatch.context() as patch, pytest.raises(ChunkRefused, match="no stage") as refused:
        patch.setattr(Arena, "rotate", no_stage)
        stream.append(chunk(240))
    assert refused.value.reason == "out_of_memory"
    stream.append(chunk(240))
    expected, arena = re_encoded(model, stream), stream.extent(stream.now).arena
    assert (arena.keys[0][stream.now.num_anchor : stream.now.num_tokens] - expected[0]).abs().max() <= 1e-5


def test_frequencies_that_change_with_the_length_are_refused(checkpoints: Checkpoints):
    config = copy(checkpoints.model("qwen2_5_vl").config)
    config.text_config = copy(config.text_config)
    config.text_config.rope_parameters = {**config.text_config.rope_parameters, "rope_type": "dynamic"}
    with pytest.raises(UnsupportedModelError, match="dynamic"):
        family_of(config)
