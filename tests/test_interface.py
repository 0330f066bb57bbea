"""A node far away and an engine in this process are used alike, with the built-in model behind both."""

import inspect

import numpy as np
import pytest
from deadline import until
from msgspec import UNSET
from nodes import running_node

from onlooker.node.engine import load_engine
from onlooker.node.local import LocalNode
from onlooker.protocol.client import NodeClient
from onlooker.protocol.errors import NodeError
from onlooker.protocol.interface import VideoMemory
from onlooker.protocol.messages import Answer, FrameCounters, PartialAnswer, StreamSpec

WORDS = 4


@pytest.fixture(scope="module", params=["local", "remote"])
def memory(request):
    if request.param == "local":
        with LocalNode(device="cpu") as node:
            yield node
        return
    engine = load_engine(device="cpu")
    try:
        with running_node(engine) as node, _client_of(node) as client:
            yield client
    finally:
        engine.close()


def _client_of(node) -> NodeClient:
    ends = node.endpoints
    return NodeClient(ends["ask"], ends["control"], frames=ends["frames"])


@pytest.fixture
def stream(memory, request):
    name = request.node.originalname[:60]
    memory.add_stream(StreamSpec(stream=name, chunk_frames=2, memory_bytes=1 << 20))
    yield name
    memory.remove_stream(name)


def picture(level: int) -> np.ndarray:
    return np.full((90, 120, 3), level, np.uint8)


def frames_of(memory: VideoMemory, stream: str) -> FrameCounters:
    (frames,) = [stats.frames for stats in memory.streams() if stats.stream == stream]
    return frames


def show(memory: VideoMemory, stream: str, *levels: int) -> int:
    return memory.process_chunk(stream, [picture(level) for level in levels])


def test_what_was_shown_can_be_asked_about(memory, stream):
    assert memory.wait_encoded(stream, show(memory, stream, 10, 200), 10)
    answer = memory.ask(stream, "What do you see?", max_new_tokens=WORDS)
    assert answer.memory.num_frames == 2 and answer.memory.unchanged
    assert answer.num_answer_tokens <= WORDS


def test_an_answer_comes_in_pieces_that_make_up_the_whole(memory, stream):
    memory.wait_encoded(stream, show(memory, stream, 10, 200), 10)
    *pieces, whole = memory.ask_stream(stream, "What do you see?", max_new_tokens=WORDS)
    assert isinstance(whole, Answer) and all(isinstance(piece, PartialAnswer) for piece in pieces)
    assert "".join(piece.delta for piece in pieces) == whole.text


def test_a_still_picture_is_encoded_once_and_the_answer_says_until_when_it_was_seen(memory):
    memory.add_stream(StreamSpec(stream="still", chunk_frames=4, memory_bytes=1 << 20, gate=10.0, drop=0.9))
    try:
        times = [10**9 + n * 10**8 for n in range(8)]
        memory.process_chunk("still", [picture(10)] * 8, ts=times)
        until(lambda: memory.cache_info("still").seen_until_ns == times[-1])
        until(lambda: frames_of(memory, "still").pending == 0)
        frames = frames_of(memory, "still")
        assert (frames.received, frames.encoded, frames.dropped) == (8, 2, {"gated": 6})
        known = memory.ask("still", "What do you see?", max_new_tokens=WORDS).memory
        assert (known.num_frames, known.until_ns, known.seen_until_ns) == (2, times[1], times[-1])
        memory.process_chunk("still", [picture(200), picture(200)], ts=[10**10, 10**10 + 10**8])
        memory.end_stream("still")
        until(lambda: memory.cache_info("still").num_frames == 4)
        assert memory.cache_info("still").seen_until_ns is UNSET
    finally:
        memory.remove_stream("still")


def test_of_the_last_frames_each_is_encoded_once_and_counted_when_it_is_forgotten(memory):
    memory.add_stream(StreamSpec(stream="last", chunk_frames=2, memory_bytes=1 << 20, last_frames=4))
    try:
        seq = show(memory, "last", *range(10, 220, 20))  # 11
        memory.wait_encoded("last", seq - 1, 10)
        frames, cache = frames_of(memory, "last"), memory.cache_info("last")
        assert (frames.received, frames.encoded, frames.pending, frames.forgotten) == (11, 10, 1, 6)
        assert (cache.num_frames, cache.num_forgotten_frames, frames.dropped) == (4, 6, {})
        known = memory.ask("last", "What do you see?", max_new_tokens=WORDS).memory
        assert [each.known for each in known.ranges] == ["forgotten", "whole"]
    finally:
        memory.remove_stream("last")


def test_options_are_scored(memory, stream):
    memory.wait_encoded(stream, show(memory, stream, 10, 200), 10)
    choice = memory.ask_choice(stream, "Which colour?", ["red", "dark blue"])
    assert choice.option in ("red", "dark blue") and choice.memory.unchanged
    assert sum(score.probability for score in choice.scores) == pytest.approx(1)


