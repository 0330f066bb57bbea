"""Those who watch learn who the node is, how it does, and what changed."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import zmq
from fakes import FakeEngine
from nodes import RawClient, remember, running_node

from onlooker.node.node import Node
from onlooker.protocol.codec import TelemetryRecord, decode_telemetry, encode_frame
from onlooker.protocol.messages import Answer, FrameHeader, Hello


class Watcher:
    """A SUB that keeps what it heard."""

    def __init__(self, endpoint: str, prefix: bytes = b"") -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.linger = 0
        self._socket.connect(endpoint)
        self._socket.subscribe(prefix)
        self.heard: list[TelemetryRecord] = []

    def __enter__(self) -> "Watcher":
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.close(linger=0)
        self._context.term()

    def until(self, is_it: Callable[[TelemetryRecord], bool], seconds: float = 5.0) -> TelemetryRecord:
        """Listen until a record fits."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if self._socket.poll(int(left * 1e3) + 1):
                self.heard.append(decode_telemetry(self._socket.recv_multipart()))
                if is_it(self.heard[-1]):
                    return self.heard[-1]
        raise AssertionError(f"it was not heard, only {[heard.topic for heard in self.heard]}")

    def until_event(self, kind: str) -> Any:
        return self.until(lambda heard: heard.kind == "event" and getattr(heard.record, "kind", None) == kind).record

    def until_kind(self, kind: str) -> TelemetryRecord:
        return self.until(lambda heard: heard.kind == kind)


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    with FakeEngine() as engine:
        yield engine


@pytest.fixture
def node(engine: FakeEngine) -> Iterator[Node]:
    with running_node(engine, telemetry__period_s=0.05) as node:
        yield node


@pytest.fixture
def watcher(node: Node) -> Iterator[Watcher]:
    with Watcher(node.endpoints["telemetry"]) as watcher:
        yield watcher


def publish(socket: zmq.Socket, num_frames: int, session: str = "camera", *, ends: bool = False) -> None:
    for seq in range(num_frames):
        header = FrameHeader(session=session, stream="front", ts=10**9 + seq * 10**7, enc="mono8", w=8, h=8)
        socket.send_multipart(encode_frame(header, seq, bytes(64)))
    if ends:
        socket.send_multipart(
            encode_frame(FrameHeader(session=session, stream="front", ts=2 * 10**9, eos=True), num_frames)
        )


@pytest.fixture
def camera(node: Node) -> Iterator[zmq.Socket]:
    context = zmq.Context()
    with context.socket(zmq.XPUB) as socket:
        socket.linger = 0
        socket.connect(node.endpoints["frames"])
        assert socket.poll(5000)
        yield socket
    context.term()


def test_a_newcomer_is_greeted(watcher: Watcher, node: Node):
    hello = watcher.until_kind("hello")
    assert hello.topic == "hello/n1/"
    assert isinstance(hello.record, Hello)
    assert (hello.record.endpoints, hello.record.streams) == (node.endpoints, ["front"])


def test_who_subscribes_to_hello_alone_is_greeted_too_and_everyone_once(node: Node):
    with Watcher(node.endpoints["telemetry"], b"hello/") as first:
        first.until_kind("hello")
        with Watcher(node.endpoints["telemetry"], b"hello/") as second:
            second.until_kind("hello")
        first.until_kind("hello")


def test_records_come_once_a_period_and_are_numbered_by_topic(watcher: Watcher):
    for _ in range(4):
        watcher.until_kind("stats")
        watcher.until_kind("stream")
    for kind in ("stats", "stream"):
        seqs = [heard.seq for heard in watcher.heard if heard.kind == kind]
        assert seqs == list(range(seqs[0], seqs[0] + len(seqs)))
    times = [heard.record.ts for heard in watcher.heard if heard.kind == "stats"]  # type: ignore[union-attr]
    assert 0.1 < (times[-1] - times[0]) / 1e9 < 2.0
    assert {heard.topic for heard in watcher.heard} >= {"stats/n1/", "stream/n1/front/"}


def test_unknown_facts_are_absent(watcher: Watcher):
    stream: Any = watcher.until_kind("stream").record
    absent = {stream.fps_received, stream.fps_encoded, stream.lag_ms, stream.received_size, stream.stages.vision_ms}
    assert len(absent) == 1 and not absent.pop()


