"""The control socket acts on streams, and answers while the engine cannot."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import msgspec
import numpy as np
import pytest
import zmq
from deadline import until
from fakes import FakeEngine
from nodes import RawClient, remember, running_node

from onlooker.node import node as node_module
from onlooker.node.node import Node
from onlooker.protocol.codec import encode_frame
from onlooker.protocol.endpoints import ENDPOINTS
from onlooker.protocol.errors import ErrorCode, NodeError
from onlooker.protocol.messages import Event, Forecast, FrameHeader, StreamSpec
from onlooker.protocol.telemetry import TelemetrySubscriber

FRONT = {"stream": "front"}


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    with FakeEngine() as engine:
        yield engine


@pytest.fixture
def node(engine: FakeEngine) -> Iterator[Node]:
    with running_node(engine) as node:
        yield node


@pytest.fixture
def client(node: Node) -> Iterator[RawClient]:
    with RawClient(node.endpoints["control"]) as client:
        yield client


class Camera:
    """Publishes small grey frames to the node by hand."""

    def __init__(self, endpoint: str, stream: str = "front") -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.XPUB)
        self._socket.linger = 0
        self._socket.connect(endpoint)
        self._stream = stream
        self._seq = 0
        assert self._socket.poll(5000)  # the node has subscribed
        self._socket.recv()

    def __enter__(self) -> "Camera":
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.close(linger=0)
        self._context.term()

    def publish(self, num_frames: int) -> None:
        pixels = np.zeros((8, 8), np.uint8).tobytes()
        for _ in range(num_frames):
            ts = 1_000_000_000 + self._seq * 40_000_000
            header = FrameHeader(session="camera", stream=self._stream, ts=ts, enc="mono8", w=8, h=8)
            self._socket.send_multipart(encode_frame(header, self._seq, pixels))
            self._seq += 1


def test_each_socket_has_the_endpoints_of_the_protocol(node: Node):
    for socket in ("ask", "control"):
        with RawClient(node.endpoints[socket]) as client:
            known = client.error("nosuch")["details"]["endpoints"]
        assert known == sorted(name for name, endpoint in ENDPOINTS.items() if socket in endpoint.sockets)


def test_every_reply_is_of_the_type_the_protocol_says(engine: FakeEngine, client: RawClient):
    remember(engine)
    mark = FRONT | {"name": "m"}
    data = {"mark": mark, "rollback": mark, "mark_delete": mark, "cancel": {"id": "x", "session": "y"}}
    data |= {name: FRONT for name in ("cache_info", "reset", "marks", "stream_pause", "stream_resume")}
    order = ["ping", "hello", "status", "streams", "cache_info", "mark", "marks", "rollback", "mark_delete"]
    for name in [*order, "stream_pause", "stream_resume", "cancel", "reset"]:
        msgspec.convert(client.ok(name, data.get(name)), ENDPOINTS[name].reply)


def test_ping_is_answered_while_the_engine_is_stuck(engine: FakeEngine, client: RawClient):
    engine.hold()
    client.send("marks", FRONT)
    pong = client.ok("ping")
    assert pong["live"] and pong["ready"] and pong["engine_progress_age_ms"] >= 0
    assert client.ok("status")["state"] == "ready"
    engine.let_go()
    assert client.receive()["data"] == {"marks": []}


def test_ping_tells_live_from_ready(engine: FakeEngine, client: RawClient):
    engine.is_ready = False
    pong = client.ok("ping")
    assert pong["live"] and not pong["ready"]
    assert client.ok("status")["state"] == "starting"


class StuckEngine(FakeEngine):
    """An engine that has not come round for a while."""

    progress_age_ms = 10_001.0  # type: ignore[assignment]


def test_an_engine_that_does_not_come_round_is_not_ready_and_the_node_goes_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(node_module, "ENGINE_CHECK_S", 0.1)
    with StuckEngine() as engine, running_node(engine) as node, RawClient(node.endpoints["control"]) as client:
        pong = client.ok("ping")
        assert (pong["live"], pong["ready"], pong["engine_progress_age_ms"]) == (True, False, 10_001.0)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(node.run)
            with pytest.raises(TimeoutError):
                running.result(1.5 * node_module.ENGINE_CHECK_S)  # an end of the engine would be noticed
            node.request_stop()
            running.result(5)


def test_before_the_model_is_loaded_only_ping_is_answered():
    with running_node(None) as node, RawClient(node.endpoints["control"]) as client:
        pong = client.ok("ping")
        assert pong["live"] and not pong["ready"]
        for endpoint in ("hello", "status", "streams"):
            error = client.error(endpoint)
            assert (error["code"], error["retryable"]) == ("NOT_READY", True)
        assert client.error("reset", FRONT)["code"] == "NOT_READY"
        assert client.error("stream_add", {"stream": "s"})["code"] == "NOT_READY"
        with RawClient(node.endpoints["ask"]) as asker:
            assert asker.error("ask", FRONT | {"question": "?"})["code"] == "NOT_READY"
        with FakeEngine() as engine:
            node.attach(engine)
            assert client.ok("ping")["ready"]
            assert client.ok("hello")["streams"] == ["front"]
            node.close()


def test_marks_are_set_listed_rolled_back_to_and_deleted(engine: FakeEngine, client: RawClient):
    remember(engine)
    mark = FRONT | {"name": "before"}
    assert client.ok("mark", mark)["num_frames"] == 2
    remember(engine, first_seq=2)
    assert client.ok("cache_info", FRONT)["num_frames"] == 4
    assert client.ok("rollback", mark)["num_frames"] == 2
    assert [found["name"] for found in client.ok("marks", FRONT)["marks"]] == ["before"]
    assert client.ok("mark_delete", mark)["marks"] == []
    for endpoint in ("rollback", "mark_delete"):
        assert client.error(endpoint, mark)["code"] == "UNKNOWN_MARK"


def test_after_a_reset_nothing_received_before_it_is_remembered(engine: FakeEngine, node: Node, client: RawClient):
    with Camera(node.endpoints["frames"]) as camera:
        camera.publish(6)  # a chunk of 4, and two that wait for more
        until(lambda: len(engine.pictures("front")) == 4)
        until(lambda: client.ok("streams")["streams"][0]["frames"]["received"] == 6)
        engine.hold()
        camera.publish(4)
        until(lambda: client.ok("streams")["streams"][0]["frames"]["received"] == 10)
        client.send("reset", FRONT)
        engine.let_go()
        assert client.receive()["data"]["num_tokens"] == 0
        camera.publish(4)
        until(lambda: engine.pictures("front"))
        assert [picture.seq for picture in engine.pictures("front")] == [10, 11, 12, 13]
        frames = client.ok("streams")["streams"][0]["frames"]
        assert frames["received"] == frames["encoded"] + frames["pending"] + sum(frames["dropped"].values())


def test_after_a_rollback_nothing_received_before_it_is_remembered(engine: FakeEngine, node: Node, client: RawClient):
    with Camera(node.endpoints["frames"]) as camera:
        camera.publish(6)  # a chunk of 4, and two that wait for more
        until(lambda: len(engine.pictures("front")) == 4)
        until(lambda: client.ok("streams")["streams"][0]["frames"]["received"] == 6)
        client.ok("mark", FRONT | {"name": "before"})
        assert client.ok("rollback", FRONT | {"name": "before"})["num_frames"] == 4
        camera.publish(4)
        until(lambda: len(engine.pictures("front")) == 8)
        assert [picture.seq for picture in engine.pictures("front")] == [0, 1, 2, 3, 6, 7, 8, 9]
        assert client.ok("streams")["streams"][0]["frames"]["dropped"] == {"reset": 2}


def test_a_stream_is_added_and_removed_at_run_time(engine: FakeEngine, node: Node, client: RawClient):
    added = client.ok("stream_add", {"stream": "back", "chunk_frames": 2, "encode_width": 64, "encode_height": 32})
    assert added["forecast"]["footprint"]["chunk_frames"] == 2
    assert sorted(engine.streams()) == ["back", "front"]
    with Camera(node.endpoints["frames"], "back") as camera:
        camera.publish(2)
        until(lambda: engine.pictures("back"))
    assert client.error("stream_add", {"stream": "back"})["code"] == "STREAM_EXISTS"
    client.ok("stream_remove", {"stream": "back"})
    assert engine.streams() == ["front"]
    assert client.error("stream_remove", {"stream": "back"})["code"] == "UNKNOWN_STREAM"
    client.ok("stream_add", {"stream": "back"})


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"stream": "a b"}, "stream"),
        ({"stream": "x" * 65}, "stream"),
        ({"stream": "s", "chunk_frames": 3}, "chunk_frames"),
        ({"stream": "s", "fps": 0.0}, "fps"),
        ({"stream": "s", "fps": float("nan")}, "fps"),
        ({"stream": "s", "stride": 0}, "stride"),
        ({"stream": "s", "layout": "spiral"}, "layout"),
        ({"stream": "s", "min_pixels": 10, "max_pixels": 5}, "min_pixels"),
        ({"stream": "s", "encode_width": 640}, "encode_width"),
        ({"stream": "s", "memory_bytes": 0}, "memory_bytes"),
        ({"stream": "s", "connect": "http://camera"}, "connect"),
        ({"stream": "s", "connect": "tcp://127.0.0.1:*"}, "connect"),
        ({"stream": "s", "connect": "ipc:///run/secret"}, "connect"),
        ({"stream": "s", "connect": "ipc://" + "x" * 200}, "connect"),
    ],
)
def test_a_stream_that_cannot_work_is_refused_by_the_name_of_the_field(
    engine: FakeEngine, client: RawClient, spec, field
):
    error = client.error("stream_add", spec)
    assert error["code"] == "BAD_REQUEST"
    assert field in error["message"] + str(error["details"])
    assert engine.streams() == ["front"]


def test_a_stream_whose_camera_cannot_be_connected_leaves_nothing_behind(engine: FakeEngine, client: RawClient):
    error = client.error("stream_add", {"stream": "s", "connect": "tcp://no-such-interface;127.0.0.1:5:5"})
    assert error["code"] == "BAD_REQUEST"
    assert engine.streams() == ["front"]


def test_streams_are_added_until_their_number_is_reached(engine: FakeEngine):
    with running_node(engine, limits__max_streams=2) as node, RawClient(node.endpoints["control"]) as client:
        client.ok("stream_add", {"stream": "b"})
        error = client.error("stream_add", {"stream": "c"})
        assert (error["code"], error["details"]) == ("TOO_LARGE", {"max_streams": 2})
        client.ok("stream_remove", {"stream": "b"})
        client.ok("stream_add", {"stream": "c"})
        assert sorted(engine.streams()) == ["c", "front"]


def test_a_stream_that_there_is_no_time_for_is_refused_and_leaves_nothing_behind(engine: FakeEngine):
    spec = {"stream": "b", "encode_width": 64, "encode_height": 32}
    with running_node(engine, limits__max_load=0.5) as node, RawClient(node.endpoints["control"]) as client:
        with Camera(node.endpoints["frames"]) as camera:
            camera.publish(4)
            until(lambda: "preprocess_ms" in client.ok("streams")["streams"][0]["stages"])
        error = client.error("stream_add", spec | {"fps": 1e6})
        assert (error["code"], error["details"]["max_load"]) == ("TOO_LARGE", 0.5)
        assert error["details"]["load"] > 0.5 and engine.streams() == ["front"]
        client.ok("stream_add", spec | {"fps": 0.1})
        assert sorted(engine.streams()) == ["b", "front"]


def test_nobody_cedes_memory_for_a_stream_that_there_is_no_time_for(engine: FakeEngine):
    limits = {"max_load": 0.5, "max_memory_bytes": "2MiB"}
    window = {"retention": "window", "memory_bytes": "2MiB", "min_memory_bytes": "1MiB"}
    settings = {f"limits__{name}": value for name, value in limits.items()}
    settings |= {f"stream_defaults__{name}": value for name, value in window.items()}
    spec = {"stream": "b", "encode_width": 64, "encode_height": 32, "memory_bytes": 1 << 20}
    with running_node(engine, **settings) as node, RawClient(node.endpoints["control"]) as client:
        with Camera(node.endpoints["frames"]) as camera:
            camera.publish(4)
            until(lambda: "preprocess_ms" in client.ok("streams")["streams"][0]["stages"])
        assert client.error("stream_add", spec | {"fps": 1e6})["code"] == "TOO_LARGE"
        assert engine.resized == []
        client.ok("stream_add", spec | {"fps": 0.1})
        assert engine.resized == [("front", 1 << 20)]


def test_streams_are_added_until_their_memory_is_taken(engine: FakeEngine):
    limits = {"limits__max_memory_bytes": "3MiB", "stream_defaults__memory_bytes": "2MiB"}
    with running_node(engine, **limits) as node, RawClient(node.endpoints["control"]) as client:
        error = client.error("stream_add", {"stream": "b"})
        assert (error["code"], error["details"]["taken_bytes"]) == ("OUT_OF_MEMORY", 2 << 20)
        # One that could not be added gives its share back.
        assert client.error("stream_add", {"stream": "b", "connect": "tcp://*:5", "memory_bytes": 1 << 20})
        client.ok("stream_add", {"stream": "b", "memory_bytes": 1 << 20})


def test_a_stream_that_can_do_with_less_gets_what_is_left_and_is_told_how_much(engine: FakeEngine):
    limits = {"limits__max_memory_bytes": "3MiB", "stream_defaults__memory_bytes": "2MiB"}
    with running_node(engine, **limits) as node, RawClient(node.endpoints["control"]) as client:
        added = client.ok("stream_add", {"stream": "b", "min_memory_bytes": 1 << 20})
        assert added["forecast"]["memory_bytes"] == 1 << 20
        client.ok("stream_remove", {"stream": "front"})
        assert client.ok("stream_add", {"stream": "c"})["forecast"]["memory_bytes"] == 2 << 20


def test_a_stream_cedes_what_it_has_beyond_its_least_to_another_one_and_takes_it_up_again(engine: FakeEngine):
    limits = {"limits__max_memory_bytes": "3MiB", "stream_defaults__memory_bytes": "3MiB"}
    limits |= {"stream_defaults__min_memory_bytes": "1MiB", "stream_defaults__retention": "window"}
    with running_node(engine, **limits) as node, RawClient(node.endpoints["control"]) as client:

        def sizes() -> dict[str, int]:
            return {name: engine.options(name).memory_bytes >> 20 for name in engine.streams()}

        with TelemetrySubscriber(node.endpoints["telemetry"], kinds=["hello", "event"]) as watcher:
            assert watcher.receive(5)
            added = client.ok("stream_add", {"stream": "b", "min_memory_bytes": 2 << 20})
            assert added["forecast"]["memory_bytes"] == 2 << 20 and sizes() == {"front": 1, "b": 2}
            assert client.error("stream_add", {"stream": "c"})["code"] == "OUT_OF_MEMORY"
            assert client.error("stream_add", {"stream": "c", "memory_bytes": 1, "connect": "tcp://*:5"})
            assert sizes() == {"front": 1, "b": 2}
            client.ok("stream_remove", {"stream": "b"})
            assert sizes() == {"front": 3}
            told = []
            while (message := watcher.receive(0.1)) is not None:
                if isinstance(message.record, Event) and message.record.kind == "stream_resized":
                    told.append((message.record.stream, message.record.details["memory_bytes"] >> 20))
            assert told == [("front", 1), ("front", 3)]


def test_streams_that_are_added_at_once_have_together_what_there_is(engine: FakeEngine):
    limits = {"limits__max_memory_bytes": 10, "stream_defaults__memory_bytes": 10}
    limits |= {"stream_defaults__min_memory_bytes": 1, "stream_defaults__retention": "window"}
    with running_node(engine, **limits) as node:
        sizes = {"b": 3, "c": 2, "d": 4}
        specs = [StreamSpec(stream=name, memory_bytes=num, min_memory_bytes=num) for name, num in sizes.items()]
        adding = [node._control.add_stream(node._state.config.spec_options(spec)) for spec in specs]
        by_turns = deque((steps, next(steps)) for steps in adding)
        while by_turns:
            steps, awaited = by_turns.popleft()
            with suppress(StopIteration):
                by_turns.append((steps, steps.send(awaited.result(5))))
        assert {name: engine.options(name).memory_bytes for name in engine.streams()} == sizes | {"front": 1}


class UnyieldingEngine(FakeEngine):
    """Cannot have the second of its streams go on with less."""

    def resize(self, stream: str, memory_bytes: int) -> Future[Forecast]:
        if stream == "b" and memory_bytes < self.options(stream).memory_bytes:
            future: Future[Forecast] = Future()
            future.set_exception(NodeError(ErrorCode.OUT_OF_MEMORY, "no room for both"))
            return future
        return super().resize(stream, memory_bytes)


def test_what_was_ceded_for_a_stream_that_is_refused_even_so_is_taken_up_again():
    limits = {"limits__max_memory_bytes": 14, "stream_defaults__memory_bytes": 8}
    limits |= {"stream_defaults__min_memory_bytes": 1, "stream_defaults__retention": "window"}
    twelve = {"stream": "c", "memory_bytes": 12, "min_memory_bytes": 12}
    with (
        UnyieldingEngine() as engine,
        running_node(engine, **limits) as node,
        RawClient(node.endpoints["control"]) as client,
    ):
        client.ok("stream_add", {"stream": "b"})
        assert client.error("stream_add", twelve)["code"] == "OUT_OF_MEMORY"
        assert {name: engine.options(name).memory_bytes for name in engine.streams()} == {"front": 8, "b": 6}


def test_on_the_cpu_a_stream_larger_than_the_machine_is_refused(engine: FakeEngine, client: RawClient):
    assert client.error("stream_add", {"stream": "s", "memory_bytes": 1 << 60})["code"] == "TOO_LARGE"
    assert engine.streams() == ["front"]


def test_a_paused_stream_drops_frames_until_it_is_resumed(engine: FakeEngine, node: Node, client: RawClient):
    client.ok("stream_pause", FRONT)
    with Camera(node.endpoints["frames"]) as camera:
        camera.publish(3)
        until(lambda: client.ok("streams")["streams"][0]["frames"]["dropped"] == {"paused": 3})
        assert client.ok("streams")["streams"][0]["state"] == "paused"
        client.ok("stream_resume", FRONT)
        camera.publish(4)
        until(lambda: len(engine.pictures("front")) == 4)


@pytest.mark.parametrize("endpoint", ["cache_info", "reset", "marks", "stream_remove", "stream_pause", "stream_resume"])
def test_an_unknown_stream_is_named_an_error(client: RawClient, endpoint: str):
    error = client.error(endpoint, {"stream": "nowhere"})
    assert (error["code"], error["details"]["streams"]) == ("UNKNOWN_STREAM", ["front"])


def test_a_question_is_cancelled_from_the_control_socket(engine: FakeEngine, node: Node, client: RawClient):
    remember(engine)
    engine.hold()
    with RawClient(node.endpoints["ask"]) as asker:
        request_id = asker.send("ask", FRONT | {"question": "a b"})
        until(lambda: engine.question_counters().waiting)
        client.ok("cancel", {"id": request_id, "session": asker.session})
        assert asker.receive()["error"]["code"] == "CANCELLED"
    engine.let_go()
    until(lambda: engine.question_counters().failed == {"CANCELLED": 1})


def test_cancelling_what_is_not_open_is_no_error(client: RawClient):
    assert client.ok("cancel", {"id": "gone", "session": "mine"}) == {}


def test_what_was_refused_is_counted_in_the_status(client: RawClient):
    client.send_bytes(b"garbage")
    client.receive()
    client.error("nosuch")
    rejected = client.ok("status")["rejected"]
    assert (rejected["bad_request"], rejected["unknown_endpoint"]) == (1, 1)


def test_the_status_tells_the_memory_of_the_process(client: RawClient):
    assert client.ok("status")["host_rss_bytes"] > 1_000_000
