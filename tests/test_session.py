"""A recorded session is repeated: the same frames, the same questions, and a word for each answer that is another."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Ended, endpoint_flags, onlooker
from deadline import until
from fakes import FakeEngine
from nodes import running_node
from test_record import WAIT_S, Recording, recording

from onlooker.node.engine import load_engine
from onlooker.node.node import Node
from onlooker.protocol.camera import FramePublisher
from onlooker.protocol.client import NodeClient
from onlooker.protocol.messages import Answer, Ask
from onlooker.tools.session_file import FrameEntry, SessionReader

NS = 10**9
PIXELS = np.random.default_rng(1).integers(0, 256, (16, 28, 28, 3), np.uint8)


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    with FakeEngine() as engine:
        yield engine


@pytest.fixture
def node(engine: FakeEngine) -> Iterator[Node]:
    with running_node(engine) as node:
        yield node


def replay(path: Path, node: Node, *arguments: object) -> Ended:
    flags = endpoint_flags(node, "frames", "ask", "control")
    return onlooker("replay", path, "--rate", 0, *flags, *arguments)


def words(text: str) -> str:
    """What is said in a box, as a line."""
    return " ".join(text.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", " ").split())


class Show:
    """A camera and a client of one recorder."""

    def __init__(self, recorder: Recording) -> None:
        self.camera = FramePublisher("front", connect=recorder.endpoints.frames, lossless=True)
        self.client = NodeClient(recorder.endpoints.ask, recorder.endpoints.control)
        assert self.camera.wait_for_subscriber(WAIT_S)
        self._num_shown = 0

    def __enter__(self) -> Show:
        return self

    def __exit__(self, *exc: object) -> None:
        self.client.close()
        self.camera.close()

    def show(self, num: int, num_remembered: int) -> None:
        """Publish some pictures, and wait until so many are in the memory."""
        for n in range(self._num_shown, self._num_shown + num):
            self.camera.publish_image(PIXELS[n], ts=n * NS // 10)
        self._num_shown += num
        until(lambda: self.client.cache_info("front").num_frames == num_remembered, WAIT_S)

    def end(self, num_remembered: int) -> None:
        self.camera.end()
        until(lambda: self.client.streams()[0].state == "ended", WAIT_S)
        until(lambda: self.client.cache_info("front").num_frames == num_remembered, WAIT_S)


@pytest.fixture
def session(tmp_path: Path, engine: FakeEngine, node: Node) -> Path:
    """Questions in the middle, with pictures pending and at the end; a mark and a rollback."""
    with recording(node, tmp_path) as recorder, Show(recorder) as show:
        show.show(6, num_remembered=4)
        show.client.ask("front", "what is it")
        show.client.mark("front", "early")
        show.show(6, num_remembered=12)
        show.client.ask_choice("front", "which", ["long one", "short"])
        show.client.ask("front", "as it was then", as_of="early")
        show.client.rollback("front", "early")
        show.show(3, num_remembered=4)
        show.end(num_remembered=7)
        show.client.ask("front", "and in the end")
    with NodeClient(node.endpoints["ask"], node.endpoints["control"]) as client:
        client.reset("front")
    return recorder.path


def test_the_same_frames_and_answers_come_again(session: Path, engine: FakeEngine, node: Node) -> None:
    ended = replay(session, node, "--json")
    assert ended.status == 0
    outcomes = ended.json["outcomes"]
    assert [(each["question"], each["status"], each["reason"]) for each in outcomes] == [
        ("what is it", "same", ""),
        ("which", "same", ""),
        ("as it was then", "same", ""),
        ("and in the end", "same", ""),
    ]
    assert ended.json["frames"] == {"front": 15}
    shown = [picture.pixels for picture in engine.pictures("front")]
    assert all((picture == PIXELS[n]).all() for picture, n in zip(shown, (0, 1, 2, 3, 12, 13, 14), strict=True))


def test_a_session_can_be_repeated_again_and_again(session: Path, node: Node) -> None:
    assert replay(session, node).status == 0
    ended = replay(session, node)
    assert ended.status == 1
    assert "remembers 7 frames of something else; --reset forgets them" in ended.err
    ended = replay(session, node, "--reset")
    assert (ended.status, ended.err) == (0, "")
    assert "asked again: 4 same" in ended.out


def test_a_question_after_a_rollback_is_asked_after_it(tmp_path: Path, node: Node) -> None:
    """What it knew ends with a frame whose number a later camera used again."""
    with recording(node, tmp_path) as recorder:
        with Show(recorder) as first:
            first.show(4, num_remembered=4)
            first.client.mark("front", "early")
            first.end(num_remembered=4)
        with Show(recorder) as second:
            second.show(7, num_remembered=8)
            second.client.rollback("front", "early")
            second.client.ask("front", "what is it")
            second.end(num_remembered=4)
    ended = replay(recorder.path, node, "--reset", "--timeout", 2)
    assert (ended.status, ended.err) == (0, "")
    assert "asked again: 1 same" in ended.out


def test_another_answer_is_an_error(session: Path) -> None:
    class Liar(FakeEngine):
        def ask(self, request: Ask, **settings: Any) -> Future[Answer]:
            return super().ask(Ask(stream=request.stream, question=request.question + " not"), **settings)

    with Liar() as engine, running_node(engine) as node:
        ended = replay(session, node)
    assert ended.status == 1
    assert "different    front: what is it \N{RIGHTWARDS ARROW} what is it not, not what is it" in ended.out
    assert ended.err == "onlooker: 3 of 4 are not as they were recorded\n"


def test_a_memory_of_another_size_is_an_error_even_where_the_answer_is_the_same(session: Path) -> None:
    settings = {"stream_defaults__stride": 2}
    with FakeEngine() as engine, running_node(engine, **settings) as node:
        ended = replay(session, node, "--timeout", 0.3)
    assert ended.status == 1
    same_answer = "front: which \N{RIGHTWARDS ARROW} short (the memory has 4 frames of 16 tokens instead of 12 of 48)"
    assert f"different    {same_answer}" in ended.out


def test_a_question_that_fails_now_is_an_error(session: Path) -> None:
    with FakeEngine() as engine, running_node(engine, questions__max_options=2) as node:
        engine.fail_ask = None
        ended = replay(session, node)
        assert ended.status == 0
    with FakeEngine() as engine, running_node(engine, questions__max_question_chars=5) as node:
        ended = replay(session, node)
    assert ended.status == 1
    assert "now ends with TOO_LARGE" in ended.out


def test_a_question_that_had_no_answer_is_not_compared(tmp_path: Path, node: Node) -> None:
    with recording(node, tmp_path) as recorder, Show(recorder) as show:
        show.show(4, num_remembered=4)
        show.client.ask("front", "luck", temperature=1.0)
        with pytest.raises(Exception, match="UNKNOWN_MARK"):
            show.client.ask("front", "when", as_of="never")
        show.end(num_remembered=4)
    ended = replay(recorder.path, node, "--reset")
    assert ended.status == 0
    assert "(its temperature is above 0 and it has no seed)" in ended.out
    assert "(ended with UNKNOWN_MARK)" in ended.out
    assert "asked again: 2 not compared" in ended.out


def test_a_stream_that_is_not_there_has_to_be_added_with_its_settings(session: Path) -> None:
    with FakeEngine() as engine, running_node(engine) as node:
        with NodeClient(node.endpoints["ask"], node.endpoints["control"]) as client:
            client.remove_stream("front")
        ended = replay(session, node)
    assert ended.status == 1
    assert "onlooker add front" in ended.err


def test_what_was_recorded_with_another_model_is_said(session: Path) -> None:
    from dataclasses import replace

    from fakes import FAKE_MODEL

    with FakeEngine(model=replace(FAKE_MODEL, name="larger")) as engine, running_node(engine) as node:
        assert "model: recorded with fake, replayed with larger" in replay(session, node).err


def test_the_rate_is_that_of_the_recording(tmp_path: Path, node: Node) -> None:
    with recording(node, tmp_path) as recorder, Show(recorder) as show:
        show.show(4, num_remembered=4)
        show.client.ask("front", "a pause")
        show.show(4, num_remembered=8)
        show.end(num_remembered=8)
    with SessionReader(recorder.path) as reader:
        times = [entry.at_ns for entry in reader.entries() if isinstance(entry, FrameEntry)]
    (tmp_path / "again").mkdir()
    with recording(node, tmp_path / "again") as again:
        flags = ["--frames", again.endpoints.frames, "--ask", again.endpoints.ask, "--control", again.endpoints.control]
        rate = (times[-1] - times[0]) / NS / 0.4  # so that it takes 0.4 s
        assert onlooker("replay", recorder.path, "--reset", "--rate", rate, *flags).status == 0
    with SessionReader(again.path) as reader:
        again_times = [entry.at_ns for entry in reader.entries() if isinstance(entry, FrameEntry)][: len(times)]
    assert 0.3 < (again_times[-1] - again_times[0]) / NS < 10


@pytest.mark.parametrize(
    "flags", [("--loop",), ("--stride", 2), ("--fps", 1), ("--lossless",), ("--bind", "tcp://127.0.0.1:*")]
)
def test_what_is_for_videos_is_not_for_a_session(session: Path, node: Node, flags: tuple[object, ...]) -> None:
    ended = replay(session, node, *flags)
    assert ended.status == 2
    assert "this is for videos" in words(ended.err)


def test_a_stream_that_a_camera_still_publishes_is_left_to_it(session: Path, node: Node) -> None:
    with FramePublisher("front", connect=node.endpoints["frames"]) as camera:
        assert camera.wait_for_subscriber(WAIT_S)
        camera.publish_image(PIXELS[0])
        with NodeClient(node.endpoints["ask"], node.endpoints["control"]) as client:
            until(lambda: client.streams()[0].state == "online", WAIT_S)
        ended = replay(session, node, "--timeout", 0.3)
    assert (ended.status, ended.err) == (1, "onlooker: another camera publishes stream front\n")


def test_what_is_for_a_session_is_not_for_videos(tmp_path: Path) -> None:
    assert onlooker("replay", tmp_path / "x.mp4", "--reset").status == 2


def test_a_session_that_is_not_there_is_named(tmp_path: Path, node: Node) -> None:
    ended = replay(tmp_path / "none.mcap", node)
    assert ended.status == 2
    assert "no such file" in words(ended.err)


def test_with_the_built_in_model_frames_and_answers_are_the_same(tmp_path: Path) -> None:
    engine = load_engine(device="cpu")
    with running_node(engine) as node:
        with recording(node, tmp_path) as first:
            _talk(first)
        (tmp_path / "again").mkdir()
        with recording(node, tmp_path / "again") as again:
            ends = again.endpoints
            flags = ["--frames", ends.frames, "--ask", ends.ask, "--control", ends.control]
            ended = onlooker("replay", first.path, "--rate", 0, "--reset", "--json", *flags)
    engine.close()
    assert ended.status == 0, ended.err
    assert [each["status"] for each in ended.json["outcomes"]] == ["same"] * 3
    before, after = _frames(first.path), _frames(again.path)
    assert len(before) == 17
    assert after == before


def _talk(recorder: Recording) -> None:
    with Show(recorder) as show:
        show.show(9, num_remembered=8)
        show.client.ask("front", "What colour is it?", max_new_tokens=8)
        show.show(7, num_remembered=16)
        show.client.ask_choice("front", "It is", ["red", "green", "blue"])
        show.client.ask("front", "And now?", max_new_tokens=8, temperature=1.0, seed=7)
        show.end(num_remembered=16)


def _frames(path: Path) -> list[tuple[Any, ...]]:
    with SessionReader(path) as reader:
        frames = [entry for entry in reader.entries() if isinstance(entry, FrameEntry)]
    return [(frame.seq, frame.header.ts, frame.header.enc, frame.payload) for frame in frames]