def test_a_stream_tells_what_happens_to_it(watcher: Watcher, node: Node, camera: zmq.Socket):
    with RawClient(node.endpoints["control"]) as control:
        watcher.until_kind("hello")
        publish(camera, 4)
        assert watcher.until_event("stream_online").stream == "front"
        watcher.until(lambda heard: heard.kind == "stream" and heard.record.cache.num_frames == 4)  # type: ignore[union-attr]
        control.ok("stream_pause", {"stream": "front"})
        watcher.until_event("stream_paused")
        control.ok("stream_resume", {"stream": "front"})
        watcher.until_event("stream_online")
        control.ok("mark", {"stream": "front", "name": "here"})
        control.ok("rollback", {"stream": "front", "name": "here"})
        assert watcher.until_event("rolled_back").details == {"mark": "here"}
        control.ok("reset", {"stream": "front"})
        watcher.until_event("reset")
        control.ok("stream_add", {"stream": "back"})
        assert watcher.until_event("stream_added").stream == "back"
        control.ok("stream_remove", {"stream": "back"})
        assert watcher.until_event("stream_removed").stream == "back"


def test_the_end_of_a_stream_and_the_next_publisher_are_told(watcher: Watcher, camera: zmq.Socket):
    watcher.until_kind("hello")
    publish(camera, 4, ends=True)
    watcher.until_event("stream_ended")
    publish(camera, 2, session="another")
    watcher.until_event("publisher_restarted")
    watcher.until_event("stream_online")


def test_what_a_stream_gives_up_is_told_before_the_next_report_is_due(engine: FakeEngine):
    with running_node(engine, telemetry__period_s=60) as node, Watcher(node.endpoints["telemetry"]) as watcher:
        watcher.until_kind("hello")
        for degraded in (["gate"], []):  # the first one may have come with the first report
            node._state.intake.adjust("front", engine._memories["front"].options, degraded)
            watcher.until(lambda heard, given_up=degraded: getattr(heard.record, "degraded", None) == given_up)


def test_a_full_memory_is_told(engine: FakeEngine, watcher: Watcher, camera: zmq.Socket):
    engine.capacity_tokens = 16
    watcher.until_kind("hello")
    publish(camera, 8)
    full = watcher.until_event("memory_full")
    assert (full.details, full.message.split(":")[0]) == ({"limit": "memory"}, "the memory is full")


def test_what_a_full_memory_forgot_is_told_and_not_with_every_chunk(
    engine: FakeEngine, watcher: Watcher, camera: zmq.Socket
):
    engine.num_forgotten_frames = 3
    watcher.until_kind("hello")
    publish(camera, 8)
    event = watcher.until_event("forgot")
    assert event.stream == "front" and event.details["retention"] == "stop"
    assert event.details["num_frames"] in (3, 6) and event.details["oldest_ns"] == 10**9
    watcher.until(lambda heard: heard.kind == "stream" and heard.record.frames.forgotten == 6)  # type: ignore[union-attr]
    watcher.until_kind("stats")
    assert [heard.record for heard in watcher.heard if getattr(heard.record, "kind", None) == "forgot"] == [event]


def test_what_a_memory_of_the_last_frames_forgets_is_no_news(
    engine: FakeEngine, node: Node, watcher: Watcher, camera: zmq.Socket
):
    engine.num_forgotten_frames = 3
    node._state.intake.adjust("front", replace(engine._memories["front"].options, last_frames=4), [])
    publish(camera, 8)
    watcher.until(lambda heard: heard.kind == "stream" and heard.record.frames.forgotten == 6)  # type: ignore[union-attr]
    watcher.until_kind("stats")  # a look later
    assert not [heard for heard in watcher.heard if getattr(heard.record, "kind", None) == "forgot"]


def test_a_defect_is_told_by_its_error_id(engine: FakeEngine, node: Node, watcher: Watcher):
    watcher.until_kind("hello")
    remember(engine)
    engine.fail_ask = ZeroDivisionError("a defect")
    with RawClient(node.endpoints["ask"]) as client:
        error = client.error("ask", {"stream": "front", "question": "?"})
    assert watcher.until_event("request_failed").details == {"error_id": error["error_id"]}


