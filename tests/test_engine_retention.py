"""Forgetting while questions are answered: what is being read goes aside, and nobody waits for ever."""

import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from dataclasses import replace

import numpy as np
import pytest
import torch
from checkpoints import DirectedModel, are_equal, chunk, rows
from deadline import until

from onlooker.node.arena import Arena
from onlooker.node.engine import Engine
from onlooker.node.memory import StreamMemory
from onlooker.node.options import StreamOptions
from onlooker.protocol.errors import NodeError
from onlooker.protocol.messages import Answer, Ask

WAIT_S = 30.0
QUESTION = "What do you see now?"


@pytest.fixture
def engine(model: DirectedModel) -> Iterator[Engine]:
    engine = Engine(model, max_concurrent_questions=3, max_waiting_questions=8, scratch_tokens=128)
    engine.start()
    yield engine
    model.let_go()
    assert engine.close(WAIT_S)


def add(engine: Engine, model: DirectedModel, retention: str, num_tokens: int = 90, name: str = "front") -> None:
    num_bytes = num_tokens * model.kv_shape.bytes_per_token
    options = StreamOptions(name, chunk_frames=2, min_pixels=1, memory_bytes=num_bytes, retention=retention)  # type: ignore[arg-type]
    engine.add_stream(options).result(WAIT_S)


def the_memory(engine: Engine, stream: str = "front") -> StreamMemory:
    return engine._memories[stream]


def ask(engine: Engine, max_new_tokens: int = 4, stream: str = "front", **settings: object) -> Future[Answer]:
    request = Ask(stream=stream, question=QUESTION, max_new_tokens=max_new_tokens, **settings)  # type: ignore[arg-type]
    return engine.ask(request, arrived=time.monotonic())


def encode(engine: Engine, seqs: range, stream: str = "front") -> int:
    """Encode chunks one after another; returns how many frames were forgotten for them."""
    return sum(engine.encode(stream, chunk(seq)).result(WAIT_S).num_forgotten_frames for seq in seqs)


def fill(engine: Engine, seq: int = 0) -> int:
    """Encode chunks from a sequence number on; returns that of the first for which others must be forgotten."""
    while not the_memory(engine).plan(chunk(seq)).must_forget:
        engine.encode("front", chunk(seq)).result(WAIT_S)
        seq += 2
    return seq


@pytest.mark.parametrize("retention", ["reset", "window", "thin"])
def test_a_stream_that_forgets_takes_chunks_without_end_and_counts_them(
    engine: Engine, model: DirectedModel, retention: str
):
    add(engine, model, retention)
    num_forgotten = encode(engine, range(0, 120, 2))
    info = engine.cache_info("front")
    assert info.num_frames + info.num_forgotten_frames == 120 and num_forgotten == info.num_forgotten_frames > 60
    assert not info.full and info.num_tokens <= info.capacity_tokens
    assert ask(engine).result(WAIT_S).memory.unchanged


@pytest.mark.parametrize("retention", ["reset", "window", "thin"])
def test_questions_in_flight_leave_no_trace_while_chunks_make_the_memory_forget(
    engine: Engine, model: DirectedModel, retention: str
):
    add(engine, model, retention)
    questions: list[Future[Answer]] = []
    encode(engine, range(0, 2, 2))
    for seq in range(2, 120, 2):
        if len([question for question in questions if not question.done()]) < 6:
            questions.append(ask(engine, max_new_tokens=2 + seq % 7))
        engine.encode("front", chunk(seq)).result(WAIT_S)
    answers = [question.result(WAIT_S) for question in questions]
    assert all(answer.memory.unchanged for answer in answers) and len(answers) > 20
    for answer in answers:
        seen = answer.memory.num_frames + answer.memory.num_forgotten_frames
        assert seen == answer.memory.until_seq + 1
    assert engine.question_counters().traces == 0
    add(engine, model, retention, name="never asked")
    encode(engine, range(0, 120, 2), "never asked")
    asked, never = the_memory(engine), the_memory(engine, "never asked")
    assert asked.now == never.now and asked.now.forgotten.num_frames > 60
    assert are_equal(rows(asked), rows(never))


