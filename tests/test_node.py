"""The node starts or says why not, outlives every message, and ends in time whatever it is doing."""

import json
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import IO, Any

import msgpack
import pytest
import zmq
from deadline import until
from fakes import FakeEngine
from hypothesis import given, settings
from hypothesis import strategies as st
from nodes import FREE_PORTS, RawClient, packed, remember, running_node

from onlooker.node import node as node_module
from onlooker.node.__main__ import main
from onlooker.node.config import load
from onlooker.node.node import EngineFailedError, Node, StartError
from onlooker.node.options import StreamOptions
from onlooker.protocol.client import NodeClient
from onlooker.protocol.endpoints import ENDPOINTS
from onlooker.protocol.errors import NoReplyError
from onlooker.protocol.messages import Forecast, Marks

FAKE_NODE = Path(__file__).parent / "fake_node.py"
QUESTION = {"stream": "front", "question": "one two three four five six seven eight nine ten"}


@dataclass(frozen=True)
class NodeProcess:
    """A node in a process of its own."""

    process: subprocess.Popen[str]
    log_file: IO[bytes]

    def wait_ready(self) -> dict[str, Any]:
        """The line by which it says that it takes questions."""
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], 20)[0], "the node did not become ready"
        line = self.process.stdout.readline()
        assert line, self.log()
        return json.loads(line)

    def log(self) -> str:
        return os.pread(self.log_file.fileno(), 1 << 20, 0).decode()

    def end(self, number: int, within_s: float = 2.0) -> int:
        """Send a signal and return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(within_s)


@contextmanager
def node_process(
    *arguments: str, word_s: float = 0.0, load_s: float = 0.0, close_s: float = 0.0
) -> Iterator[NodeProcess]:
    delays = [str(seconds) for seconds in (word_s, load_s, close_s)]
    command = [sys.executable, str(FAKE_NODE), *delays, "--print-ready", "--stream", "front", *arguments]
    with tempfile.TemporaryFile() as log_file:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log_file, text=True)
        try:
            yield NodeProcess(process, log_file)
        finally:
            process.kill()
            process.communicate()


def flags(endpoints: dict[str, str]) -> list[str]:
    return [part for key, endpoint in endpoints.items() for part in ("--set", f"{key}={endpoint}")]


def ipc(folder: Path) -> dict[str, str]:
    return {key: f"ipc://{folder / key.removeprefix('endpoints.')}" for key in FREE_PORTS}


PORTS = flags(FREE_PORTS)


# ------------------------------------------------------------------------------------------ a process


def test_a_parent_reads_where_the_node_listens():
    with node_process(*PORTS) as node:
        ready = node.wait_ready()
        assert (ready["ready"], ready["pid"]) == (True, node.process.pid)
        assert list(ready["endpoints"]) == ["frames", "ask", "control", "telemetry"]
        assert not any(endpoint.endswith(("*", ":0")) for endpoint in ready["endpoints"].values())
        with RawClient(ready["endpoints"]["control"]) as client:
            assert client.ok("hello")["session"] == ready["session"]


def test_a_node_killed_amid_a_question_is_silent_and_the_next_one_answers(tmp_path: Path):
    endpoints = ipc(tmp_path)
    with node_process(*flags(endpoints), word_s=5.0) as node:
        first = node.wait_ready()
        asker = RawClient(endpoints["endpoints.ask"], zmq.REQ, REQ_CORRELATE=1, REQ_RELAXED=1)
        with asker, RawClient(endpoints["endpoints.control"]) as control:
            asker.send("ask", QUESTION)
            until(lambda: control.ok("status")["questions"]["received"])
            node.end(signal.SIGKILL)
            assert not asker.has_reply(100)
            with node_process(*flags(endpoints)) as next_node:  # what the dead one left is no obstacle
                second = next_node.wait_ready()
                reply = asker.call("ask", QUESTION)
                assert reply["data"]["text"] == QUESTION["question"]
                assert first["session"] != second["session"] == reply["session"]


def test_the_client_hears_of_a_killed_node_in_time_and_its_next_call_works(tmp_path: Path):
    endpoints = ipc(tmp_path)
    with NodeClient(endpoints["endpoints.ask"], endpoints["endpoints.control"]) as client:
        with node_process(*flags(endpoints), word_s=5.0) as node, ThreadPoolExecutor(1) as pool:
            client.wait_ready(20)
            asked = pool.submit(client.ask, "front", QUESTION["question"], timeout_s=0.7)
            until(lambda: client.status().questions.received)
            node.end(signal.SIGKILL)
            with pytest.raises(NoReplyError):
                asked.result(3.0)
        with node_process(*flags(endpoints)) as node:
            node.wait_ready()
            assert client.ask("front", QUESTION["question"]).text == QUESTION["question"]


def test_a_client_with_time_left_gets_its_answer_from_the_node_that_comes_back(tmp_path: Path):
    endpoints = ipc(tmp_path)
    with (
        NodeClient(endpoints["endpoints.ask"], endpoints["endpoints.control"]) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        with node_process(*flags(endpoints), word_s=5.0) as node:
            client.wait_ready(20)
            asked = pool.submit(client.ask, "front", QUESTION["question"], timeout_s=20.0)
            until(lambda: client.status().questions.received)
            node.end(signal.SIGKILL)
        with node_process(*flags(endpoints)):
            assert asked.result(20).text == QUESTION["question"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_idle_node_in_time(number: int):
    with node_process(*PORTS) as node:
        node.wait_ready()
        assert node.end(number) == 0
        assert "stopped" in node.log()


def test_a_signal_ends_a_node_amid_an_answer_and_the_asker_is_told():
    with node_process(*PORTS, word_s=0.3) as node, RawClient(node.wait_ready()["endpoints"]["ask"]) as asker:
        asker.send("ask", QUESTION, stream_reply=True)
        assert asker.receive()["status"] == "partial"
        assert node.end(signal.SIGTERM) == 0
        replies = [asker.receive()]
        while replies[-1]["status"] == "partial":
            replies.append(asker.receive())
        assert (replies[-1]["error"]["code"], replies[-1]["error"]["retryable"]) == ("NOT_READY", True)


def test_an_engine_that_does_not_end_cannot_keep_the_node():
    with node_process(*PORTS, close_s=60) as node:
        node.wait_ready()
        assert node.end(signal.SIGTERM) == 1
        assert "longer than" in node.log()


def test_a_second_signal_ends_it_at_once():
    with node_process(*PORTS, close_s=60) as node:
        node.wait_ready()
        node.process.send_signal(signal.SIGTERM)
        until(lambda: "ending" in node.log())
        assert node.end(signal.SIGINT, within_s=1) == 130


def test_ping_is_answered_while_the_model_is_loaded_and_a_signal_ends_the_loading(tmp_path: Path):
    endpoints = ipc(tmp_path)
    with node_process(*flags(endpoints), load_s=60) as node, RawClient(endpoints["endpoints.control"]) as client:
        pong = client.ok("ping")
        assert (pong["live"], pong["ready"]) == (True, False)
        assert client.error("hello")["code"] == "NOT_READY"
        assert node.end(signal.SIGTERM) == 0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--set", "questions.max_waitng=3"], "onlooker: questions.max_waitng: unknown key; did you mean max_waiting?"),
        (["--config", "nowhere.toml"], "onlooker: nowhere.toml: No such file or directory"),
        (["--set", "endpoints.ask=tcp://0.0.0.0:*"], "onlooker: endpoints.ask: tcp://0.0.0.0:* can be reached"),
        (["--log-level", "loud"], "onlooker: log.level: input should be"),
        (["--device", "tpu"], "onlooker: device: must be auto, cpu, cuda, cuda:N or balanced, got 'tpu'"),
        (["--set", "oops"], "onlooker: 'oops' is not key=value"),
    ],
)
def test_a_mistake_in_the_configuration_is_one_line_and_status_two(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
):
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(line)


def test_a_process_with_a_mistake_in_its_configuration_ends_without_a_traceback():
    with node_process("--set", "questions.max_waiting=none") as node:
        assert node.process.wait(10) == 2
        assert node.log().startswith("onlooker: questions.max_waiting: ")
        assert "Traceback" not in node.log()


def test_insecure_is_said_at_every_start():
    with node_process(*PORTS, "--set", "endpoints.control=tcp://0.0.0.0:*", "--insecure") as node:
        node.wait_ready()
        assert "insecure: anybody who reaches tcp://0.0.0.0:* may use the control socket" in node.log()


def test_a_port_that_is_taken_is_named():
    with running_node(None) as other:
        taken = other.endpoints["ask"]
        with node_process(*PORTS, "--set", f"endpoints.ask={taken}") as node:
            assert node.process.wait(10) == 1
            assert f"endpoints.ask: cannot listen at {taken}: Address already in use" in node.log()
            assert "stopped" not in node.log()
            assert "Traceback" not in node.log()


@pytest.mark.parametrize(
    ("model", "reason"), [("broken", "there is no such checkpoint"), ("small", "OUT_OF_MEMORY: there is no room")]
)
def test_a_model_that_cannot_be_loaded_is_named(model: str, reason: str):
    with node_process(*PORTS, "--model", model) as node:
        assert node.process.wait(10) == 1
        assert f"model: {model} cannot be loaded: {reason}" in node.log()
        assert "Traceback" not in node.log()


def test_help_needs_no_engine():
    command = [sys.executable, "-X", "importtime", "-m", "onlooker.node", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    for flag in ("--config", "--model", "--device", "--dtype", "--stream", "--set", "--insecure", "--print-ready"):
        assert flag in shown.stdout
    assert "torch" not in shown.stderr


# ------------------------------------------------------------------------------------------ the object


def test_a_node_that_cannot_start_leaves_nothing_behind():
    threads = threading.active_count()
    with running_node(None) as other:
        config = load(None, {**FREE_PORTS, "endpoints.control": other.endpoints["control"]})
        with pytest.raises(StartError, match=r"endpoints\.control"):
            Node(config).start()
    until(lambda: threading.active_count() <= threads)


def test_a_frames_endpoint_that_is_taken_is_named():
    with FakeEngine() as engine, running_node(engine) as other:
        config = load(None, {**FREE_PORTS, "endpoints.frames": other.endpoints["frames"]})
        with pytest.raises(StartError, match=r"endpoints\.frames: cannot listen"):
            Node(config, engine).start()


def test_a_stream_that_cannot_be_added_is_named():
    config = load(None, FREE_PORTS, streams=["front"])
    with FakeEngine() as engine, running_node(engine), pytest.raises(StartError, match="stream front: STREAM_EXISTS"):
        Node(config, engine).start()


def test_two_nodes_cannot_share_an_ipc_endpoint(tmp_path: Path):
    folder = tmp_path / "run"
    config = load(None, ipc(folder))
    with Node(config) as node:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        with pytest.raises(StartError, match=r"endpoints\.frames: another process listens at ipc://"):
            Node(config).start()
        with RawClient(node.endpoints["control"]) as client:
            assert client.ok("ping")["live"]
    with Node(config):
        pass


def test_a_node_does_not_outlive_its_engine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(node_module, "ENGINE_CHECK_S", 0.05)
    engine = FakeEngine()
    with running_node(engine) as node:
        engine.is_ready = False
        with pytest.raises(EngineFailedError):
            node.run()


def test_closing_ends_every_thread_and_may_be_repeated():
    before = set(threading.enumerate())
    with FakeEngine() as engine:
        with running_node(engine) as node:
            node.close()
        node.close()
    until(lambda: set(threading.enumerate()) <= before)


class StuckEngine(FakeEngine):
    """An engine that keeps the thread which asks it for marks, until `is_free`."""

    def __init__(self) -> None:
        super().__init__()
        self.is_asked, self.is_free = threading.Event(), threading.Event()

    def marks(self, stream: str) -> Future[Marks]:
        self.is_asked.set()
        self.is_free.wait(20)
        return super().marks(stream)


def test_closing_is_bounded_though_a_thread_is_stuck(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(node_module, "CONTEXT_END_S", 0.3)
    before = set(threading.enumerate())
    engine = StuckEngine()
    with (
        engine,
        running_node(engine) as node,
        RawClient(node.endpoints["control"]) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        client.send("marks", {"stream": "front"})
        assert engine.is_asked.wait(5)
        try:
            pool.submit(node.close).result(10)
            assert "a thread of the node has not ended" in caplog.text
        finally:
            engine.is_free.set()
    until(lambda: set(threading.enumerate()) <= before)


# ------------------------------------------------------------------------------------------ any message


@pytest.fixture(scope="module")
def besieged() -> Iterator[Node]:
    with FakeEngine() as engine, running_node(engine) as node:
        remember(engine)
        yield node


@pytest.fixture(scope="module")
def besieged_by(besieged: Node) -> Iterator[dict[str, RawClient]]:
    with RawClient(besieged.endpoints["ask"]) as ask, RawClient(besieged.endpoints["control"]) as control:
        yield {"ask": ask, "control": control}


NAMES = st.sampled_from([*ENDPOINTS, "nosuch", ""])
SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    [
        "stream",
        "question",
        "options",
        "name",
        "id",
        "session",
        "max_new_tokens",
        "temperature",
        "top_p",
        "stop",
        "as_of",
    ]
)
REQUESTS = st.fixed_dictionaries(
    {},
    optional={
        "v": st.just(1) | SCALARS,
        "id": st.text(max_size=5) | VALUES,
        "session": st.text(max_size=5) | VALUES,
        "endpoint": NAMES | VALUES,
        "deadline_ms": st.integers(1, 50) | VALUES,
        "stream_reply": st.booleans() | VALUES,
        "data": st.dictionaries(FIELDS, st.just("front") | VALUES, max_size=6) | VALUES,
    },
)
BODIES = st.one_of(
    st.binary(max_size=200),
    REQUESTS.map(packed),
    st.tuples(REQUESTS.map(packed), st.integers(0, 300)).map(lambda cut: cut[0][: cut[1]]),
)
MESSAGES = st.lists(BODIES, min_size=1, max_size=3) | st.lists(st.binary(max_size=300), max_size=12)


@settings(max_examples=150, deadline=None)
@given(parts=MESSAGES, name=st.sampled_from(["ask", "control"]), seed=st.integers(0, 2**32))
def test_no_message_ends_the_node(besieged_by: dict[str, RawClient], parts: list[bytes], name: str, seed: int):
    """Each message as it is, and twenty times damaged."""
    client, random = besieged_by[name], Random(seed)
    client.socket.send_multipart(parts or [b""])
    for _ in range(20):
        client.socket.send_multipart([damaged(part, random) for part in parts] or [b""])
    known = client.send("hello")
    while (reply := any_reply(client))["id"] != known:
        assert reply["status"] in ("ok", "partial", "error")
        assert reply["status"] != "error" or reply["error"]["code"] != "INTERNAL", reply


def damaged(part: bytes, random: Random) -> bytes:
    if not part:
        return random.randbytes(random.randrange(4))
    start = random.randrange(len(part))
    return part[:start] + random.randbytes(random.randrange(3)) + part[start + random.randrange(3) :]


def any_reply(client: RawClient) -> dict[str, Any]:
    assert client.has_reply(5000), "the node does not answer any more"
    return msgpack.unpackb(client.socket.recv_multipart()[-1])


def test_a_message_that_is_too_large_costs_its_sender_the_connection_and_nobody_else(besieged: Node):
    with RawClient(besieged.endpoints["ask"]) as rude, RawClient(besieged.endpoints["ask"]) as client:
        rude.send_bytes(bytes(5 << 20))
        assert not rude.has_reply(50)
        assert client.ok("hello")["node"] == "n1"


@pytest.mark.parametrize("line", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01" + bytes(100), bytes(1000)])
def test_another_protocol_on_the_port_harms_nobody(besieged: Node, line: bytes):
    host, port = besieged.endpoints["control"].removeprefix("tcp://").split(":")
    with RawClient(besieged.endpoints["control"]) as control, socket.create_connection((host, int(port))) as odd:
        odd.sendall(line)
        odd.close()
        assert control.ok("ping")["live"]
        if line.startswith(b"GET"):
            until(lambda: control.ok("status")["rejected"].get("handshake_failed"))


def test_a_node_is_ready_once_the_streams_of_its_configuration_are_there():
    class AskedEngine(FakeEngine):
        def add_stream(self, options: StreamOptions) -> Future[Forecast]:
            seen.append(node._state.pong().ready)
            return super().add_stream(options)

    seen: list[bool] = []
    with AskedEngine() as engine, running_node(None) as node:
        node.attach(engine)
        assert seen == [False]
        assert node._state.pong().ready
