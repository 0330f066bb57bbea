"""Questions between the layers of a chunk: they need not wait for it, it does not notice them, and verbs wait."""

import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from dataclasses import replace
from typing import Any

import pytest
import torch
from checkpoints import Checkpoints, DirectedModel, are_equal, chunk, memory, rows
from deadline import until

from onlooker.node.chunk import Chunk
from onlooker.node.engine import Engine
from onlooker.node.fairness import FairShare
from onlooker.node.memory import Addition, StreamMemory, append_together
from onlooker.node.options import StreamOptions
from onlooker.node.steps import Steps
from onlooker.node.upload import Upload, Uploader
from onlooker.protocol.messages import Answer, Ask, AskChoice

WAIT_S = 30.0
QUESTION = "What do you see now?"


@pytest.fixture
def engine(model: DirectedModel) -> Iterator[Engine]:
    yield from running(model)


def running(model: DirectedModel, **options: Any) -> Iterator[Engine]:
    """An engine with one stream."""
    engine = Engine(model, max_concurrent_questions=3, max_waiting_questions=8, scratch_tokens=128)
    engine.start()
    num_bytes = 512 * model.kv_shape.bytes_per_token
    settings: dict[str, Any] = {"chunk_frames": 2, "min_pixels": 1, "memory_bytes": num_bytes} | options
    engine.add_stream(StreamOptions("front", **settings)).result(WAIT_S)
    yield engine
    model.let_go()
    assert engine.close(WAIT_S)


def favour_answers(engine: Engine) -> None:
    """Let a step of encoding pay for a thousand of decoding, so that an answer is done before the next layer is."""
    engine._fairness = FairShare(0.001)


def the_memory(engine: Engine) -> StreamMemory:
    return engine._memories["front"]


def held_in_a_chunk(engine: Engine, model: DirectedModel, new: Chunk) -> Future[Any]:
    """Stop the engine thread between the vision tower and the language model."""
    model.hold()
    future = engine.encode("front", new)
    model.wait_until_held()
    return future


def ask(engine: Engine, max_new_tokens: int = 1, on_delta: Any = None, **settings: Any) -> Future[Answer]:
    request = Ask(**({"stream": "front", "question": QUESTION, "max_new_tokens": max_new_tokens} | settings))
    return engine.ask(request, arrived=time.monotonic(), on_delta=on_delta)


def ask_choice(engine: Engine) -> Future[Any]:
    request = AskChoice(stream="front", question=QUESTION, options=["red", "a blue square"])
    return engine.ask_choice(request, arrived=time.monotonic())


def order_of(**futures: Future[Any]) -> list[str]:
    """The names of futures in the order in which they come to be done."""
    order: list[str] = []
    for name, future in futures.items():
        future.add_done_callback(lambda _, name=name: order.append(name))
    return order


def test_a_question_that_comes_in_the_middle_of_a_chunk_has_its_first_token_before_the_chunk_is_done(
    engine: Engine, model: DirectedModel
):
    engine.encode("front", chunk(0)).result(WAIT_S)
    encoding = held_in_a_chunk(engine, model, chunk(2))
    question = ask(engine)
    order = order_of(question=question, chunk=encoding)
    model.let_go()
    assert encoding.result(WAIT_S).num_tokens > 0
    assert order == ["question", "chunk"]
    assert question.result().memory.until_seq == 1 and question.result().memory.unchanged


def test_an_answer_grows_while_a_chunk_is_encoded_and_its_time_is_not_the_chunk_s(engine: Engine, model: DirectedModel):
    engine.encode("front", chunk(0)).result(WAIT_S)
    alone = ask(engine, 40).result(WAIT_S)
    favour_answers(engine)
    began = time.perf_counter()
    encoding = held_in_a_chunk(engine, model, chunk(2))
    question, choice = ask(engine, 40), ask_choice(engine)
    order = order_of(question=question, choice=choice, chunk=encoding)
    model.let_go()
    encoded = encoding.result(WAIT_S)
    whole_ms = (time.perf_counter() - began) * 1e3
    until(lambda: len(order) == 3)
    assert order[-1] == "chunk"
    assert question.result().text == alone.text and choice.result().memory.num_frames == 2
    chosen = choice.result().timing
    own_ms = encoded.preprocess_ms + encoded.vision_ms + encoded.prefill_ms
    assert own_ms + chosen.total_ms - chosen.queue_ms <= whole_ms