def test_an_answer_that_reads_while_forgetting_is_due_is_the_one_it_would_have_been(
    engine: Engine, model: DirectedModel
):
    add(engine, model, "window")
    add(engine, model, "stop", 1000, "alone")
    seq = 0
    while not the_memory(engine).plan(chunk(seq)).must_forget:
        engine.encode("front", chunk(seq)).result(WAIT_S)
        engine.encode("alone", chunk(seq)).result(WAIT_S)
        seq += 2
    undisturbed = ask(engine, 40, "alone").result(WAIT_S)
    before = rows(the_memory(engine))
    model.hold()
    question = ask(engine, 40)
    model.wait_until_held()
    chunks = [engine.encode("front", chunk(later)) for later in range(seq, seq + 40, 2)]
    model.let_go()
    answer = question.result(WAIT_S)
    assert answer.text == undisturbed.text and answer.memory.unchanged
    assert answer.memory.num_tokens == len(before[0])
    assert not wait(chunks, WAIT_S).not_done
    assert all(future.exception() is None for future in chunks)
    assert engine.cache_info("front").num_forgotten_frames > 0


def test_the_figures_follow_a_share_of_the_memory_at_once(engine: Engine, model: DirectedModel):
    add(engine, model, "window", 400)
    encode(engine, range(0, 4, 2))
    halved = replace(the_memory(engine).options, memory_share=0.5)
    engine.adjust("front", halved).result(WAIT_S)
    assert engine.cache_info("front").capacity_tokens == 175


def test_a_chunk_that_fails_after_others_were_forgotten_for_it_leaves_the_figures_true(
    engine: Engine, model: DirectedModel
):
    add(engine, model, "window")
    seqs = iter(range(0, 120, 2))
    while not the_memory(engine).plan(chunk(seq := next(seqs))).must_forget:
        engine.encode("front", chunk(seq)).result(WAIT_S)
    model.fail_with = RuntimeError("in layer 1")
    failed = engine.encode("front", chunk(seq))
    assert getattr(failed.exception(WAIT_S), "reason", None) == "encode_error"
    info = engine.cache_info("front")
    assert info == the_memory(engine).info() and info.num_forgotten_frames > 0


@pytest.mark.parametrize("retention", ["window", "thin"])
def test_neither_chunks_nor_new_questions_wait_for_an_answer_that_reads_what_is_forgotten(
    engine: Engine, model: DirectedModel, retention: str
):
    add(engine, model, retention, 400)
    encode(engine, range(0, 150, 2))  # the first time, thinning frees more than is reserved for readers
    seq = fill(engine, 150)
    order: list[str] = []
    model.hold()
    running = ask(engine, 60)
    model.wait_until_held()
    due, late = engine.encode("front", chunk(seq)), ask(engine, 2)
    for name, future in (("running", running), ("due", due), ("late", late)):
        future.add_done_callback(lambda _, name=name: order.append(name))
    model.let_go()
    assert due.result(WAIT_S).num_forgotten_frames > 0 and late.result(WAIT_S).memory.unchanged
    assert running.result(WAIT_S).memory.unchanged
    assert running.result().memory.num_forgotten_frames < engine.cache_info("front").num_forgotten_frames
    until(lambda: len(order) == 3)
    assert order[-1] == "running"


def test_a_question_that_comes_while_chunks_encoded_together_are_tried_again_reads_no_row_that_moves(
    engine: Engine, model: DirectedModel, monkeypatch: pytest.MonkeyPatch
):
    engine._max_together = 2
    for name, retention in (("front", "window"), ("back", "reset")):
        add(engine, model, retention, 78, name)
        encode(engine, range(0, 16, 2), name)
        assert the_memory(engine, name).plan(chunk(16)).must_forget
    questions: list[Future[Answer]] = []
    gather = Arena.gather

    def without_room_at_first(arena: Arena, rows: np.ndarray, to: int) -> None:
        if not questions:
            questions.append(ask(engine, 40, "back"))
            raise torch.OutOfMemoryError("no room for what stays")
        gather(arena, rows, to)

    monkeypatch.setattr(Arena, "gather", without_room_at_first)
    model.hold()
    held = ask(engine, 1)
    model.wait_until_held()
    chunks = [engine.encode(name, chunk(16)) for name in ("front", "back")]
    model.let_go()
    assert held.result(WAIT_S) and all(future.result(WAIT_S).num_tokens for future in chunks)
    assert questions[0].result(WAIT_S).memory.unchanged and questions[0].result().memory.until_seq == 17


def test_a_question_goes_on_with_what_it_reads_while_its_stream_gets_less_room(engine: Engine, model: DirectedModel):
    add(engine, model, "window", 400)
    encode(engine, range(0, 100, 2))
    alone = ask(engine, 30).result(WAIT_S)
    model.hold()
    running = ask(engine, 30)
    model.wait_until_held()
    resized, late = engine.resize("front", 120 * model.kv_shape.bytes_per_token), ask(engine, 2)
    model.let_go()
    assert resized.result(WAIT_S).memory_bytes == engine.cache_info("front").resident_bytes < 400 * 768
    assert running.result(WAIT_S).text == alone.text and running.result().memory.unchanged
    assert running.result().memory.num_tokens > engine.cache_info("front").num_tokens
    assert late.result(WAIT_S).memory.unchanged
    with pytest.raises(NodeError, match="TOO_LARGE"):
        engine.resize("front", model.kv_shape.bytes_per_token).result(WAIT_S)
    with pytest.raises(NodeError, match="UNKNOWN_STREAM"):
        engine.resize("back", 1 << 20).result(WAIT_S)
    encode(engine, range(100, 140, 2))
    assert engine.question_counters().traces == 0


