"""Questions in an engine: what they are told, and how each of them ends."""

import time
from concurrent.futures import CancelledError, Future, wait
from typing import Any

import pytest
import torch
from checkpoints import DirectedModel, are_equal, chunk, memory, rows
from deadline import until
from engines import (
    MAX_WAITING,
    WAIT_S,
    add,
    ask,
    ask_choice,
    code_of,
    encode,
    held_in_a_chunk,
    held_in_an_answer,
    is_at_rest,
    the_memory,
)
from msgspec import UNSET

from onlooker.node.engine import Engine
from onlooker.protocol.errors import NodeError

# Answers


def test_an_answer_says_what_it_knows_and_its_deltas_add_up(engine: Engine):
    encode(engine, 0, 2)
    deltas: list[str] = []
    answer = ask(engine, on_delta=deltas.append).result(WAIT_S)
    assert "".join(deltas) == answer.text and answer.num_answer_tokens == 6
    assert answer.memory.num_frames == 4 and answer.memory.unchanged
    assert answer.notice is UNSET


def test_a_choice_is_answered(engine: Engine):
    encode(engine, 0)
    choice = ask_choice(engine).result(WAIT_S)
    assert choice.option in ("red", "a blue square") and choice.memory.unchanged


def test_questions_at_once_are_answered_as_one_at_a_time(engine: Engine, model: DirectedModel):
    add(engine, model, "back")
    encode(engine, 0, 2)
    encode(engine, 50, stream="back")
    asked = [
        {"question": "Is it red?", "max_new_tokens": 12},
        {"stream": "back", "max_new_tokens": 9},
        {"temperature": 1.5, "seed": 3, "max_new_tokens": 7},
        {"question": "left or right?", "temperature": 1.5, "top_p": 0.8, "seed": 4, "stream": "back"},
        {},
    ]
    alone = [ask(engine, **each).result(WAIT_S).text for each in asked]
    model.hold()
    futures = [ask(engine, **each) for each in asked[:1]]
    model.wait_until_held()
    futures += [ask(engine, **each) for each in asked[1:]]
    model.let_go()
    assert [future.result(WAIT_S).text for future in futures] == alone


def test_chunks_that_come_while_questions_run_are_as_if_nobody_had_asked(engine: Engine, model: DirectedModel):
    chunks = [chunk(seq) for seq in range(0, 24, 2)]
    encode(engine, 900)
    encodings, answers = [], []
    for i, each in enumerate(chunks):
        encodings.append(engine.encode("front", each))
        answers.append(ask_choice(engine) if i % 4 == 3 else ask(engine))
        if i % 4 == 2:
            wait(answers, WAIT_S)
    wait(encodings + answers, WAIT_S)
    assert all(future.result().memory.unchanged for future in answers)
    never_asked = memory(model)
    for each in [chunk(900), *chunks]:
        never_asked.append(each)
    assert are_equal(rows(the_memory(engine)), rows(never_asked))
    assert engine.question_counters().traces == 0


def test_an_answer_reads_what_was_there_when_it_began(engine: Engine, model: DirectedModel):
    encode(engine, 0)
    alone = ask(engine, max_new_tokens=40).result(WAIT_S)
    running = held_in_an_answer(engine, model)
    later = engine.encode("front", chunk(70))
    model.let_go()
    assert later.result(WAIT_S).num_tokens > 0
    answer = running.result(WAIT_S)
    assert answer.text == alone.text and answer.memory.until_seq == 1


def test_a_question_can_be_about_the_memory_as_it_was_at_a_mark(engine: Engine):
    encode(engine, 0)
    then = ask(engine).result(WAIT_S)
    mark = engine.mark("front", "then").result(WAIT_S)
    encode(engine, 2, 4)
    assert (mark.num_tokens, mark.num_frames) == (then.memory.num_tokens, 2)
    as_of = ask(engine, as_of="then").result(WAIT_S)
    assert (as_of.text, as_of.memory.until_seq) == (then.text, 1)
    assert as_of.memory.fingerprint_before == then.memory.fingerprint_before
    assert ask_choice(engine, as_of="then").result(WAIT_S).memory.num_frames == 2


def test_answers_and_chunks_share_the_engine(engine: Engine, model: DirectedModel):
    """Neither waits for the other to be done with all of its work."""
    encode(engine, 0)
    done: list[str] = []
    model.hold()
    futures: list[Future[Any]] = [engine.encode("front", chunk(seq)) for seq in range(2, 62, 2)]
    for future in futures:
        future.add_done_callback(lambda _: done.append("chunk"))
    for num in (3, 60):
        futures.append(ask(engine, max_new_tokens=num))
        futures[-1].add_done_callback(lambda _, num=num: done.append(f"answer of {num}"))
    model.let_go()
    wait(futures, WAIT_S)
    assert "chunk" in done[done.index("answer of 3") :]
    assert done.index("chunk") < done.index("answer of 60")


def test_a_flood_of_choices_does_not_hold_up_a_running_answer(engine: Engine, model: DirectedModel):
    encode(engine, 0)
    running = held_in_an_answer(engine, model, max_new_tokens=8)
    num_choices = 0

    def another(_: object = None) -> None:
        nonlocal num_choices
        if not running.done() and num_choices < 500:
            num_choices += 1
            ask_choice(engine).add_done_callback(another)

    for _ in range(MAX_WAITING):
        another()
    model.let_go()
    running.result(WAIT_S)
    assert num_choices < 100
    until(lambda: is_at_rest(engine))


# Questions that get no answer


