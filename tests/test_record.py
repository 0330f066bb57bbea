"""A recorder changes nothing for cameras and clients, and notes what the node was given."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from commands import endpoint_flags, onlooker, start_onlooker
from deadline import until
from fakes import FakeEngine
from nodes import RawClient, remember, running_node
from test_commands import run_without

from onlooker.node.node import Node
from onlooker.protocol.camera import FramePublisher
from onlooker.protocol.client import NodeClient
from onlooker.protocol.curve import generate, write_keypair
from onlooker.protocol.telemetry import TelemetrySubscriber
from onlooker.tools.connection import Keys
from onlooker.tools.record import Recorder
from onlooker.tools.session_file import (
    FrameEntry,
    ReplyEntry,
    RequestEntry,
    SessionReader,
    SessionWriter,
    TelemetryEntry,
)
from onlooker.tools.tap import Endpoints, Tap

WAIT_S = 10.0
ANYWHERE = Endpoints(*("tcp://127.0.0.1:*",) * 3)
QUESTION = {"stream": "front", "question": "one two three"}


@dataclass(frozen=True)
class Recording:
    """A recorder that runs, where it listens, and what it has noted."""

    endpoints: Endpoints
    path: Path
    recorder: Recorder
    tap: Tap


@contextmanager
def recording(node: Node, folder: Path, keys: Keys = Keys()) -> Iterator[Recording]:  # noqa: B008
    ends, path = node.endpoints, folder / "session.mcap"
    there = Endpoints(ends["frames"], ends["ask"], ends["control"])
    should_end = threading.Event()
    with (
        TelemetrySubscriber(ends["telemetry"], server_key=keys.server, client_key=keys.client) as telemetry,
        Tap(ANYWHERE, there, keys) as tap,
        closing(SessionWriter(path)) as writer,
    ):
        recorder = Recorder(writer)

        def run() -> None:
            while not should_end.is_set():
                for passed in tap.pass_on(0.02):
                    recorder.note(passed)
                recorder.follow(telemetry)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield Recording(tap.endpoints, path, recorder, tap)
        finally:
            should_end.set()
            thread.join()


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    with FakeEngine() as engine:
        yield engine


@pytest.fixture
def node(engine: FakeEngine) -> Iterator[Node]:
    with running_node(engine, telemetry__period_s=0.1) as node:
        yield node


def recorded(path: Path, kind: type) -> list[Any]:
    with SessionReader(path) as reader:
        return [entry for entry in reader.entries() if isinstance(entry, kind)]


def show(endpoint: str, num_frames: int, **settings: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (num_frames, 6, 8, 3), np.uint8)
    with FramePublisher("front", connect=endpoint, lossless=True, **settings) as camera:
        assert camera.wait_for_subscriber(WAIT_S)
        for n, picture in enumerate(pixels):
            camera.publish_image(picture, ts=n * 10**9, fps=1.0)
        camera.end()


def test_frames_reach_the_node_and_the_file_byte_for_byte(tmp_path: Path, engine: FakeEngine, node: Node) -> None:
    with recording(node, tmp_path) as recorder:
        show(recorder.endpoints.frames, 8)
        until(lambda: len(engine.pictures("front")) == 8, WAIT_S)
    *frames, end = recorded(recorder.path, FrameEntry)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 6, 8, 3), np.uint8)
    assert [frame.payload for frame in frames] == [picture.tobytes() for picture in pixels]
    assert [frame.seq for frame in frames] == list(range(8))
    assert [frame.header.ts for frame in frames] == [picture.ts for picture in engine.pictures("front")]
    assert end.header.eos and end.seq == 8


def test_a_camera_hears_of_the_node_itself_and_not_of_the_recorder() -> None:
    nowhere = Endpoints("ipc:///nowhere/f", "ipc:///nowhere/a", "ipc:///nowhere/c")
    with Tap(ANYWHERE, nowhere, Keys()) as tap, FramePublisher("front", connect=tap.endpoints.frames) as camera:
        tap.pass_on(0.05)
        assert not camera.wait_for_subscriber(0.1)


def test_questions_and_answers_pass_and_are_noted(tmp_path: Path, engine: FakeEngine, node: Node) -> None:
    remember(engine, 4)
    with recording(node, tmp_path) as recorder:
        ends = recorder.endpoints
        with NodeClient(ends.ask, ends.control) as client:
            answer = client.ask("front", "one two three", temperature=0.5, seed=3, stop=["x"])
            pieces = list(client.ask_stream("front", "four five"))
            choice = client.ask_choice("front", "which", ["long one", "short"])
            client.mark("front", "here")
            client.status()
    asked = recorded(recorder.path, RequestEntry)
    replied = recorded(recorder.path, ReplyEntry)
    assert [entry.endpoint for entry in asked] == ["ask", "ask", "ask_choice", "mark"]
    assert (asked[0].request.data.question, asked[0].request.data.seed, asked[0].request.data.stop) == (
        "one two three",
        3,
        ["x"],
    )
    assert [entry.reply.data for entry in replied[:3]] == [answer, pieces[-1], choice]
    assert [entry.request.id for entry in asked] == [entry.reply.id for entry in replied]


def test_an_error_passes_and_is_noted(tmp_path: Path, node: Node) -> None:
    with recording(node, tmp_path) as recorder, RawClient(recorder.endpoints.ask) as client:
        assert client.error("ask", QUESTION | {"stream": "nowhere"})["code"] == "UNKNOWN_STREAM"
        assert client.error("ask", {"stream": "front"})["code"] == "BAD_REQUEST"
    (reply, *_) = recorded(recorder.path, ReplyEntry)
    assert reply.reply.status == "error"
    assert len(recorded(recorder.path, RequestEntry)) == 1  # what the node refuses to read is no part of a session


@pytest.mark.parametrize(
    ("kind", "prefix", "options"),
    [
        (zmq.REQ, (), {}),
        (zmq.REQ, (), {"REQ_CORRELATE": 1, "REQ_RELAXED": 1}),
        (zmq.DEALER, (b"",), {}),
        (zmq.DEALER, (), {}),
        (zmq.DEALER, (b"hop", b""), {}),
    ],
    ids=["REQ", "REQ that correlates", "DEALER", "DEALER without an empty part", "DEALER behind a proxy"],
)
def test_every_kind_of_client_gets_its_reply(
    tmp_path: Path, engine: FakeEngine, node: Node, kind: int, prefix: tuple[bytes, ...], options: dict[str, int]
) -> None:
    remember(engine, 4)
    with recording(node, tmp_path) as recorder, RawClient(recorder.endpoints.ask, kind, prefix, **options) as client:
        assert client.ok("ask", QUESTION)["text"] == "one two three"


def test_the_node_tells_the_clients_behind_a_recorder_apart(tmp_path: Path, engine: FakeEngine) -> None:
    with running_node(engine, questions__max_per_client=1) as node, recording(node, tmp_path) as recorder:
        remember(engine, 4)
        engine.hold()
        with RawClient(recorder.endpoints.ask) as first, RawClient(recorder.endpoints.ask) as second:
            first.send("ask", QUESTION)
            second.send("ask", QUESTION)
            until(lambda: engine.num_waiting == 2, WAIT_S)
            assert first.error("ask", QUESTION)["code"] == "BUSY"
            engine.let_go()
            assert first.receive()["status"] == second.receive()["status"] == "ok"


def test_telemetry_is_noted(tmp_path: Path, node: Node) -> None:
    with recording(node, tmp_path) as recorder:
        until(lambda: recorder.recorder.recorded.num_records >= 3, WAIT_S)
    kinds = {type(entry.record).__name__ for entry in recorded(recorder.path, TelemetryEntry)}
    assert {"Hello", "NodeStats", "StreamStats"} <= kinds


def test_what_is_no_frame_is_passed_on_and_said_to_be_missing(tmp_path: Path, node: Node) -> None:
    with recording(node, tmp_path) as recorder, zmq.Context() as context:
        camera = context.socket(zmq.XPUB)
        camera.connect(recorder.endpoints.frames)
        assert camera.poll(int(WAIT_S * 1000))
        camera.send_multipart([b"frame/front/", b"short", b"\x80", b"x"])
        with NodeClient(node.endpoints["ask"], node.endpoints["control"]) as client:
            until(lambda: client.status().rejected.get("malformed"), WAIT_S)
        camera.close()
    assert recorder.tap.passage.unreadable == {"frames": 1}
    assert recorded(recorder.path, FrameEntry) == []


def test_keys_open_a_node_that_requires_them(tmp_path: Path, engine: FakeEngine) -> None:
    server, clients = generate(), generate()
    write_keypair(tmp_path, "node", server)
    (tmp_path / "clients").mkdir()
    write_keypair(tmp_path / "clients", "recorder", clients)
    settings = {
        "security__curve": "required",
        "security__server_key": str(tmp_path / "node.key_secret"),
        "security__client_keys": str(tmp_path / "clients"),
    }
    keys = Keys(tmp_path / "node.key", tmp_path / "clients" / "recorder.key_secret")
    with running_node(engine, **settings) as node, recording(node, tmp_path, keys) as recorder:
        remember(engine, 4)
        show(recorder.endpoints.frames, 4)
        with RawClient(recorder.endpoints.ask) as client:
            assert client.ok("ask", QUESTION)["text"] == "one two three"
        until(lambda: len(engine.pictures("front")) == 8, WAIT_S)


# The command


def listening(command: subprocess.Popen[str]) -> dict[str, str]:
    """Where a recorder that was just started listens."""
    assert command.stderr is not None
    words = command.stderr.readline().split(": ", 1)[1].split()
    return dict(zip((word.removeprefix("--") for word in words[::2]), words[1::2], strict=True))


FREE = [part for name in ("frames", "ask", "control") for part in (f"--listen-{name}", "tcp://127.0.0.1:*")]


def test_the_command_records_until_it_is_asked_to_end(tmp_path: Path, engine: FakeEngine, node: Node) -> None:
    path = tmp_path / "session.mcap"
    flags = endpoint_flags(node, "frames", "ask", "control", "telemetry")
    with start_onlooker("record", path, *FREE, *flags) as command:
        ends = listening(command)
        show(ends["frames"], 4)
        with NodeClient(ends["ask"], ends["control"]) as client:
            until(lambda: client.cache_info("front").num_frames == 4, WAIT_S)
            client.ask("front", "one two")
        command.send_signal(signal.SIGTERM)
        out, err = command.communicate(timeout=WAIT_S)
    assert (command.returncode, err) == (0, "")
    assert "frames: front 4; requests: ask 1; " in out
    assert len(recorded(path, FrameEntry)) == 5


def test_a_memory_that_is_not_empty_is_said(tmp_path: Path, engine: FakeEngine, node: Node) -> None:
    remember(engine, 4)
    flags = endpoint_flags(node, "frames", "ask", "control", "telemetry")
    with start_onlooker("record", tmp_path / "x.mcap", *FREE, *flags) as command:
        assert command.stderr is not None
        assert command.stderr.readline().startswith("stream front holds 4 frames that are not recorded")
        listening(command)
        command.send_signal(signal.SIGINT)
        assert command.wait(WAIT_S) == 0


def test_a_file_that_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "x.mcap").write_bytes(b"precious")
    ended = onlooker("record", tmp_path / "x.mcap")
    assert ended.status == 2
    assert "--force" in ended.err
    assert (tmp_path / "x.mcap").read_bytes() == b"precious"


def test_a_recorder_is_not_open_to_other_machines(tmp_path: Path) -> None:
    ended = onlooker("record", tmp_path / "x.mcap", "--listen-ask", "tcp://0.0.0.0:6560")
    assert ended.status == 2
    assert "this machine alone" in " ".join(ended.err.split())


def test_a_disk_that_is_full_ends_the_recording_with_a_word(node: Node) -> None:
    flags = endpoint_flags(node, "frames", "ask", "control", "telemetry")
    with start_onlooker("record", "/dev/full", "--force", *FREE, *flags) as command:
        listening(command)
        command.send_signal(signal.SIGINT)
        _, err = command.communicate(timeout=WAIT_S)
    assert command.returncode == 1
    assert err == "onlooker: /dev/full: No space left on device; the recording ends here\n"


def test_a_folder_that_is_not_there_is_named(node: Node, tmp_path: Path) -> None:
    flags = endpoint_flags(node, "frames", "ask", "control", "telemetry")
    ended = onlooker("record", tmp_path / "none" / "x.mcap", *FREE, *flags)
    assert ended.status == 1
    assert "No such file or directory" in ended.err


def test_without_a_node_there_is_nothing_to_record(tmp_path: Path) -> None:
    nowhere = ("--ask", "ipc:///nowhere/a", "--control", "ipc:///nowhere/c")
    ended = onlooker("record", tmp_path / "x.mcap", "--timeout", 0.2, *nowhere)
    assert ended.status == 3
    assert not (tmp_path / "x.mcap").exists()


@pytest.mark.parametrize("module", ["mcap.writer", "foxglove_schemas_protobuf.RawImage_pb2", "google.protobuf"])
def test_without_its_extra_it_says_what_to_install(module: str, tmp_path: Path) -> None:
    (tmp_path / "x.mcap").touch()
    for arguments in (("record", str(tmp_path / "y.mcap")), ("replay", str(tmp_path / "x.mcap"))):
        run = run_without(module, *arguments)
        assert run.returncode == 1
        assert run.stderr.endswith("install it with: pip install 'onlooker[record]'\n")
