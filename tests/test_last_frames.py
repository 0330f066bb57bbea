"""The last frames: bit for bit a new stream that was shown them alone, and an honest count of what has left."""

import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
import torch
from checkpoints import Checkpoints, DirectedModel, are_equal, chunk, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import UNSET

from onlooker.node.chunk import Chunk, ChunkRefused, Unchanged
from onlooker.node.engine import Engine
from onlooker.node.forecast import forecast
from onlooker.node.layout import LAYOUTS
from onlooker.node.memory import StreamMemory
from onlooker.node.model import VisionLanguageModel
from onlooker.node.options import StreamOptions
from onlooker.node.passes import Prefill
from onlooker.node.time_ranges import time_ranges
from onlooker.protocol.errors import NodeError
from onlooker.protocol.messages import Answer, Ask

WAIT_S = 30.0
QUESTION = "What do you see?"


def options(model: VisionLanguageModel, last_frames: int = 6, num_tokens: int = 512, **changes: Any) -> StreamOptions:
    settings: dict[str, Any] = {"chunk_frames": 2, "min_pixels": 1, "last_frames": last_frames} | changes
    return StreamOptions("front", memory_bytes=num_tokens * model.kv_shape.bytes_per_token, **settings)


def memory(model: VisionLanguageModel, last_frames: int = 6, num_tokens: int = 512, **changes: Any) -> StreamMemory:
    return StreamMemory(model, options(model, last_frames, num_tokens, **changes))


def new_stream(model: VisionLanguageModel, chunks: list[Chunk], layout: str = "native") -> StreamMemory:
    """A stream to which only these chunks came, so that its clock starts with them."""
    stream = memory(model, 0, layout=layout)
    began_ns = chunks[0].pictures[0].stream_ns
    for each in chunks:
        pictures = tuple(replace(picture, stream_ns=picture.stream_ns - began_ns) for picture in each.pictures)
        stream.append(replace(each, pictures=pictures))
    return stream


def is_as_new(model: VisionLanguageModel, stream: StreamMemory, chunks: list[Chunk]) -> bool:
    """Whether a memory is that of a new stream, and answers as it does."""
    new = new_stream(model, chunks, stream.options.layout)
    return (
        are_equal(rows(stream), rows(new))
        and stream.now.layout == new.now.layout
        and torch.equal(next_logits(model, stream), next_logits(model, new))
    )


def next_logits(model: VisionLanguageModel, stream: StreamMemory) -> torch.Tensor:
    question = stream.layout.question(stream.now.layout, QUESTION)
    return model.logits(model.read(question, Prefill([stream.extent(stream.now)])))


def numbers(stream: StreamMemory) -> list[int]:
    return [record.number for record in stream.ledger.records]


# Exactness


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_it_is_bit_for_bit_a_new_stream_that_was_shown_these_frames_alone(
    checkpoints: Checkpoints, family: str, layout: str
):
    model = checkpoints.model(family)
    stream = memory(model, 7, layout=layout)
    chunks = [chunk(2 * i, factor=model.geometry.factor) for i in range(6)]
    for i, each in enumerate(chunks):
        stream.append(each)
        assert is_as_new(model, stream, chunks[max(0, i - 2) : i + 1])


def test_so_it_is_when_the_size_changes_and_when_a_chunk_is_padded(model: DirectedModel):
    stream = memory(model)
    sizes = [(2, 3), (3, 2), (3, 2), (2, 2), (2, 3), (2, 3), (2, 3)]
    chunks = [chunk(2 * i, grid=grid, num_padded=i % 2) for i, grid in enumerate(sizes)]
    for i, each in enumerate(chunks):
        stream.append(each)
        held = chunks[i + 1 - stream.now.num_chunks : i + 1]
        assert sum(each.num_frames for each in held) == stream.now.num_frames <= 6
        assert is_as_new(model, stream, held)


def test_the_vision_tower_sees_a_chunk_once_and_the_language_model_reads_all_that_are_held(model: DirectedModel):
    class Counting(DirectedModel):
        num_seen = 0

        def see(self, *arguments: Any, **named: Any) -> Any:
            self.num_seen += 1
            return super().see(*arguments, **named)

    counting = Counting(model)
    stream = memory(counting)
    costs = []
    for i in range(5):
        counting.num_seen = counting.num_reads = 0
        stream.append(chunk(2 * i))
        costs.append((counting.num_seen, counting.num_reads))
    assert costs == [(1, 1), (1, 1), (1, 1), (1, 3), (1, 3)]


# Counts