def test_an_odd_picture_becomes_memory_at_the_end_of_the_stream(memory, stream):
    seq = show(memory, stream, 10, 20, 30)
    memory.end_stream(stream)
    assert memory.wait_encoded(stream, seq, 10)
    info = memory.cache_info(stream)
    assert (info.num_frames, info.num_padded_frames) == (3, 1)


def test_the_end_of_one_stream_costs_another_nothing(memory, stream):
    memory.add_stream(StreamSpec(stream="other", chunk_frames=2, memory_bytes=1 << 20))
    try:
        memory.wait_encoded("other", show(memory, "other", 10, 20), 10)
        show(memory, stream, 10)
        memory.end_stream(stream)
        assert memory.wait_encoded("other", show(memory, "other", 30, 40), 10)
        counters = next(stats.frames for stats in memory.streams() if stats.stream == "other")
        assert (counters.received, counters.encoded, counters.dropped) == (4, 4, {})
    finally:
        memory.remove_stream("other")


def test_bytes_are_tokens_times_bytes_per_token(memory, stream):
    memory.wait_encoded(stream, show(memory, stream, 10, 200), 10)
    info = memory.cache_info(stream)
    assert info.logical_bytes == info.num_tokens * info.bytes_per_token > 0


def test_a_mark_is_asked_about_and_rolled_back_to(memory, stream):
    memory.wait_encoded(stream, show(memory, stream, 10, 20), 10)
    mark = memory.mark(stream, "early")
    memory.wait_encoded(stream, show(memory, stream, 30, 40), 10)
    assert memory.ask(stream, "What?", max_new_tokens=1, as_of="early").memory.num_tokens == mark.num_tokens
    assert memory.rollback(stream, "early").num_tokens == mark.num_tokens
    assert [m.name for m in memory.marks(stream).marks] == ["early"]
    assert memory.delete_mark(stream, "early").marks == []


def test_a_rollback_takes_the_pictures_that_wait_along_unless_the_mark_is_unknown(memory, stream):
    memory.wait_encoded(stream, show(memory, stream, 10, 20), 10)
    memory.mark(stream, "early")
    show(memory, stream, 30)  # waits for a second picture to fill its chunk
    until(lambda: memory.streams()[-1].frames.received == 3)
    with pytest.raises(NodeError) as caught:
        memory.rollback(stream, "never")
    assert caught.value.code == "UNKNOWN_MARK"
    assert memory.streams()[-1].frames.pending == 1
    memory.rollback(stream, "early")
    assert memory.streams()[-1].frames.dropped == {"reset": 1}


def test_a_reset_forgets_everything(memory, stream):
    memory.wait_encoded(stream, show(memory, stream, 10, 20), 10)
    assert memory.reset(stream).num_tokens == 0
    with pytest.raises(NodeError) as caught:
        memory.ask(stream, "What?")
    assert caught.value.code == "NO_FRAMES" and caught.value.retryable


def test_arguments_of_older_callers_are_ignored(memory, stream):
    memory.process_frame(stream, picture(10), manual_time=1.5)
    memory.wait_encoded(stream, memory.process_frame(stream, picture(20), manual_time=2.0), 10)
    assert memory.ask(stream, "What?", max_new_tokens=1, manual_time=3).num_answer_tokens <= 1


@pytest.mark.parametrize(
    ("question", "options"),
    [("", {}), ("What?", {"temperature": -1.0}), ("What?", {"top_p": 0.0}), ("What?", {"max_new_tokens": 0})],
)
def test_a_question_that_makes_no_sense_is_refused_alike(memory, stream, question, options):
    memory.wait_encoded(stream, show(memory, stream, 10, 20), 10)
    with pytest.raises(NodeError) as caught:
        memory.ask(stream, question, **options)
    assert caught.value.code == "BAD_REQUEST"


def test_unknown_streams_are_refused_alike(memory):
    for verb in (memory.cache_info, memory.reset, memory.marks):
        with pytest.raises(NodeError) as caught:
            verb("nowhere")
        assert caught.value.code == "UNKNOWN_STREAM"


@pytest.mark.parametrize("timeout_s", [0, -1.0])
def test_a_timeout_that_is_none_is_refused(memory, stream, timeout_s):
    with pytest.raises(ValueError):
        memory.ask(stream, "What?", timeout_s=timeout_s)


@pytest.mark.parametrize("kind", [LocalNode, NodeClient])
def test_both_have_every_verb_of_the_interface(kind):
    verbs = {name for name, _ in inspect.getmembers(VideoMemory, inspect.isfunction) if not name.startswith("_")}
    assert verbs <= set(dir(kind))