def test_chunks_of_several_streams_are_the_same_when_questions_about_them_ran_between_their_layers_and_verbs_wait(
    engine: Engine, model: DirectedModel
):
    engine._max_together = 2
    favour_answers(engine)
    engine.add_stream(replace(the_memory(engine).options, name="back")).result(WAIT_S)
    for name in ("front", "back"):
        engine.encode(name, chunk(0)).result(WAIT_S)
    before = held_in_a_chunk(engine, model, chunk(2))
    chunks = [engine.encode(name, chunk(4)) for name in ("front", "back")]
    model.let_go()
    model.hold()
    assert before.result(WAIT_S)
    model.wait_until_held()
    questions = [ask(engine, 3, stream=name) for name in ("front", "back", "front")]
    reset, late = engine.reset("back"), ask(engine, stream="back")
    order = order_of(first=questions[0], second=questions[1], chunks=chunks[1], reset=reset)
    model.let_go()
    assert all(future.result(WAIT_S).num_tokens for future in chunks)
    assert [question.result(WAIT_S).memory.until_seq for question in questions] == [3, 1, 3]
    assert all(question.result().memory.unchanged for question in questions)
    assert reset.result(WAIT_S).num_frames == 0 and "NO_FRAMES" in str(late.exception(WAIT_S))
    assert order == ["first", "second", "chunks", "reset"]
    never_asked = [memory(model), memory(model)]
    for each in never_asked:
        each.append(chunk(0))
    never_asked[0].append(chunk(2))
    append_together([Addition(each, each.plan(chunk(4))) for each in never_asked])
    assert are_equal(rows(the_memory(engine)), rows(never_asked[0]))


@pytest.mark.parametrize("has_steps", [False, True])
@pytest.mark.parametrize(
    ("family", "layout"), [("qwen2_5_vl", "native"), ("qwen2_5_vl", "turns"), ("qwen3_vl", "native")]
)
def test_a_memory_is_the_same_bit_for_bit_when_questions_ran_between_its_layers(
    checkpoints: Checkpoints, family: str, layout: str, has_steps: bool
):
    model = DirectedModel(checkpoints.model(family))
    chunks = [chunk(seq, factor=model.geometry.factor) for seq in range(0, 10, 2)]
    asked = running(model, layout=layout)
    engine = next(asked)
    favour_answers(engine)
    if has_steps:  # as a GPU has them, but for the graphs
        engine._scratch.steps = Steps(model, engine._scratch.arena, 3)
    engine.encode("front", chunks[0]).result(WAIT_S)
    questions: list[Future[Any]] = []
    for each in chunks[1:]:
        encoding = held_in_a_chunk(engine, model, each)
        questions += [ask(engine, 9), ask_choice(engine), ask(engine, 5, temperature=1.0, seed=1)]
        model.let_go()
        encoding.result(WAIT_S)
    assert all(question.result(WAIT_S).memory.unchanged for question in questions)
    assert {question.result().memory.num_frames for question in questions} == {2, 4, 6, 8}
    never_asked = memory(model, layout=layout)
    for each in chunks:
        never_asked.append(each)
    assert the_memory(engine).now == never_asked.now
    assert are_equal(rows(the_memory(engine)), rows(never_asked))
    assert not list(asked)


def test_verbs_wait_for_the_chunk_and_what_came_after_them_waits_with_them(engine: Engine, model: DirectedModel):
    engine.encode("front", chunk(0)).result(WAIT_S)
    encoding = held_in_a_chunk(engine, model, chunk(2))
    before, mark, after = ask(engine), engine.mark("front", "here"), ask(engine, as_of="here")
    reset, last = engine.reset("front"), ask(engine)
    order = order_of(before=before, chunk=encoding, mark=mark, reset=reset)
    model.let_go()
    assert mark.result(WAIT_S).num_frames == 4
    assert reset.result(WAIT_S).num_tokens == 0
    assert order == ["before", "chunk", "mark", "reset"]
    assert before.result().memory.num_frames == 2
    wait([after, last], WAIT_S)
    assert [getattr(each.exception(), "code", None) for each in (after, last)] == ["UNKNOWN_MARK", "NO_FRAMES"]