def test_only_what_leaves_is_forgotten_and_the_rest_keeps_its_numbers(model: DirectedModel):
    stream = memory(model)
    stream.ledger.note_unchanged(Unchanged(chunk(10).pictures[-1].stream_ns, 77))
    encoded = [stream.append(chunk(2 * i)) for i in range(6)]
    assert [each.num_forgotten_frames for each in encoded] == [0, 0, 0, 2, 2, 2]
    assert numbers(stream) == [3, 4, 5]
    info = stream.info()
    assert (info.num_frames, info.num_forgotten_frames, info.num_forgotten_chunks) == (6, 6, 3)
    assert (info.oldest_ns, info.newest_seq, info.seen_until_ns) == (chunk(6).pictures[0].ts, 11, 77)
    assert info.seconds_forgotten == 2.5 and info.seconds_of_memory == 3.0 and info.seconds_until_full is UNSET
    assert [record.elapsed_ns for record in stream.ledger.records] == [10**9] * 3
    ranges = time_ranges(stream.ledger.records, stream.now)
    assert [(each.known, each.num_frames) for each in ranges] == [("forgotten", 0), ("whole", 6)]


def test_a_mark_ends_when_the_memory_starts_over_and_holds_until_then(model: DirectedModel):
    stream = memory(model)
    stream.append(chunk(0))
    stream.mark("one")
    stream.append(chunk(2))
    stream.rollback("one")
    chunks = [chunk(0), chunk(4), chunk(6), chunk(8)]
    for each in chunks[1:]:
        assert stream.ledger.marks
        stream.append(each)
    assert not stream.ledger.marks and is_as_new(model, stream, chunks[1:])
    stream.reset()
    stream.append(chunk(10))
    assert is_as_new(model, stream, [chunk(10)])


def test_what_it_keeps_beside_keys_and_values_is_counted_and_bounded(model: DirectedModel):
    stream = memory(model)
    reserved = stream.info().resident_bytes
    sizes = []
    for i in range(6):
        stream.append(chunk(2 * i))
        sizes.append(stream.info().resident_bytes - reserved)
    per_chunk = 6 * model.config.text_config.hidden_size * 4
    assert sizes == [per_chunk, 2 * per_chunk, *[3 * per_chunk] * 4]


# Questions in flight


@pytest.fixture
def engine(model: DirectedModel) -> Iterator[Engine]:
    """An engine whose stream holds all it may."""
    engine = Engine(model, max_concurrent_questions=3, max_waiting_questions=8, scratch_tokens=128)
    engine.start()
    engine.add_stream(options(model)).result(WAIT_S)
    for i in range(3):
        engine.encode("front", chunk(2 * i)).result(WAIT_S)
    yield engine
    model.let_go()
    assert engine.close(WAIT_S)


def ask(engine: Engine, max_new_tokens: int = 4) -> Future[Answer]:
    request = Ask(stream="front", question=QUESTION, max_new_tokens=max_new_tokens)
    return engine.ask(request, arrived=time.monotonic())


def test_a_chunk_waits_for_the_answer_that_reads_what_it_would_write(engine: Engine, model: DirectedModel):
    alone = ask(engine, 40).result(WAIT_S)
    model.hold()
    question = ask(engine, 40)
    model.wait_until_held()
    encoding = engine.encode("front", chunk(6))
    answered_first = []
    encoding.add_done_callback(lambda _: answered_first.append(question.done()))
    model.let_go()
    assert encoding.result(WAIT_S).num_forgotten_frames == 2
    assert question.result(WAIT_S).text == alone.text and question.result().memory.unchanged
    assert answered_first == [True]


def test_a_question_that_comes_while_chunks_are_encoded_again_is_about_all_of_them(
    engine: Engine, model: DirectedModel
):
    model.hold()
    encoding = engine.encode("front", chunk(6))
    model.wait_until_held()
    question = ask(engine)
    assert engine.cache_info("front").num_frames == 6
    model.let_go()
    answer = question.result(WAIT_S)
    assert encoding.done() and answer.memory.unchanged
    assert (answer.memory.num_frames, answer.memory.until_seq) == (6, 7)
    assert is_as_new(model, engine._memories["front"], [chunk(2), chunk(4), chunk(6)])


# What fails


def test_what_fails_while_the_rest_is_encoded_again_leaves_an_empty_memory_and_says_so(model: DirectedModel):
    stream = memory(model)
    for i in range(3):
        stream.append(chunk(2 * i))
    model.fail_with = torch.OutOfMemoryError("no more")
    with pytest.raises(ChunkRefused, match="no more") as refused:
        stream.append(chunk(6))
    model.fail_with = None
    info = stream.info()
    assert refused.value.reason == "out_of_memory"
    assert (info.num_frames, info.num_tokens, info.num_forgotten_frames) == (0, 0, 6)
    assert stream.append(chunk(8)).num_forgotten_frames == 6
    assert is_as_new(model, stream, [chunk(8)]) and numbers(stream) == [3]


