"""A memory that forgets: what is left is exact, the ledger and the arena agree, and marks hold what is left of them."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, Checkpoints, DirectedModel, are_equal, arena, chunk, rows
from checkpoints import memory as any_memory
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec import UNSET
from one_pass import OnePass, Prompt

from onlooker.node.arena import Arena
from onlooker.node.branch import Branch, Scratch
from onlooker.node.chunk import Chunk, ChunkRefused
from onlooker.node.layout import LAYOUTS, Reach
from onlooker.node.ledger import ChunkRecord
from onlooker.node.memory import Plan, StreamMemory
from onlooker.node.model import VisionLanguageModel
from onlooker.node.passes import Prefill
from onlooker.node.retention import POLICIES

FORGETFUL = ("window", "thin")
QUESTION = "What do you see?"


def memory(
    model: VisionLanguageModel, retention: str, num_tokens: int = 80, layout: str = "native", chunk_frames: int = 2
) -> StreamMemory:
    return any_memory(model, num_tokens, layout, chunk_frames, retention=retention)


def numbers(stream: StreamMemory) -> list[int]:
    return [record.number for record in stream.ledger.records]


def next_logits(model: VisionLanguageModel, stream: StreamMemory) -> torch.Tensor:
    question = stream.layout.question(stream.now.layout, QUESTION)
    return model.logits(model.read(question, Prefill([stream.extent(stream.now)])))


def visibility(prompt: Prompt, num_anchor: int, seen: Sequence[Sequence[int]]) -> np.ndarray:
    """What each token of a prompt sees, where chunk i sees the chunks seen[i]; the question comes last."""
    lengths = [len(span) for span in prompt.spans]
    chunk_of = np.repeat(np.arange(len(lengths)), lengths)
    chunk_of[:num_anchor] = -1
    sees = np.eye(len(lengths), dtype=bool)
    for number, others in enumerate(seen):
        sees[number, list(others)] = True
    visible = np.tri(len(chunk_of), dtype=bool)
    return visible & ((chunk_of == -1)[None] | sees[chunk_of][:, chunk_of])


# Exactness


@pytest.mark.parametrize("retention", FORGETFUL)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_answers_as_one_pass_in_which_the_forgotten_is_masked(
    checkpoints: Checkpoints, one_pass: Callable[[str], OnePass], family: str, layout: str, retention: str
):
    model = checkpoints.model(family)
    stream, chunks, seen = memory(model, retention, 90, layout), [], []
    for i in range(14):
        chunks.append(chunk(2 * i, grid=(3, 2) if 4 <= i < 6 else (2, 3), factor=model.geometry.factor))
        stream.append(chunks[-1])
        seen.append(numbers(stream))
    left = numbers(stream)
    assert len(left) < len(chunks) and left[-1] == 13
    reference = one_pass(family)
    prompt = reference.prompt(layout, chunks, QUESTION)
    visible = visibility(prompt, stream.now.num_anchor, [*seen, left])
    expected = reference.logits(prompt, visible=visible)[-1]
    answered = next_logits(model, stream)[-1]
    assert (answered - expected).abs().max() <= 1e-5
    assert (answered - reference.logits(prompt)[-1]).abs().max() > 1e-4  # what was forgotten made a difference


@pytest.mark.parametrize("retention", FORGETFUL)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_forgetting_moves_rows_and_changes_no_bit_of_them(checkpoints: Checkpoints, family: str, retention: str):
    model = checkpoints.model(family)
    stream = memory(model, retention, 150)
    for i in range(30):
        new = chunk(2 * i, factor=model.geometry.factor)
        if stream.plan(new).must_forget:
            before, records = rows(stream), stream.ledger.records
            stream.append(new)
            kept = {record.number: record for record in stream.ledger.records}
            places = [
                *range(stream.now.num_anchor),
                *(old.first_token + i for old in records if old.number in kept for i in range(old.num_tokens)),
            ]
            assert are_equal([tensor[: len(places)] for tensor in rows(stream)], [tensor[places] for tensor in before])
        else:
            stream.append(new)
    assert stream.now.forgotten.num_chunks > 10


def test_the_opening_of_the_prompt_is_never_forgotten(model: DirectedModel):
    for layout in LAYOUTS:
        stream = memory(model, "window", 80, layout)
        stream.append(chunk(0))
        num_anchor = stream.now.num_anchor
        opening = [tensor[:num_anchor] for tensor in rows(stream)]
        for i in range(1, 20):
            stream.append(chunk(2 * i))
        assert 0 not in numbers(stream) and num_anchor > 5
        assert are_equal([tensor[:num_anchor] for tensor in rows(stream)], opening)


def test_survivors_keep_their_positions_and_the_stream_goes_on_where_it_was(model: DirectedModel):
    stream, never = memory(model, "window"), memory(model, "stop", 1000)
    for i in range(20):
        stream.append(chunk(2 * i))
        never.append(chunk(2 * i))
    assert stream.now.layout == never.now.layout


# Policies


def test_a_window_holds_the_newest_and_its_bytes_stay_within_the_budget(model: DirectedModel):
    stream = memory(model, "window")
    for i in range(40):
        stream.append(chunk(2 * i))
        assert numbers(stream) == list(range(i + 1 - stream.now.num_chunks, i + 1))
        assert stream.now.num_tokens <= 80
    info = stream.info()
    assert (info.num_forgotten_chunks, info.num_forgotten_frames) == (40 - info.num_chunks, 80 - info.num_frames)
    assert not info.full and info.resident_bytes == 80 * info.bytes_per_token


def test_a_thinned_memory_reaches_back_to_the_first_chunk(model: DirectedModel):
    stream = memory(model, "thin", 150)
    for i in range(60):
        stream.append(chunk(2 * i))
    left = numbers(stream)
    assert left[0] == 0 and left[-1] == 59
    gaps = np.diff(left)
    assert (np.diff(gaps) <= 0).all() and gaps[0] >= 8 and gaps[-1] == 1


def test_a_memory_that_starts_over_is_like_a_new_one(model: DirectedModel):
    stream, new = memory(model, "reset"), memory(model, "stop", 1000)
    started = None
    for i in range(20):
        stream.append(chunk(2 * i))
        if stream.now.num_chunks == 1:
            started = i
    assert started is not None and started > 0
    for i in range(started, 20):
        new.append(chunk(2 * i))
    assert are_equal(rows(stream), rows(new)) and stream.now.layout == new.now.layout
    assert stream.now.forgotten.num_chunks == started


def test_starting_over_gives_the_positions_back_too(model: DirectedModel):
    stream = memory(model, "reset")
    stream.append(chunk(0))
    stream.append(chunk(10**6))  # hours later: its position is past what the model was trained for
    assert numbers(stream) == [1] and stream.info().positions_used < 100


@pytest.mark.parametrize("retention", ["reset", *FORGETFUL])
def test_nothing_is_forgotten_for_a_chunk_that_can_never_fit(model: DirectedModel, retention: str):
    stream = memory(model, retention)
    for i in range(4):
        stream.append(chunk(2 * i))
    before, now = arena(stream), stream.now
    with pytest.raises(ChunkRefused, match="does not fit") as refused:
        stream.append(chunk(8, grid=(12, 12)))
    assert refused.value.reason == "memory_full" and not stream.info().full
    assert stream.now == now and are_equal(arena(stream), before)


@pytest.mark.parametrize("retention", FORGETFUL)
def test_a_chunk_as_large_as_the_memory_takes_the_place_of_all_others(model: DirectedModel, retention: str):
    stream = memory(model, retention)
    for i in range(4):
        stream.append(chunk(2 * i))
    stream.append(chunk(8, grid=(4, 9)))
    assert numbers(stream) == [4] and stream.now.num_frames == 2
    stream.append(chunk(10))
    assert numbers(stream)[-1] == 5


# Figures


def test_what_was_forgotten_is_told_with_the_chunk_that_it_was_for(model: DirectedModel):
    stream = memory(model, "window")
    told = [stream.append(chunk(2 * i)).num_forgotten_frames for i in range(20)]
    assert sum(told) == stream.now.forgotten.num_frames > 0 and told[0] == 0


def test_a_chunk_that_fails_after_others_were_forgotten_for_it_leaves_a_sound_memory(model: DirectedModel):
    stream = memory(model, "window")
    seq = 0
    while not stream.plan(chunk(seq)).must_forget:
        stream.append(chunk(seq))
        seq += 2
    model.fail_with = torch.OutOfMemoryError("no more")
    with pytest.raises(ChunkRefused, match="no more"):
        stream.append(chunk(seq))
    model.fail_with = None
    assert 0 < stream.now.num_chunks < seq // 2
    assert stream.append(chunk(seq)).num_forgotten_frames == stream.now.forgotten.num_frames > 0


def test_a_device_without_memory_for_moving_rows_refuses_the_chunk_and_nothing_has_moved(
    model: DirectedModel, monkeypatch: pytest.MonkeyPatch
):
    def no_stage(self: Arena, *_: object) -> None:
        raise torch.OutOfMemoryError("no stage")

    stream = memory(model, "window")
    seq = 0
    while not stream.plan(chunk(seq)).must_forget:
        stream.append(chunk(seq))
        seq += 2
    before, now = arena(stream), stream.now
    with monkeypatch.context() as patch, pytest.raises(ChunkRefused, match="no stage") as refused:
        patch.setattr(Arena, "_moves", no_stage)
        stream.append(chunk(seq))
    assert refused.value.reason == "out_of_memory"
    assert stream.now == now and are_equal(arena(stream), before)
    stream.append(chunk(seq))


def test_seconds_in_the_memory_and_forgotten_add_up(model: DirectedModel):
    stream = memory(model, "window")
    for i in range(30):
        stream.append(chunk(2 * i))
    info = stream.info()
    interval_s = 0.5  # before the oldest chunk that is left
    assert isinstance(info.seconds, float)
    assert info.seconds_forgotten + interval_s + info.seconds == 29.5
    assert info.oldest_ns == info.whole_from_ns == stream.ledger.records[0].first_ns


def test_it_is_known_since_when_nothing_was_forgotten(model: DirectedModel):
    stream = memory(model, "thin", 150)
    for i in range(60):
        stream.append(chunk(2 * i))
    left = numbers(stream)
    first_whole = next(n for n in left if set(range(n, 60)) <= set(left))
    assert stream.info().whole_from_ns == 2 * first_whole * 500_000_000 + 7
    assert stream.info().oldest_ns == 7


@pytest.mark.parametrize("retention", FORGETFUL)
def test_a_memory_that_forgets_has_no_end(model: DirectedModel, retention: str):
    stream = memory(model, retention)
    for i in range(10):
        stream.append(chunk(2 * i))
    assert stream.info().seconds_until_full is UNSET and isinstance(stream.info().positions_left, int)


def test_a_memory_of_which_a_share_is_used_forgets_the_rest_and_takes_it_up_again(model: DirectedModel):
    stream = memory(model, "window", 320)
    whole = [stream.append(chunk(2 * i)) and stream.now.num_tokens for i in range(60)][-20:]
    reserved = stream.info().resident_bytes
    stream.adjust(replace(stream.options, retention="thin", memory_share=0.5))
    assert stream.info().resident_bytes == reserved // 2  # at once: somebody else may be in need of it
    half = [stream.append(chunk(2 * i)) and stream.now.num_tokens for i in range(60, 100)]
    assert max(half) <= max(whole) // 2 + 20 and numbers(stream)[-1] == 99
    stream.adjust(replace(stream.options, retention="window", memory_share=1 / 1000))
    assert stream.append(chunk(200)) and stream.now.num_chunks > 1  # some chunks fit in any case
    stream.adjust(replace(stream.options, memory_share=1.0))
    assert stream.info().resident_bytes == reserved
    again = [stream.append(chunk(2 * i)) and stream.now.num_tokens for i in range(101, 160)]
    assert max(again) == max(whole)
    frames = stream.now.forgotten.num_frames + stream.now.num_frames
    assert frames == 320


def test_a_share_for_which_no_storage_can_be_had_is_used_of_the_storage_that_is_there(
    model: DirectedModel, monkeypatch: pytest.MonkeyPatch
):
    stream = memory(model, "window", 320)
    for i in range(60):
        stream.append(chunk(2 * i))
    reserved, held = stream.info().resident_bytes, stream.now.num_tokens

    def nothing_left(*_: object) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(stream._storage, "renew", nothing_left)
    stream.adjust(replace(stream.options, memory_share=0.5))
    assert (stream.info().resident_bytes, stream.now.num_tokens) == (reserved, held)
    for i in range(60, 70):
        stream.append(chunk(2 * i))
    assert stream.now.num_tokens <= stream.info().capacity_tokens <= 160


def test_an_answer_says_what_its_memory_has_forgotten(model: DirectedModel):
    stream = memory(model, "window")
    for i in range(20):
        stream.append(chunk(2 * i))
    branch = Branch(model, stream, stream.now, Scratch(model.kv_shape, 1, 16))
    provenance = branch.provenance(branch.snapshot)
    assert provenance.num_frames + provenance.num_forgotten_frames == 40
    assert provenance.num_forgotten_chunks == stream.now.forgotten.num_chunks
    assert provenance.from_ns == provenance.whole_from_ns == stream.info().oldest_ns
    assert provenance.seconds_forgotten == stream.info().seconds_forgotten > 0


# Marks


@pytest.mark.parametrize("retention", FORGETFUL)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_rollback_gives_the_survivors_up_to_the_mark(checkpoints: Checkpoints, family: str, retention: str):
    model = checkpoints.model(family)
    factor = model.geometry.factor
    stream = memory(model, retention, 90)
    for i in range(8):
        stream.append(chunk(2 * i, factor=factor))
    stream.mark("here")
    marked = stream.now
    for i in range(8, 14):
        stream.append(chunk(2 * i, factor=factor))
    mark, held = stream.ledger.marks["here"], rows(stream)
    left = [record for record in stream.ledger.records if record.number < 8]
    stream.rollback("here")
    assert stream.now == mark and stream.now.layout == marked.layout and stream.now.num_seen == 8
    assert list(stream.ledger.records) == left and len(left) < 8
    assert are_equal(rows(stream), [tensor[: mark.num_tokens] for tensor in held])
    stream.append(chunk(16, factor=factor))
    assert numbers(stream) == [*(record.number for record in left), 8]


def test_a_mark_of_which_nothing_is_left_holds_the_opening_alone(model: DirectedModel):
    stream = memory(model, "window")
    stream.mark("nothing")
    stream.append(chunk(0))
    stream.mark("one")
    for i in range(1, 20):
        stream.append(chunk(2 * i))
    one = stream.ledger.marks["one"]
    assert (one.num_tokens, one.num_frames, one.oldest_ns, one.whole_from_ns) == (one.num_anchor, 0, None, None)
    assert one.forgotten.num_frames == 2 and one.num_anchor > 0
    assert stream.ledger.marks["nothing"].num_tokens == 0
    stream.rollback("one")
    stream.append(chunk(100))
    assert numbers(stream) == [1] and stream.info().oldest_ns == 50_000_000_007
    assert stream.info().num_forgotten_frames == 2
    stream.rollback("nothing")
    assert stream.info() == memory(model, "window").info()


# Readers


@pytest.mark.parametrize("retention", FORGETFUL)
def test_what_a_reader_sees_goes_aside_until_there_is_no_more_room_for_it(model: DirectedModel, retention: str):
    stream, unread = memory(model, retention, 240), memory(model, retention, 240)
    for i in range(66):
        stream.append(chunk(2 * i))
        unread.append(chunk(2 * i))
    scratch = Scratch(model.kv_shape, 2, 64)
    reader, other = (Branch(model, stream, stream.now, scratch) for _ in range(2))
    read, fingerprint = read_by(reader), reader.reading.fingerprint
    question = stream.layout.question(stream.now.layout, QUESTION)
    expected = other.prefill(question)
    other.close()
    seq = 132
    while not stream.plan(chunk(seq)).must_wait:
        stream.append(chunk(seq))
        unread.append(chunk(seq))
        seq += 2
        assert read_by(reader) == read and stream.fingerprint(reader.reading) == fingerprint
    assert reader.reading.aside
    assert stream.now == unread.now and are_equal(rows(stream), rows(unread))
    assert (reader.prefill(question) - expected).abs().max() <= 1e-5
    reader.close()
    assert not stream.plan(chunk(seq)).must_wait
    stream.append(chunk(seq))


def test_keys_do_not_rotate_under_a_reader(model: DirectedModel):
    stream = memory(FewPositions(model), "window")
    stream.append(chunk(0))
    branch = Branch(model, stream, stream.now, Scratch(model.kv_shape, 1, 64))
    assert stream.plan(chunk(1000)).must_wait and not stream.plan(chunk(2)).must_wait
    branch.close()
    assert not stream.plan(chunk(1000)).must_wait


# Another size


@pytest.mark.parametrize("retention", FORGETFUL)
def test_a_memory_with_less_room_is_what_is_left_of_it_bit_for_bit_and_its_readers_notice_nothing(
    model: DirectedModel, retention: str
):
    stream = memory(model, retention, 200)
    for i in range(60):
        stream.append(chunk(2 * i))
    reader = Branch(model, stream, stream.now, Scratch(model.kv_shape, 1, 64))
    read, before, bits = read_by(reader), stream.ledger.records, rows(stream)
    stream.resize(100 * model.kv_shape.bytes_per_token)
    info = stream.info()
    assert info.resident_bytes == 100 * model.kv_shape.bytes_per_token and not stream.is_read
    assert info.num_tokens <= info.capacity_tokens < 100 and info.num_frames + info.num_forgotten_frames == 120
    left = [record for record in before if record.number in numbers(stream)]
    assert 1 < len(left) < len(before) and left[-1] is before[-1]
    places = [i for r in left for i in range(r.first_token, r.first_token + r.num_tokens)]
    kept = [*range(stream.now.num_anchor), *places]
    assert are_equal(rows(stream), [tensor[kept] for tensor in bits])
    stream.append(chunk(120))
    assert read_by(reader) == read and stream.fingerprint(reader.reading) == reader.reading.fingerprint
    former = reader.reading.arena
    assert former.keys
    reader.close()
    assert numbers(stream)[-1] == 60 and not former.keys, "nobody needs the former storage"


def test_a_memory_with_more_room_has_all_that_it_had(model: DirectedModel):
    stream, never = memory(model, "window", 100), memory(model, "window", 100)
    for i in range(30):
        stream.append(chunk(2 * i))
        never.append(chunk(2 * i))
    stream.resize(200 * model.kv_shape.bytes_per_token)
    assert stream.now == never.now and are_equal(rows(stream), rows(never))
    for i in range(30, 40):
        stream.append(chunk(2 * i))
    assert stream.info().num_forgotten_frames == never.info().num_forgotten_frames


def test_what_is_never_forgotten_needs_its_room_and_goes_on_with_more(model: DirectedModel):
    stream = memory(model, "stop", 100)
    with pytest.raises(ChunkRefused):
        for i in range(60):
            stream.append(chunk(2 * i))
    before, bits = stream.info(), rows(stream)
    with pytest.raises(ValueError, match="fit into"):
        stream.resize(90 * model.kv_shape.bytes_per_token)
    assert stream.info() == before and are_equal(rows(stream), bits)
    stream.resize(120 * model.kv_shape.bytes_per_token)
    assert not stream.info().full
    stream.append(chunk(200))


# In any order


class FewPositions(DirectedModel):
    @property
    def max_positions(self) -> int:
        return 160


def read_by(branch: Branch) -> list[list[bytes]]:
    """All that a branch reads: the bytes of each row, in order of these, tensor by tensor."""
    layers = range(branch.reads[0].arena.shape.num_layers)
    rows = [[extent.rows(layer) for extent in branch.reads] for layer in layers]
    tensors = [torch.cat(parts) for layer in rows for parts in zip(*layer, strict=True)]
    return [sorted(row.numpy().tobytes() for row in tensor) for tensor in tensors]


class ForgettingKeepsItsPromises(RuleBasedStateMachine):
    """A memory beside the bits of each of its chunks as they were when it was new, and what each mark had seen."""

    model: DirectedModel

    @initialize(
        retention=st.sampled_from([*FORGETFUL, *FORGETFUL, *sorted(POLICIES)]),
        layout=st.sampled_from(["native", "native", "turns"]),
    )
    def begin(self, retention: str, layout: str) -> None:
        self.stream = memory(self.model, retention, 260, layout)
        self.scratch = Scratch(self.model.kv_shape, 2, 64)
        self.bits: dict[int, tuple[Reach, list[torch.Tensor]]] = {}  # by number
        self.seen = 0  # frames since the beginning, or the last reset
        self.marks: dict[str, int] = {}
        self.readers: list[tuple[Branch, list[list[bytes]]]] = []
        self.seq = 0
        self.append((2, 3), 31 if layout == "native" else 12, 0)

    def plan(self, new: Chunk) -> Plan | None:
        try:
            return self.stream.plan(new)
        except ChunkRefused:
            return None

    def add(self, new: Chunk, plan: Plan | None) -> None:
        starts_over = self.stream.options.retention == "reset" and plan is not None and plan.must_forget
        try:
            self.stream.append(new)
        except ChunkRefused as refused:
            assert refused.reason == "memory_full"
        else:
            record = self.stream.ledger.records[-1]
            self.bits[record.number] = record.reach, self.rows_of(record.first_token, record.num_tokens)
            self.seen += 2
        if starts_over:
            self.marks.clear()

    def rows_of(self, first: int, num: int) -> list[torch.Tensor]:
        return [tensor[first : first + num] for tensor in rows(self.stream)]

    @rule(
        grid=st.sampled_from([(2, 3), (2, 3), (2, 3), (4, 4)]),
        num=st.integers(1, 4),
        pause=st.sampled_from([0, 0, 0, 0, 0, 0, 40, 400]),
    )
    def append(self, grid: tuple[int, int], num: int, pause: int) -> None:
        self.seq += pause
        for _ in range(num):
            new = chunk(self.seq, grid=grid)
            plan = self.plan(new)
            if plan is not None and plan.must_wait:
                assert self.readers
                return
            self.add(new, plan)
            self.seq += 2

    @rule(name=st.sampled_from(["", "a", "b"]))
    def ask(self, name: str) -> None:
        snapshot = self.stream.ledger.marks.get(name, self.stream.now)
        if not self.scratch.num_free or not snapshot.num_frames:
            return
        branch = Branch(self.model, self.stream, snapshot, self.scratch)
        branch.prefill(self.stream.layout.question(snapshot.layout, QUESTION))
        self.readers.append((branch, read_by(branch)))

    @rule(name=st.sampled_from(["", "a", "b"]), num=st.integers(4, 12))
    def ask_and_go_on(self, name: str, num: int) -> None:
        self.ask(name)
        self.append((2, 3), num, 0)

    @precondition(lambda self: self.readers)
    @rule(place=st.integers(0, 1))
    def finish_or_cancel(self, place: int) -> None:
        branch, read = self.readers.pop(place % len(self.readers))
        assert self.stream.fingerprint(branch.reading) == branch.reading.fingerprint
        assert read_by(branch) == read
        branch.close()

    def cancel_beyond(self, num_tokens: int) -> None:
        for branch, _ in [reader for reader in self.readers if reader[0].snapshot.num_tokens > num_tokens]:
            branch.close()
        self.readers = [reader for reader in self.readers if reader[0].snapshot.num_tokens <= num_tokens]

    @rule(name=st.sampled_from(["a", "b"]))
    def mark(self, name: str) -> None:
        self.stream.mark(name)
        self.marks[name] = self.seen

    @precondition(lambda self: self.marks)
    @rule(name=st.sampled_from(["a", "b"]))
    def roll_back(self, name: str) -> None:
        if name in self.marks:
            self.cancel_beyond(self.stream.ledger.marks[name].num_tokens)
            self.stream.rollback(name)
            self.seen = self.marks[name]
            self.marks = {n: seen for n, seen in self.marks.items() if seen <= self.seen}

    @rule(num_tokens=st.sampled_from([120, 200, 260]))
    def resize(self, num_tokens: int) -> None:
        frames = self.stream.now.num_frames
        try:
            self.stream.resize(num_tokens * self.model.kv_shape.bytes_per_token)
        except ValueError:
            assert self.stream.options.retention == "stop"
        if self.stream.options.retention == "reset" and self.stream.now.num_frames < frames:
            self.marks.clear()

    @precondition(lambda self: self.seen > 80)
    @rule()
    def reset(self) -> None:
        self.cancel_beyond(0)
        self.stream.reset()
        self.seen = 0
        self.marks.clear()

    @invariant()
    def ledger_and_arena_agree(self) -> None:
        if not hasattr(self, "stream"):
            return
        stream, now, records = self.stream, self.stream.now, self.stream.ledger.records
        at = now.num_anchor
        for record in records:
            assert record.first_token == at
            self.check_rows(record, *self.bits[record.number])
            at += record.num_tokens
        assert now.num_tokens == at <= stream.info().capacity_tokens
        assert now.num_chunks == len(records)
        assert numbers(stream) == sorted(set(numbers(stream)))

    def check_rows(self, record: ChunkRecord, reach: Reach, bits: list[torch.Tensor]) -> None:
        now = self.rows_of(record.first_token, record.num_tokens)
        if record.reach == reach:
            assert are_equal(now, bits)
            return
        across = record.reach.base - reach.base
        cos, sin = self.model.language.rotation((record.reach.first - reach.first, across, across))
        for i, (mine, then) in enumerate(zip(now, bits, strict=True)):
            a, b = then.chunk(2, dim=-1)
            expected = then if i % 2 else then * cos + torch.cat([-b, a], dim=-1) * sin  # values stay
            assert (mine - expected).abs().max() <= (0 if i % 2 else 1e-4)

    @invariant()
    def positions_and_bytes_are_within_their_bounds(self) -> None:
        if hasattr(self, "stream"):
            info = self.stream.info()
            assert info.positions_used <= self.model.max_positions
            assert info.resident_bytes <= self.stream.options.memory_bytes
            arena = self.stream.extent(self.stream.now).arena
            aside = [extent for branch, _ in self.readers for extent in branch.reading.aside]
            assert info.num_tokens <= min((e.start for e in aside if e.arena is arena), default=arena.capacity)

    @invariant()
    def every_frame_is_in_the_memory_or_forgotten(self) -> None:
        if not hasattr(self, "stream"):
            return
        now = self.stream.now
        assert now.num_frames + now.forgotten.num_frames == self.seen
        marks = self.stream.ledger.marks
        assert {name: m.num_frames + m.forgotten.num_frames for name, m in marks.items()} == self.marks
        if self.stream.options.retention == "stop":
            assert now.forgotten.num_frames == 0

    @invariant()
    def a_mark_holds_the_survivors_up_to_it(self) -> None:
        if not hasattr(self, "stream"):
            return
        for mark in self.stream.ledger.marks.values():
            left = [record for record in self.stream.ledger.records if record.number < mark.num_seen]
            assert mark.num_chunks == len(left)
            assert mark.num_tokens == mark.num_anchor + sum(record.num_tokens for record in left)
            assert mark.newest_ns == (left[-1].last_ns if left else None)


def test_in_any_order_ledger_and_arena_agree_and_no_reader_sees_a_change(model: DirectedModel):
    class OnOurModel(ForgettingKeepsItsPromises):
        pass

    OnOurModel.model = FewPositions(model)
    case = OnOurModel.TestCase
    case.settings = settings(max_examples=10, stateful_step_count=20, deadline=None)
    case().runTest()
