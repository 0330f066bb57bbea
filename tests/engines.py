"""An engine on a small model, those who ask it, and what stops it in the middle of its work."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from checkpoints import DirectedModel, chunk

from onlooker.node.chunk import ChunkRefused
from onlooker.node.engine import Engine
from onlooker.node.memory import StreamMemory
from onlooker.node.options import StreamOptions
from onlooker.protocol.errors import NodeError
from onlooker.protocol.messages import Answer, Ask, AskChoice, QuestionCounters

QUESTION = "What do you see now? What did you see first?"
NUM_SLOTS = 3
MAX_WAITING = 4
WAIT_S = 30.0


@contextmanager
def running_engine(model: DirectedModel) -> Iterator[Engine]:
    """An engine with a stream, that has to end in time."""
    engine = Engine(model, max_concurrent_questions=NUM_SLOTS, max_waiting_questions=MAX_WAITING, scratch_tokens=128)
    engine.start()
    add(engine, model, "front")
    yield engine
    model.let_go()
    assert engine.close(WAIT_S)


def add(engine: Engine, model: DirectedModel, name: str, num_tokens: int = 512) -> None:
    options = StreamOptions(
        name, chunk_frames=2, min_pixels=1, memory_bytes=num_tokens * model.kv_shape.bytes_per_token
    )
    engine.add_stream(options).result(WAIT_S)


def encode(engine: Engine, *seqs: int, stream: str = "front") -> None:
    for seq in seqs:
        engine.encode(stream, chunk(seq)).result(WAIT_S)


def request(**settings: Any) -> Ask:
    return Ask(**({"stream": "front", "question": QUESTION, "max_new_tokens": 6} | settings))


def ask(engine: Engine, deadline: float | None = None, on_delta: Any = None, **settings: Any) -> Future[Answer]:
    return engine.ask(request(**settings), arrived=time.monotonic(), deadline=deadline, on_delta=on_delta)


def ask_choice(engine: Engine, **settings: Any) -> Future[Any]:
    choice = AskChoice(**({"stream": "front", "question": QUESTION, "options": ["red", "a blue square"]} | settings))
    return engine.ask_choice(choice, arrived=time.monotonic())


def code_of(future: Future[Any]) -> str:
    error = future.exception(WAIT_S)
    assert isinstance(error, NodeError), error
    return error.code


def reason_of(future: Future[Any]) -> str:
    error = future.exception(WAIT_S)
    assert isinstance(error, ChunkRefused), error
    return error.reason


def open_questions(counters: QuestionCounters) -> int:
    assert min(counters.waiting, counters.running) >= 0
    assert counters.received == (
        counters.answered + sum(counters.failed.values()) + counters.waiting + counters.running
    )
    return counters.waiting + counters.running


def all_slots_are_free(engine: Engine) -> bool:
    return engine._scratch.num_free == NUM_SLOTS


def is_at_rest(engine: Engine) -> bool:
    return open_questions(engine.question_counters()) == 0 and all_slots_are_free(engine)


def the_memory(engine: Engine, stream: str = "front") -> StreamMemory:
    return engine._memories[stream]


def held_in_a_chunk(engine: Engine, model: DirectedModel, seq: int = 900, stream: str = "front") -> Future[Any]:
    """Stop the engine thread in the middle of a chunk, so that what comes now waits."""
    model.hold()
    future = engine.encode(stream, chunk(seq))
    model.wait_until_held()
    return future


def held_in_an_answer(
    engine: Engine, model: DirectedModel, deadline: float | None = None, **settings: Any
) -> Future[Answer]:
    """Stop the engine thread in the decode step after an answer's first token."""
    has_begun = threading.Event()

    def on_delta(delta: str) -> None:
        if not has_begun.is_set():
            model.hold()
            has_begun.set()

    future = ask(engine, deadline, on_delta, **({"max_new_tokens": 40} | settings))
    model.let_go()
    assert has_begun.wait(WAIT_S)
    model.wait_until_held()
    return future