def test_a_question_that_comes_while_the_first_chunk_is_encoded_is_about_that_chunk(
    engine: Engine, model: DirectedModel
):
    held_in_a_chunk(engine, model, chunk(0))
    question = ask(engine)
    model.let_go()
    assert question.result(WAIT_S).memory.num_frames == 2
    until(lambda: not engine._pinned)


def test_the_first_chunk_of_a_stream_holds_up_no_question_about_another(engine: Engine, model: DirectedModel):
    num_bytes = 512 * model.kv_shape.bytes_per_token
    engine.add_stream(StreamOptions("back", chunk_frames=2, min_pixels=1, memory_bytes=num_bytes)).result(WAIT_S)
    engine.encode("back", chunk(0)).result(WAIT_S)
    encoding = held_in_a_chunk(engine, model, chunk(2))
    about_it, other = ask(engine), ask(engine, stream="back")
    order = order_of(other=other, chunk=encoding, about_it=about_it)
    model.let_go()
    assert about_it.result(WAIT_S).memory.until_seq == 3 and other.result().memory.until_seq == 1
    assert order == ["other", "chunk", "about_it"]


def test_a_question_that_waits_while_a_memory_starts_over_is_about_the_chunk_that_it_starts_with(model: DirectedModel):
    kept = running(model, retention="reset", memory_bytes=60 * model.kv_shape.bytes_per_token)
    engine = next(kept)
    seq = 0
    while not seq or not the_memory(engine).plan(chunk(seq)).must_forget:
        engine.encode("front", chunk(seq)).result(WAIT_S)
        seq += 2
    held_in_a_chunk(engine, model, chunk(seq))
    question = ask(engine)
    model.let_go()
    assert question.result(WAIT_S).memory.num_frames == 2 and question.result().memory.until_seq == seq + 1
    assert not list(kept)


def test_an_answer_that_fails_in_the_middle_of_a_chunk_spares_the_chunk(engine: Engine, model: DirectedModel):
    def fail(delta: str) -> None:
        model.fail_with = RuntimeError("in layer 1")

    engine.encode("front", chunk(0)).result(WAIT_S)
    favour_answers(engine)
    encoding = held_in_a_chunk(engine, model, chunk(2))
    question = ask(engine, 30, fail)
    order = order_of(question=question, chunk=encoding)
    model.let_go()
    assert encoding.result(WAIT_S).num_tokens > 0
    assert order == ["question", "chunk"]
    assert getattr(question.exception(), "code", None) == "INTERNAL"
    model.fail_with = None
    never_asked = memory(model)
    for seq in (0, 2):
        never_asked.append(chunk(seq))
    assert are_equal(rows(the_memory(engine)), rows(never_asked))


def test_a_chunk_that_fails_spares_the_answers_that_grew_meanwhile(engine: Engine, model: DirectedModel):
    engine.encode("front", chunk(0)).result(WAIT_S)
    before = rows(the_memory(engine))
    alone = ask(engine, 40).result(WAIT_S)
    arena = the_memory(engine)._arena
    write = arena.write

    def fail(layer: int, *args: Any) -> None:
        if layer == 1:
            raise torch.OutOfMemoryError("no more")
        write(layer, *args)

    arena.write = fail  # type: ignore[method-assign]
    encoding = held_in_a_chunk(engine, model, chunk(2))
    question = ask(engine, 40)
    model.let_go()
    assert question.result(WAIT_S).text == alone.text
    assert getattr(encoding.exception(), "reason", None) == "out_of_memory"
    assert are_equal(rows(the_memory(engine)), before)


