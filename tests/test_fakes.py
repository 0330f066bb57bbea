"""The fake engine keeps the engine's contract, so that tests against it mean something."""

import time
from concurrent.futures import CancelledError

import numpy as np
import pytest
from fakes import FakeEngine

from onlooker.node.chunk import Chunk, ChunkRefused, Picture
from onlooker.node.engine_protocol import EngineProtocol
from onlooker.node.options import StreamOptions
from onlooker.protocol.errors import NodeError
from onlooker.protocol.messages import Ask, AskChoice

ASK = Ask(stream="front", question="what do you see")


def chunk(num: int = 2, first_seq: int = 0) -> Chunk:
    pixels = np.zeros((4, 4, 3), np.uint8)
    return Chunk(tuple(Picture(pixels, seq, seq * 1000, "capture", seq) for seq in range(first_seq, first_seq + num)))


@pytest.fixture
def engine():
    with FakeEngine() as engine:
        engine.add_stream(StreamOptions(name="front")).result(1)
        yield engine


def test_it_fits_the_protocol(engine: FakeEngine):
    def takes(engine: EngineProtocol) -> list[str]:
        return engine.streams()

    assert takes(engine) == ["front"]


def test_an_answer_echoes_the_question_and_its_deltas_add_up(engine: FakeEngine):
    engine.encode("front", chunk()).result(1)
    deltas: list[str] = []
    answer = engine.ask(ASK, arrived=time.monotonic(), on_delta=deltas.append).result(1)
    assert "".join(deltas) == answer.text == ASK.question
    assert answer.memory.num_frames == 2 and answer.memory.unchanged


def test_a_question_without_frames_or_for_no_stream_fails_with_its_code(engine: FakeEngine):
    for stream, code in (("front", "NO_FRAMES"), ("back", "UNKNOWN_STREAM")):
        with pytest.raises(NodeError) as failed:
            engine.ask(Ask(stream=stream, question="?"), arrived=0).result(1)
        assert failed.value.code == code
    assert engine.question_counters().failed == {"NO_FRAMES": 1, "UNKNOWN_STREAM": 1}


def test_a_full_memory_refuses_the_chunk_and_keeps_the_rest(engine: FakeEngine):
    engine.capacity_tokens = 12
    engine.encode("front", chunk()).result(1)
    with pytest.raises(ChunkRefused) as refused:
        engine.encode("front", chunk(first_seq=2)).result(1)
    assert refused.value.reason == "memory_full"
    assert engine.cache_info("front").num_tokens == 8 and engine.cache_info("front").full


def test_a_reset_takes_back_the_chunks_that_wait(engine: FakeEngine):
    engine.hold()
    waiting = engine.encode("front", chunk())
    reset = engine.reset("front")
    engine.let_go()
    assert reset.result(1).num_tokens == 0
    with pytest.raises(ChunkRefused, match="reset"):
        waiting.result(1)


def test_a_question_can_be_cancelled_while_it_waits(engine: FakeEngine):
    engine.encode("front", chunk()).result(1)
    engine.hold()
    question = engine.ask(ASK, arrived=0)
    assert question.cancel()
    engine.let_go()
    with pytest.raises(CancelledError):
        question.result(1)
    assert engine.ask(ASK, arrived=0).result(1).text == ASK.question


def test_a_rollback_forgets_what_came_after_the_mark(engine: FakeEngine):
    engine.encode("front", chunk()).result(1)
    engine.mark("front", "here").result(1)
    engine.encode("front", chunk(first_seq=2)).result(1)
    assert engine.rollback("front", "here").result(1).num_frames == 2
    assert [picture.seq for picture in engine.pictures("front")] == [0, 1]


def test_the_shortest_option_is_chosen(engine: FakeEngine):
    engine.encode("front", chunk()).result(1)
    request = AskChoice(stream="front", question="?", options=["blue", "red"])
    choice = engine.ask_choice(request, arrived=0).result(1)
    assert choice.option == "red" and choice.margin == 1.0