def test_what_fails_in_the_new_chunk_leaves_the_others(model: DirectedModel):
    class FailsLast(DirectedModel):
        def encode(self, *arguments: Any, **named: Any) -> Any:
            self.fail_with = torch.OutOfMemoryError("no more")
            return super().encode(*arguments, **named)

    stream = memory(model)
    for i in range(3):
        stream.append(chunk(2 * i))
    stream.model = FailsLast(model)
    with pytest.raises(ChunkRefused):
        stream.append(chunk(6))
    assert numbers(stream) == [1, 2] and is_as_new(model, stream, [chunk(2), chunk(4)])
    stream.model = model
    stream.append(chunk(8))
    assert numbers(stream) == [1, 2, 3] and is_as_new(model, stream, [chunk(2), chunk(4), chunk(8)])


# Room


def test_frames_that_do_not_fit_are_refused_with_the_first_chunk_and_with_the_figures(
    model: DirectedModel, caplog: pytest.LogCaptureFixture
):
    stream = memory(model, 40, num_tokens=90)
    for seq in (0, 2):
        with pytest.raises(ChunkRefused, match=r"last_frames 40 take \d+ tokens .* and 10 of 20 chunks fit") as refused:
            stream.append(chunk(seq))
    assert refused.value.reason == "memory_full"
    assert stream.info().full and stream.info().limit == "memory"
    assert len([record for record in caplog.records if "last_frames 40" in record.message]) == 1


def test_a_stream_that_can_never_hold_its_last_frames_is_not_added(model: DirectedModel):
    fits = options(model, 6, 200, encode_size=(84, 56))
    assert (forecast(model, fits).num_chunks, forecast(model, fits).limit) == (3, "memory")
    with pytest.raises(NodeError, match="last 200 frames of stream front takes") as refused:
        forecast(model, replace(fits, last_frames=200))
    assert refused.value.code == "TOO_LARGE"


def test_a_memory_keeps_the_room_that_its_last_frames_need(model: DirectedModel):
    stream = memory(model, 6)
    for first_seq in range(0, 10, 2):
        stream.append(chunk(first_seq))
    stream.resize(50 * model.kv_shape.bytes_per_token)
    assert stream.now.num_frames == 6 and stream.append(chunk(10)).num_forgotten_frames == 2
    with pytest.raises(ValueError, match="the last 6 frames do not fit"):
        stream.resize(44 * model.kv_shape.bytes_per_token)
    assert stream.now.num_frames == 6 and stream.append(chunk(12)).num_forgotten_frames == 2


def test_where_mixed_sizes_leave_no_room_for_all_fewer_are_held(model: DirectedModel):
    stream = memory(model, 6, num_tokens=67)
    for i in range(8):
        stream.append(chunk(2 * i, grid=(4, 3) if i % 2 else (3, 4)))
    assert stream.now.num_chunks == 2 and stream.now.num_tokens <= 67
    assert is_as_new(model, stream, [chunk(12, grid=(3, 4)), chunk(14, grid=(4, 3))])


def test_positions_never_end(model: DirectedModel):
    stream = memory(model)
    for i in range(4):
        stream.append(chunk(2 * 10**6 * i))  # hours apart
    assert numbers(stream) == [3] and stream.info().positions_used < 100


@pytest.mark.parametrize(
    "changes", [{"last_frames": 3}, {"last_frames": -1}, {"retention": "window"}, {"retention": "reset"}, {"drop": 0.9}]
)
def test_what_makes_no_sense_with_it_is_refused_by_name(changes: dict[str, Any]):
    with pytest.raises(ValueError, match="last_frames"):
        StreamOptions("front", **{"last_frames": 8, **changes})
    assert StreamOptions("front", last_frames=8, drop=1.0, gate=10.0).last_frames == 8


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.sampled_from(["append", "append", "append", "small", "mark", "rollback", "reset", "fail"]), max_size=8)
)
def test_whatever_happens_it_is_a_new_stream_of_what_it_holds(checkpoints: Checkpoints, happens: list[str]):
    model = DirectedModel(checkpoints.model("qwen2_5_vl"))
    stream, chunks, num_encoded, num_forgotten = memory(model, 8, chunk_frames=4), {}, 0, 0
    for i, event in enumerate(["append", *happens]):
        new = chunk(4 * i, 4) if event != "small" else chunk(4 * i, 2)
        match event:
            case "mark":
                stream.mark("m")
            case "rollback" if "m" in stream.ledger.marks:
                stream.rollback("m")
            case "reset":
                stream.reset()
                num_encoded = num_forgotten = 0
            case "append" | "small" | "fail":
                model.fail_with = RuntimeError("broken") if event == "fail" else None
                try:
                    encoded = stream.append(new)
                except RuntimeError:
                    continue
                finally:
                    model.fail_with = None
                chunks[new.pictures[0].seq] = new
                num_encoded += new.num_frames
                num_forgotten += encoded.num_forgotten_frames
        held = [chunks[record.first_seq] for record in stream.ledger.records]
        assert stream.now.num_frames == sum(each.num_frames for each in held) <= 8
        assert not held or is_as_new(model, stream, held)
        if "rollback" not in happens and "fail" not in happens:
            assert num_encoded == stream.now.num_frames + num_forgotten
            assert num_forgotten == stream.now.forgotten.num_frames
