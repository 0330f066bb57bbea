import random
import threading
import time
import weakref
from concurrent.futures import Future, wait
from typing import Any

import pytest
import torch
from checkpoints import FRAME_NS, DirectedModel, are_equal, chunk, memory, rows
from deadline import until
from engines import (
    NUM_SLOTS,
    WAIT_S,
    add,
    ask,
    ask_choice,
    code_of,
    encode,
    held_in_a_chunk,
    held_in_an_answer,
    is_at_rest,
    open_questions,
    reason_of,
    the_memory,
)
from msgspec import UNSET

from onlooker.node.chunk import Chunk, Unchanged
from onlooker.node.engine import MAX_MARKS, Engine, load_engine
from onlooker.node.engine_protocol import EngineProtocol
from onlooker.node.layout import LayoutState, NativeLayout, Patches, Span
from onlooker.node.options import StreamOptions
from onlooker.node.vram import VramMeter
from onlooker.protocol.errors import NodeError
from onlooker.protocol.messages import Vram

# Streams


def test_it_fits_the_protocol(engine: Engine):
    def takes(engine: EngineProtocol) -> list[str]:
        return engine.streams()

    assert takes(engine) == ["front"]


def test_it_says_what_is_loaded(engine: Engine, model: DirectedModel):
    info = engine.model
    assert (info.model_type, info.dtype, info.device) == ("qwen2_5_vl", "float32", "cpu")
    assert info.max_new_tokens == 64 and info.max_options >= 2


def test_a_stream_is_there_once_it_is_added_and_gone_once_it_is_removed(engine: Engine, model: DirectedModel):
    add(engine, model, "back")
    assert engine.streams() == ["front", "back"]
    assert engine.cache_info("back").num_tokens == 0
    engine.remove_stream("front").result(WAIT_S)
    assert engine.streams() == ["back"]
    with pytest.raises(NodeError) as unknown:
        engine.cache_info("front")
    assert unknown.value.code == "UNKNOWN_STREAM" and unknown.value.details == {"streams": ["back"]}


def test_a_stream_that_cannot_be_added_has_its_code(engine: Engine):
    assert code_of(engine.add_stream(StreamOptions("front"))) == "STREAM_EXISTS"
    assert code_of(engine.add_stream(StreamOptions("tiny", memory_bytes=1))) == "TOO_LARGE"
    assert code_of(engine.add_stream(StreamOptions("giant", memory_bytes=1 << 60))) == "OUT_OF_MEMORY"
    assert engine.streams() == ["front"]


class ScarceDevice(VramMeter):
    """A device that says how much is free, and of which a tenth is not touched."""

    def __init__(self, free_bytes: int) -> None:
        super().__init__(torch.device("cpu"))
        self.free_bytes = free_bytes

    def read(self, *, weights_bytes: int, kv_bytes: int) -> Vram:
        known = {"total_bytes": 2 * self.free_bytes, "free_bytes": self.free_bytes, "activations_peak_bytes": 0}
        known |= {"torch_allocated_bytes": 0, "torch_reserved_bytes": 0}
        return Vram(device="cuda:0", weights_bytes=weights_bytes, kv_bytes=kv_bytes, **known)


def test_a_stream_reserves_no_more_than_its_device_has_room_for(engine: Engine):
    engine._meter = ScarceDevice(1_000_000)
    options = StreamOptions("less", memory_bytes=2_000_000, min_memory_bytes=900_000)
    assert engine.add_stream(options).result(WAIT_S).memory_bytes == 900_000
    assert code_of(engine.add_stream(StreamOptions("more", memory_bytes=900_001))) == "OUT_OF_MEMORY"
    assert engine.cache_info("less").resident_bytes <= 900_000


def test_every_verb_about_an_unknown_stream_says_so(engine: Engine):
    verbs = (engine.remove_stream, engine.reset, engine.marks)
    named = (engine.mark, engine.rollback, engine.delete_mark)
    futures = [verb("back") for verb in verbs] + [verb("back", "here") for verb in named]
    assert {code_of(future) for future in futures} == {"UNKNOWN_STREAM"}
    assert code_of(ask(engine, stream="back")) == code_of(ask_choice(engine, stream="back")) == "UNKNOWN_STREAM"
    assert reason_of(engine.encode("back", chunk(0))) == "removed"