def test_a_question_before_the_first_chunk_is_refused_for_now(engine: Engine):
    futures = [ask(engine), ask_choice(engine)]
    assert [code_of(future) for future in futures] == ["NO_FRAMES"] * 2
    engine.mark("front", "nothing").result(WAIT_S)
    encode(engine, 0)
    assert code_of(ask(engine, as_of="nothing")) == "NO_FRAMES"


def test_an_unknown_mark_is_refused_with_those_that_are_known(engine: Engine):
    encode(engine, 0)
    engine.mark("front", "here").result(WAIT_S)
    futures = [ask(engine, as_of="there"), engine.rollback("front", "there"), engine.delete_mark("front", "there")]
    for future in futures:
        assert code_of(future) == "UNKNOWN_MARK"
        assert future.exception().details == {"marks": ["here"]}  # type: ignore[union-attr]


@pytest.mark.parametrize("settings", [{"question": "why " * 200}, {"max_new_tokens": 128}])
def test_a_question_that_does_not_fit_is_too_large(engine: Engine, settings: dict[str, Any]):
    encode(engine, 0)
    assert code_of(ask(engine, **settings)) == "TOO_LARGE"
    assert is_at_rest(engine)


def test_too_many_questions_are_turned_away_at_once(engine: Engine, model: DirectedModel):
    encode(engine, 0)
    held_in_a_chunk(engine, model)
    futures = [ask(engine) for _ in range(MAX_WAITING + 2)]
    model.let_go()
    outcomes = [future.exception(WAIT_S) for future in futures]
    assert outcomes[:MAX_WAITING] == [None] * MAX_WAITING
    for error in outcomes[MAX_WAITING:]:
        assert isinstance(error, NodeError)
        assert error.code == "BUSY" and error.retryable and error.retry_after_ms
    assert engine.question_counters().failed == {"BUSY": 2}


def test_a_waiting_question_can_be_cancelled(engine: Engine, model: DirectedModel):
    encode(engine, 0)
    held_in_a_chunk(engine, model)
    gone, stays = ask(engine), ask(engine)
    assert gone.cancel()
    model.let_go()
    assert stays.result(WAIT_S).num_answer_tokens == 6
    assert not wait([gone], WAIT_S).not_done
    assert engine.question_counters().failed == {"CANCELLED": 1}


def test_a_running_question_can_be_cancelled(engine: Engine, model: DirectedModel):
    encode(engine, 0)
    before = rows(the_memory(engine))
    running = held_in_an_answer(engine, model)
    assert running.cancel()
    model.let_go()
    with pytest.raises(CancelledError):
        running.result(WAIT_S)
    until(lambda: is_at_rest(engine))
    assert engine.question_counters().failed == {"CANCELLED": 1}
    assert are_equal(rows(the_memory(engine)), before)


def test_a_deadline_ends_a_question_that_waits(engine: Engine, model: DirectedModel):
    encode(engine, 0)
    held_in_a_chunk(engine, model)
    late = ask(engine, deadline=time.monotonic() - 0.001)
    model.let_go()
    assert code_of(late) == "DEADLINE_EXCEEDED"


def test_a_deadline_ends_a_question_that_runs(engine: Engine, model: DirectedModel):
    encode(engine, 0)
    deadline = time.monotonic() + 0.5
    running = held_in_an_answer(engine, model, deadline)
    until(lambda: time.monotonic() > deadline)
    model.let_go()
    assert code_of(running) == "DEADLINE_EXCEEDED"
    assert is_at_rest(engine)


@pytest.mark.parametrize(
    ("error", "code"), [(RuntimeError("in layer 1"), "INTERNAL"), (torch.OutOfMemoryError("no more"), "OUT_OF_MEMORY")]
)
def test_a_failing_question_has_a_code_and_leaves_nothing_behind(
    engine: Engine, model: DirectedModel, error: Exception, code: str
):
    encode(engine, 0)
    before = rows(the_memory(engine))
    running = held_in_an_answer(engine, model)
    model.fail_with = error  # from the next pass on: the one that is held is not the first to fail
    waiting = [ask(engine), ask_choice(engine)]
    model.let_go()
    assert [code_of(future) for future in (running, *waiting)] == [code] * 3
    until(lambda: is_at_rest(engine))
    model.fail_with = None
    assert ask(engine).result(WAIT_S).memory.unchanged
    assert are_equal(rows(the_memory(engine)), before)


def test_a_caller_whose_callback_fails_loses_its_own_answer_alone(engine: Engine, model: DirectedModel):
    encode(engine, 0)

    def fail(delta: str) -> None:
        raise ValueError("nobody listens")

    held_in_a_chunk(engine, model)
    failing, sound = ask(engine, on_delta=fail), ask(engine)
    model.let_go()
    assert code_of(failing) == "INTERNAL"
    assert sound.result(WAIT_S).num_answer_tokens == 6
    assert is_at_rest(engine)


def test_a_proof_that_cannot_be_taken_fails_its_answer_alone(engine: Engine):
    encode(engine, 0)
    stream = the_memory(engine)
    num_taken = 0
    sound = stream.fingerprint

    def fingerprint(snapshot: Any) -> str:
        nonlocal num_taken
        num_taken += 1
        if num_taken == 1:  # the one after the answer
            raise RuntimeError("the device does not answer")
        return sound(snapshot)

    stream.fingerprint = fingerprint  # type: ignore[method-assign]
    assert code_of(ask(engine)) == "INTERNAL"
    assert ask(engine).result(WAIT_S).memory.unchanged
    assert is_at_rest(engine)