def test_a_chunk_is_not_tried_again_where_a_question_reads_what_its_second_try_would_forget(model: DirectedModel):
    kept = running(model, retention="reset", memory_bytes=60 * model.kv_shape.bytes_per_token)
    engine = next(kept)
    stream, seqs = the_memory(engine), iter(range(0, 60, 2))
    while stream.now.num_tokens < 58:  # room for one chunk more, but not for one token and the marks of another size
        engine.encode("front", chunk(next(seqs), grid=(1, 2))).result(WAIT_S)
    alone, before = ask(engine, 40).result(WAIT_S), rows(stream)
    engine.relieve = lambda _: replace(stream.options, encode_scale=0.5)
    write = stream._arena.write

    def fail_once(layer: int, *args: Any) -> None:
        if layer == 1:
            stream._arena.write = write  # type: ignore[method-assign]
            raise torch.OutOfMemoryError("no more")
        write(layer, *args)

    stream._arena.write = fail_once  # type: ignore[method-assign]
    encoding = held_in_a_chunk(engine, model, chunk(next(seqs), grid=(1, 2)))
    question = ask(engine, 40)
    model.let_go()
    assert question.result(WAIT_S).text == alone.text and question.result().memory.unchanged
    assert getattr(encoding.exception(WAIT_S), "reason", None) == "out_of_memory"
    assert are_equal(rows(stream), before)
    assert not list(kept)


class WatchedUploader(Uploader):
    """Says which chunks it was given."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.chunks: list[Chunk] = []

    def start(self, chunk: Chunk) -> Upload:
        self.chunks.append(chunk)
        return super().start(chunk)


def test_the_pictures_of_the_next_chunk_are_uploaded_while_one_is_encoded(engine: Engine, model: DirectedModel):
    engine._uploader = uploader = WatchedUploader()
    chunks = [chunk(seq) for seq in (0, 2, 4, 6)]
    engine.encode("front", chunks[0]).result(WAIT_S)
    futures = [held_in_a_chunk(engine, model, chunks[1]), *(engine.encode("front", each) for each in chunks[2:])]
    model.let_go()
    assert all(future.result(WAIT_S).num_tokens > 0 for future in futures)
    assert uploader.chunks == chunks[2:] and engine._ahead is None
    never_ahead = memory(model)
    for each in chunks:
        never_ahead.append(each)
    assert are_equal(rows(the_memory(engine)), rows(never_ahead))


def test_the_pictures_of_a_chunk_that_is_refused_are_let_go(engine: Engine, model: DirectedModel):
    engine._uploader = uploader = WatchedUploader()
    engine.encode("front", chunk(0)).result(WAIT_S)
    held_in_a_chunk(engine, model, chunk(2))
    refused, reset = engine.encode("front", chunk(4)), engine.reset("front")
    model.let_go()
    reset.result(WAIT_S)
    assert getattr(refused.exception(WAIT_S), "reason", None) == "reset"
    assert len(uploader.chunks) == 1 and engine._ahead is None


def test_an_upload_that_cannot_begin_costs_a_chunk_and_not_the_engine(engine: Engine, model: DirectedModel):
    class NoThread(Uploader):
        def start(self, chunk: Chunk) -> Upload:
            raise RuntimeError("can't start new thread")

    held_in_a_chunk(engine, model, chunk(0))
    futures = [engine.encode("front", chunk(seq)) for seq in (2, 4)]
    engine._uploader = NoThread(torch.device("cpu"))
    model.let_go()
    assert not wait(futures, WAIT_S).not_done
    assert futures[1].result().num_tokens > 0 and engine.is_ready


def test_the_times_of_a_chunk_are_its_own(model: DirectedModel):
    stream = memory(model)
    stream.append(chunk(0))
    left_out_s = 0.0

    def between() -> float:
        nonlocal left_out_s
        began = time.perf_counter()
        while time.perf_counter() < began + 0.01:
            pass
        seconds = time.perf_counter() - began
        left_out_s += seconds
        return seconds

    began = time.perf_counter()
    encoded = stream.append(chunk(2), between=between)
    whole_s = time.perf_counter() - began
    own_ms = encoded.preprocess_ms + encoded.vision_ms + encoded.prefill_ms
    assert left_out_s >= 0.01 * model.kv_shape.num_layers
    assert min(encoded.vision_ms, encoded.prefill_ms) > 0
    assert own_ms <= (whole_s - left_out_s) * 1e3