def test_the_figures_of_a_memory_follow_its_chunks(engine: Engine, model: DirectedModel):
    encoded = [engine.encode("front", chunk(seq)).result(WAIT_S) for seq in (0, 2)]
    info = engine.cache_info("front")
    assert info.num_tokens == sum(each.num_tokens for each in encoded)
    assert info.logical_bytes == info.num_tokens * model.kv_shape.bytes_per_token
    assert (info.num_chunks, info.newest_seq) == (2, 3)


def test_how_long_nothing_has_changed_is_a_fact_of_the_memory_and_of_a_mark(engine: Engine):
    engine.note_unchanged("back", Unchanged(0, 1))  # a stream that is gone, for all that the sender knows
    engine.note_unchanged("front", Unchanged(FRAME_NS, 10 * FRAME_NS))  # while its chunk is on its way
    encode(engine, 0)
    assert engine.cache_info("front").seen_until_ns == 10 * FRAME_NS
    engine.mark("front", "still").result(WAIT_S)
    engine.note_unchanged("front", Unchanged(FRAME_NS, 11 * FRAME_NS))
    until(lambda: engine.cache_info("front").seen_until_ns == 11 * FRAME_NS)
    encode(engine, 2)
    assert engine.cache_info("front").seen_until_ns is UNSET
    assert ask(engine, as_of="still").result(WAIT_S).memory.seen_until_ns == 10 * FRAME_NS


def test_device_memory_counts_weights_streams_and_scratch(engine: Engine, model: DirectedModel):
    bytes_per_token = model.kv_shape.bytes_per_token
    expected = (512 + NUM_SLOTS * 128) * bytes_per_token
    engine._vram_due = 0.0  # rather than in a second
    until(lambda: engine.vram().kv_bytes == expected)
    assert engine.vram().weights_bytes == model.weights_bytes


def test_a_removed_stream_gives_its_storage_back_though_somebody_knows_its_memory(engine: Engine):
    encode(engine, 0)
    known = the_memory(engine)
    storage = [weakref.ref(tensor) for tensor in (*known._arena.keys, *known._arena.values)]
    assert all(tensor() is not None for tensor in storage)
    engine.remove_stream("front").result(WAIT_S)
    assert [tensor() for tensor in storage] == [None] * len(storage)


# Chunks


def test_streams_take_turns(engine: Engine, model: DirectedModel):
    add(engine, model, "back")
    first = held_in_a_chunk(engine, model)
    order: list[str] = []
    futures = [first]
    for stream in ("front", "front", "front", "back", "back"):
        future = engine.encode(stream, chunk(0))
        future.add_done_callback(lambda _, stream=stream: order.append(stream))
        futures.append(future)
    model.let_go()
    wait(futures, WAIT_S)
    assert order == ["back", "front", "back", "front", "front"]


def test_chunks_that_wait_in_several_streams_are_encoded_together(model: DirectedModel):
    engine = Engine(model, max_together=4)
    engine.start()
    names = ("front", "back", "left", "right", "full")
    for name in names:
        add(engine, model, name, num_tokens=45 if name == "full" else 512)
    encode(engine, 0, 2, stream="full")
    held = held_in_a_chunk(engine, model)
    num_reads = model.num_reads
    futures = [engine.encode(name, chunk(4)) for name in names for _ in range(2)]
    model.let_go()
    wait([held, *futures], WAIT_S)
    assert [reason_of(future) for future in futures[-2:]] == ["memory_full"] * 2
    assert [engine.cache_info(name).num_frames for name in names] == [6, 4, 4, 4, 4]
    assert model.num_reads - num_reads == 2, "four and four"
    assert engine.close(WAIT_S)


def test_one_failure_in_chunks_encoded_together_costs_no_other_stream_its_chunk(model: DirectedModel):
    engine = Engine(model, max_together=4)
    engine.start()
    add(engine, model, "front")
    add(engine, model, "back")
    held = held_in_a_chunk(engine, model)
    futures = [engine.encode(name, chunk(0)) for name in ("back", "front")]
    model.fail_with = RuntimeError("in layer 1")
    futures[0].add_done_callback(lambda _: setattr(model, "fail_with", None))
    model.let_go()
    wait([held, *futures], WAIT_S)
    assert reason_of(held) == "encode_error" and reason_of(futures[0]) == "encode_error"
    assert futures[1].result().num_tokens and engine.cache_info("front").num_frames == 2
    assert engine.close(WAIT_S)


def test_chunks_of_a_stream_are_encoded_in_the_order_given(engine: Engine):
    futures = [engine.encode("front", chunk(seq)) for seq in range(0, 20, 2)]
    wait(futures, WAIT_S)
    assert [record.first_seq for record in the_memory(engine).ledger.records] == list(range(0, 20, 2))