class TracingEngine(FakeEngine):
    """An engine whose answers change the memory."""

    def ask(self, *args: Any, **kwargs: Any) -> Future[Answer]:
        traced: Future[Answer] = Future()
        honest = super().ask(*args, **kwargs)
        honest.add_done_callback(lambda done: traced.set_result(_with_trace(done.result())))
        return traced


def _with_trace(answer: Answer) -> Answer:
    memory = msgspec.structs.replace(answer.memory, fingerprint_after="changed", unchanged=False)
    return msgspec.structs.replace(answer, memory=memory)


def test_an_answer_that_left_a_trace_is_told():
    with TracingEngine() as engine, running_node(engine) as node, Watcher(node.endpoints["telemetry"]) as watcher:
        watcher.until_kind("hello")
        remember(engine)
        with RawClient(node.endpoints["ask"]) as client:
            client.ok("ask", {"stream": "front", "question": "?"})
        event = watcher.until_event("trace_left")
        assert (event.stream, event.details["after"]) == ("front", "changed")


def test_a_node_that_loads_its_model_greets_once_it_has_it(engine: FakeEngine):
    with running_node(None, telemetry__period_s=0.05) as node, Watcher(node.endpoints["telemetry"]) as watcher:
        node.attach(engine)
        watcher.until_kind("hello")
        watcher.until_kind("stats")
        node.close()


def test_the_last_word_is_that_the_node_stops(node: Node, watcher: Watcher):
    watcher.until_kind("stats")
    node.close()
    stopping = watcher.until(lambda heard: heard.kind == "stats" and heard.record.state == "stopping")  # type: ignore[union-attr]
    assert stopping.node == "n1"


@pytest.mark.parametrize("message", [b"", b"\x00", b"\x01" + b"\xff" * 3000, b"\x02garbage", b"\x00nobody"])
def test_malformed_subscriptions_do_no_harm(node: Node, watcher: Watcher, message: bytes):
    context = zmq.Context()
    with context.socket(zmq.XSUB) as odd:
        odd.linger = 0
        odd.connect(node.endpoints["telemetry"])
        for _ in range(50):
            odd.send(message)
            odd.send_multipart([message, b"more"])
        odd.send(b"\x01stats/")
        assert odd.poll(5000)
    context.term()
    watcher.until_kind("stats")


def test_what_cannot_be_published_does_not_end_telemetry(engine: FakeEngine, watcher: Watcher, monkeypatch):
    def broken() -> Any:
        raise ZeroDivisionError("a defect")

    watcher.until_kind("stats")
    with monkeypatch.context() as patch:
        patch.setattr(engine, "vram", broken)
        watcher.until_kind("stream")
    watcher.until_kind("stats")


def test_the_numbers_of_a_stream_that_is_gone_are_forgotten(node: Node, watcher: Watcher):
    def is_of_back(heard: TelemetryRecord) -> bool:
        return heard.topic == "stream/n1/back/"

    with RawClient(node.endpoints["control"]) as control:
        control.ok("stream_add", {"stream": "back"})
        watcher.until(lambda heard: is_of_back(heard) and heard.seq > 2)
        control.ok("stream_remove", {"stream": "back"})
        removed_at = watcher.until_event("stream_removed").ts
        watcher.until(lambda heard: heard.kind == "stats" and heard.record.ts > removed_at + 10**8)  # type: ignore[union-attr]
        control.ok("stream_add", {"stream": "back"})
        assert watcher.until(is_of_back).seq == 0


def test_subscriptions_without_end_do_not_keep_the_records_back(watcher: Watcher, node: Node):
    stop = threading.Event()

    def subscribe_on_and_on() -> None:
        with zmq.Context() as context, context.socket(zmq.XSUB) as flooder:
            flooder.linger = 0
            flooder.sndtimeo = 100
            flooder.connect(node.endpoints["telemetry"])
            while not stop.is_set():
                with contextlib.suppress(zmq.Again):
                    flooder.send(b"\x01nothing")
                    flooder.send(b"\x00nothing")

    with ThreadPoolExecutor(1) as pool:
        watcher.until_kind("stats")
        flooding = pool.submit(subscribe_on_and_on)
        try:
            for _ in range(10):
                watcher.until_kind("stats")
        finally:
            stop.set()
        flooding.result(5)