def test_new_questions_wait_for_a_chunk_that_waits_for_answers(engine: Engine, model: DirectedModel):
    add(engine, model, "reset", 160)
    seq = fill(engine)
    order: list[str] = []
    model.hold()
    running = ask(engine, 30)
    model.wait_until_held()
    due = engine.encode("front", chunk(seq))
    model.let_go()
    until(lambda: "front" in engine._pinned or running.done())
    late = [ask(engine, 2) for _ in range(4)]
    for name, future in (("running", running), ("due", due), *(("late", question) for question in late)):
        future.add_done_callback(lambda _, name=name: order.append(name))
    assert not running.done()
    answers = [running.result(WAIT_S), *(question.result(WAIT_S) for question in late)]
    until(lambda: len(order) == 6)
    assert order == ["running", "due", "late", "late", "late", "late"]
    assert [answer.memory.num_forgotten_frames > 0 for answer in answers] == [False, True, True, True, True]
    assert due.result().num_forgotten_frames > 0


def test_a_stream_that_need_not_forget_is_asked_while_another_one_waits(engine: Engine, model: DirectedModel):
    add(engine, model, "reset", 70)
    add(engine, model, "stop", 500, "other")
    encode(engine, range(0, 4, 2), "other")
    seq = fill(engine)
    model.hold()
    running = ask(engine, 40)
    model.wait_until_held()
    stuck = engine.encode("front", chunk(seq))
    waiting, other = ask(engine, 2), ask(engine, 2, "other")
    model.let_go()
    assert other.result(WAIT_S).memory.unchanged
    for future in (running, stuck, waiting):
        future.result(WAIT_S)
    assert waiting.result().memory.until_seq == seq - 1 or waiting.result().memory.until_seq == seq + 1


@pytest.mark.parametrize("how", ["cancel", "reset", "remove"])
def test_what_waits_to_forget_goes_on_however_the_reader_ends(engine: Engine, model: DirectedModel, how: str):
    add(engine, model, "reset", 70)
    seq = fill(engine)
    model.hold()
    running = ask(engine, 40)
    model.wait_until_held()
    stuck, waiting = engine.encode("front", chunk(seq)), ask(engine, 2)
    model.let_go()
    if how == "cancel":
        running.cancel()
        assert stuck.result(WAIT_S).num_tokens > 0
        assert waiting.result(WAIT_S).memory.unchanged
    elif how == "reset":
        engine.reset("front").result(WAIT_S)
        encode(engine, range(0, 40, 2))
        assert engine.cache_info("front").num_forgotten_frames > 0
    else:
        engine.remove_stream("front").result(WAIT_S)
    for future in (running, stuck, waiting):
        assert not wait([future], WAIT_S).not_done  # type: ignore[arg-type]
    if how == "remove" and (error := waiting.exception()) is not None:
        assert isinstance(error, NodeError) and error.code in ("UNKNOWN_STREAM", "CANCELLED")
    until(lambda: engine.question_counters().running == 0)
    assert not engine._pinned


def test_a_mark_is_asked_about_as_what_is_left_of_it(engine: Engine, model: DirectedModel):
    add(engine, model, "thin", 160)
    encode(engine, range(0, 16, 2))
    engine.mark("front", "here").result(WAIT_S)
    encode(engine, range(16, 80, 2))
    answer = ask(engine, as_of="here").result(WAIT_S)
    mark = engine.marks("front").result(WAIT_S).marks[0]
    assert answer.memory.num_frames + answer.memory.num_forgotten_frames == 16
    assert answer.memory.num_frames == mark.num_frames > 0 and answer.memory.unchanged
    assert engine.rollback("front", "here").result(WAIT_S).num_frames == mark.num_frames


def test_a_mark_of_which_nothing_is_left_has_no_frames(engine: Engine, model: DirectedModel):
    add(engine, model, "window")
    encode(engine, range(0, 2, 2))
    engine.mark("front", "here").result(WAIT_S)
    encode(engine, range(2, 60, 2))
    error = ask(engine, as_of="here").exception(WAIT_S)
    assert isinstance(error, NodeError) and error.code == "NO_FRAMES" and "forgotten" in str(error)