class BrokenLayout(NativeLayout):
    """Cannot lay out one of the chunks."""

    def extend(self, state: LayoutState, patches: Patches) -> tuple[Span, LayoutState]:
        if patches.times_ns[0][0] == 2 * FRAME_NS:
            raise ZeroDivisionError("a defect")
        return super().extend(state, patches)


def test_a_defect_in_what_is_asked_before_a_chunk_costs_that_chunk_alone(engine: Engine, model: DirectedModel):
    the_memory(engine).layout = BrokenLayout(model.format)
    futures = [engine.encode("front", chunk(seq)) for seq in (0, 2, 4)]
    assert reason_of(futures[1]) == "encode_error"
    assert futures[2].result(WAIT_S).num_tokens and engine.cache_info("front").num_frames == 4


def test_an_exception_in_a_chunk_costs_that_chunk_alone(engine: Engine, model: DirectedModel):
    encode(engine, 0)
    before = rows(the_memory(engine))
    model.fail_with = RuntimeError("in layer 1")
    failed = engine.encode("front", chunk(2))
    assert reason_of(failed) == "encode_error" and "in layer 1" in str(failed.exception())
    assert model.fail_with.__traceback__ is None, "activations are held by it"
    assert are_equal(rows(the_memory(engine)), before)
    model.fail_with = None
    encode(engine, 2)
    assert engine.cache_info("front").num_frames == 4
    assert ask(engine).result(WAIT_S).memory.unchanged


def test_a_full_memory_refuses_chunks_and_goes_on_answering(engine: Engine, model: DirectedModel):
    add(engine, model, "small", num_tokens=45)
    encode(engine, 0, 2, stream="small")
    assert reason_of(engine.encode("small", chunk(4))) == "memory_full"
    assert engine.cache_info("small").full
    answer = ask(engine, stream="small").result(WAIT_S)
    assert answer.memory.until_seq == 3 and answer.memory.unchanged


def test_a_chunk_whose_caller_has_gone_is_not_encoded(engine: Engine, model: DirectedModel):
    running = held_in_a_chunk(engine, model)
    waiting = engine.encode("front", chunk(0))
    assert waiting.cancel() and not running.cancel()  # what runs ends up in the memory, and its future says so
    model.let_go()
    assert running.result(WAIT_S).num_tokens > 0
    assert not wait([waiting], WAIT_S).not_done
    encode(engine, 2)
    assert engine.cache_info("front").num_chunks == 2


# Cutting a memory back


def test_a_reset_cancels_what_runs_and_refuses_what_waits(engine: Engine, model: DirectedModel):
    encode(engine, 0)
    engine.mark("front", "here").result(WAIT_S)
    running = held_in_an_answer(engine, model)
    waiting = engine.encode("front", chunk(2))
    reset = engine.reset("front")
    after = engine.encode("front", chunk(4))
    model.let_go()
    assert reset.result(WAIT_S).num_tokens == 0
    assert code_of(running) == "CANCELLED" and reason_of(waiting) == "reset"
    assert after.result(WAIT_S).num_tokens > 0
    assert engine.marks("front").result(WAIT_S).marks == []
    assert engine.cache_info("front").newest_seq == 5
    assert is_at_rest(engine)


def test_a_removal_cancels_what_runs_and_refuses_what_waits(engine: Engine, model: DirectedModel):
    add(engine, model, "back")
    encode(engine, 0)
    encode(engine, 0, stream="back")
    running = held_in_an_answer(engine, model)
    elsewhere = ask(engine, stream="back")
    waiting = engine.encode("front", chunk(2))
    removed = engine.remove_stream("front")
    model.let_go()
    assert removed.result(WAIT_S) is None
    assert code_of(running) == "CANCELLED" and reason_of(waiting) == "removed"
    assert elsewhere.result(WAIT_S).memory.unchanged


def test_a_question_that_waits_for_a_stream_that_goes_is_told_so(engine: Engine, model: DirectedModel):
    encode(engine, 0)
    held_in_an_answer(engine, model)
    questions = [ask(engine), ask(engine)]
    engine.remove_stream("front")
    model.let_go()
    assert [code_of(question) for question in questions] == ["UNKNOWN_STREAM"] * 2


def test_a_rollback_spares_the_questions_that_read_no_further_than_the_mark(engine: Engine, model: DirectedModel):
    encode(engine, 0)
    engine.mark("front", "here").result(WAIT_S)
    expected = ask(engine, max_new_tokens=40).result(WAIT_S).text
    encode(engine, 2)
    engine.mark("front", "later").result(WAIT_S)
    spared = held_in_an_answer(engine, model, as_of="here")
    beyond = held_in_an_answer(engine, model)
    rollback, waiting = engine.rollback("front", "here"), engine.encode("front", chunk(6))
    after = engine.encode("front", chunk(4))
    model.let_go()
    assert rollback.result(WAIT_S).num_frames == 2
    assert code_of(beyond) == "CANCELLED"
    assert spared.result(WAIT_S).text == expected
    assert waiting.result(WAIT_S).num_tokens == after.result(WAIT_S).num_tokens  # they came after the rollback
    assert [mark.name for mark in engine.marks("front").result(WAIT_S).marks] == ["here"]


def test_a_rollback_refuses_the_chunks_that_wait(engine: Engine, model: DirectedModel):
    encode(engine, 0)
    engine.mark("front", "here").result(WAIT_S)
    running = held_in_a_chunk(engine, model, 2)
    waiting = engine.encode("front", chunk(4))
    rollback = engine.rollback("front", "here")
    model.let_go()
    assert running.result(WAIT_S).num_tokens > 0 and reason_of(waiting) == "reset"
    assert rollback.result(WAIT_S).num_frames == engine.cache_info("front").num_frames == 2


def test_marks_are_listed_moved_and_deleted(engine: Engine):
    encode(engine, 0)
    engine.mark("front", "a").result(WAIT_S)
    engine.mark("front", "b").result(WAIT_S)
    encode(engine, 2)
    engine.mark("front", "a").result(WAIT_S)
    listed = {mark.name: mark.num_frames for mark in engine.marks("front").result(WAIT_S).marks}
    assert listed == {"a": 4, "b": 2}
    left = engine.delete_mark("front", "a").result(WAIT_S)
    assert [(mark.name, mark.until_ns) for mark in left.marks] == [("b", 500_000_007)]


def test_marks_are_bounded_and_a_known_one_may_still_move(engine: Engine):
    encode(engine, 0)
    for number in range(MAX_MARKS):
        engine.mark("front", f"m{number}").result(WAIT_S)
    with pytest.raises(NodeError) as caught:
        engine.mark("front", "one too many").result(WAIT_S)
    assert caught.value.code == "TOO_LARGE"
    assert engine.mark("front", "m0").result(WAIT_S).num_frames == 2


# The end


def test_closing_ends_open_work_and_turns_later_work_away(engine: Engine, model: DirectedModel):
    encode(engine, 0)
    running = held_in_an_answer(engine, model)
    waiting, chunk_waiting = ask(engine), engine.encode("front", chunk(2))
    assert not engine.close(timeout_s=0.01)
    assert not engine.is_ready
    model.let_go()
    assert engine.close(WAIT_S)
    assert code_of(running) == code_of(waiting) == "NOT_READY"
    assert reason_of(chunk_waiting) == "removed"
    late = [ask(engine), ask_choice(engine), engine.reset("front"), engine.mark("front", "a"), engine.marks("front")]
    assert {code_of(future) for future in late} == {"NOT_READY"}
    assert reason_of(engine.encode("front", chunk(4))) == "removed"
    assert engine.question_counters().failed == {"NOT_READY": 2} and is_at_rest(engine)


def test_an_engine_that_was_never_started_can_be_closed(model: DirectedModel):
    engine = Engine(model, max_concurrent_questions=1, scratch_tokens=16)
    never = engine.add_stream(StreamOptions("front", memory_bytes=1 << 20))
    question = ask(engine)
    assert engine.close()
    assert never.done() and code_of(question) in ("NOT_READY", "UNKNOWN_STREAM", "NO_FRAMES")
    assert code_of(ask(engine)) == "NOT_READY"


def test_nobody_waits_for_an_engine_that_has_failed(engine: Engine, model: DirectedModel):
    encode(engine, 0)

    class BrokenMeter:
        def read(self, **_: int) -> None:
            raise RuntimeError("the device is gone")

    running = held_in_an_answer(engine, model, max_new_tokens=60)
    engine._meter = BrokenMeter()  # type: ignore[assignment]
    engine._vram_due = 0.0
    model.let_go()
    assert code_of(running) == "NOT_READY"
    until(lambda: not engine.is_ready)
    assert code_of(ask(engine)) == "NOT_READY"


def test_the_builtin_model_has_nothing_to_say_with_every_answer():
    engine = load_engine(device="cpu", max_concurrent_questions=1, scratch_tokens=128)
    try:
        engine.add_stream(StreamOptions("front", memory_bytes=1 << 20)).result(WAIT_S)
        encode(engine, 0)
        answer = ask(engine).result(WAIT_S)
        assert answer.notice is UNSET and engine.model.notice is None
        assert engine.progress_age_ms < 10_000
    finally:
        assert engine.close(WAIT_S)
    assert not engine.is_ready


# The storm


class Camera:
    """One stream's owner: encodes, marks, rolls back and resets at random, and knows what must be left of it."""

    def __init__(self, engine: Engine, stream: str, seed: int) -> None:
        self._engine = engine
        self._stream = stream
        self._random = random.Random(seed)
        self._log: list[tuple[str, str, Chunk | None, Future[Any]]] = []

    def run(self, num_verbs: int) -> None:
        engine, stream = self._engine, self._stream
        for i in range(num_verbs):
            verb = self._random.choices(["encode", "mark", "rollback", "reset", "cancel"], [14, 3, 2, 1, 2])[0]
            name = self._random.choice("ab")
            if verb in ("encode", "cancel"):
                new = chunk(1000 * i, self._random.choice([1, 2, 4]))
                future: Future[Any] = engine.encode(stream, new)
                if verb == "cancel":
                    future.cancel()
                self._log.append(("encode", "", new, future))
            elif verb == "reset":
                self._log.append((verb, "", None, engine.reset(stream)))
            else:
                self._log.append((verb, name, None, getattr(engine, verb)(stream, name)))
            if self._random.random() < 0.2:
                wait([self._log[-1][3]], WAIT_S)
        wait([future for *_, future in self._log], WAIT_S)

    def survivors(self) -> list[Chunk]:
        """The chunks that must be in the memory, by what their futures say."""
        kept: list[tuple[Chunk, int]] = []
        marks: dict[str, int] = {}
        for verb, name, new, future in self._log:
            assert future.done()
            if future.cancelled() or future.exception() is not None:
                continue
            if verb == "encode" and new is not None:
                kept.append((new, future.result().num_tokens))
            elif verb == "mark":
                marks[name] = future.result().num_tokens
            elif verb == "reset":
                kept, marks = [], {}
            else:
                while sum(num for _, num in kept) > marks[name]:
                    kept.pop()
                marks = {n: num for n, num in marks.items() if num <= marks[name]}
        return [new for new, _ in kept]


@pytest.mark.parametrize("seed", range(3))
def test_after_a_storm_each_memory_is_that_of_its_surviving_chunks(engine: Engine, model: DirectedModel, seed: int):
    add(engine, model, "back")
    cameras = {name: Camera(engine, name, seed * 2 + i) for i, name in enumerate(("front", "back"))}
    is_over = threading.Event()
    codes: list[str] = []

    def inquire(seed: int) -> None:
        draw = random.Random(seed)
        while not is_over.is_set():
            stream = draw.choice(["front", "back"])
            deadline = time.monotonic() + draw.choice([0.0, 0.01, 5.0])
            if draw.random() < 0.3:
                future: Future[Any] = ask_choice(engine, stream=stream)
            else:
                as_of = draw.choice([UNSET, "a"])
                future = ask(engine, deadline, stream=stream, as_of=as_of, max_new_tokens=draw.randint(1, 9))
            if draw.random() < 0.2:
                future.cancel()
            wait([future], WAIT_S)
            if not future.cancelled():
                error = future.exception()
                codes.append("answered" if error is None else getattr(error, "code", repr(error)))
            open_questions(engine.question_counters())

    askers = [threading.Thread(target=inquire, args=(100 * seed + i,)) for i in range(4)]
    owners = [threading.Thread(target=camera.run, args=(40,)) for camera in cameras.values()]
    for thread in [*askers, *owners]:
        thread.start()
    for thread in owners:
        thread.join(WAIT_S)
    is_over.set()
    for thread in askers:
        thread.join(WAIT_S)
    assert not any(thread.is_alive() for thread in [*askers, *owners])
    until(lambda: is_at_rest(engine))
    assert engine.is_ready and engine.question_counters().traces == 0
    allowed = {"answered", "NO_FRAMES", "UNKNOWN_MARK", "CANCELLED", "DEADLINE_EXCEEDED", "BUSY"}
    assert "answered" in codes and set(codes) <= allowed
    for name, camera in cameras.items():
        never_disturbed = memory(model)
        for each in camera.survivors():
            never_disturbed.append(each)
        assert the_memory(engine, name).now == never_disturbed.now
        assert are_equal(rows(the_memory(engine, name)), rows(never_disturbed))
