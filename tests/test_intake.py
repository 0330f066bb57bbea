"""The whole way of a frame, from a real publisher to an engine's memory."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import zmq
from deadline import until
from fakes import FakeEngine
from zmq.auth.thread import ThreadAuthenticator

from onlooker.node.intake import Intake
from onlooker.node.options import StreamOptions
from onlooker.protocol import curve
from onlooker.protocol.camera import FramePublisher
from onlooker.protocol.errors import NodeError
from onlooker.protocol.messages import FrameCounters

TCP = "tcp://127.0.0.1:*"
MS = 1_000_000
PIXELS = np.arange(16 * 32 * 3, dtype=np.uint8).reshape(16, 32, 3)
JPEG = cv2.imencode(".jpg", PIXELS)[1].tobytes()


@pytest.fixture(scope="module")
def context() -> Iterator[zmq.Context]:
    with zmq.Context() as context:
        yield context


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    with FakeEngine() as engine:
        yield engine


@pytest.fixture
def intake(engine: FakeEngine, context: zmq.Context) -> Iterator[Intake]:
    with Intake(engine, context=context, bind=TCP) as intake:
        yield intake


def add_stream(engine: FakeEngine, intake: Intake, **options) -> None:
    stream = StreamOptions(**{"name": "front", "chunk_frames": 2} | options)
    engine.add_stream(stream).result(1)
    intake.add_stream(stream)


def publisher(intake: Intake, stream: str = "front", **options) -> FramePublisher:
    """A camera that waits rather than lose a frame of a burst before it is sent."""
    camera = FramePublisher(stream, connect=intake.bound_endpoint, lossless=True, **options)
    assert camera.wait_for_subscriber(5)
    return camera


def publish(camera: FramePublisher, num: int, **fields) -> None:
    for n in range(num):
        camera.publish_encoded(JPEG, "jpeg", **{"ts": n * 40 * MS, "size": (32, 16)} | fields)


def is_balanced(counters: FrameCounters) -> bool:
    return counters.received == sum(counters.dropped.values()) + counters.encoded + counters.pending


def test_a_cameras_frames_become_memory(engine: FakeEngine, intake: Intake):
    add_stream(engine, intake)
    with publisher(intake) as camera:
        camera.publish_image(PIXELS, ts=1_000)
        camera.publish_image(PIXELS, ts=2_000)
        until(lambda: intake.counters("front").encoded == 2)
    first, second = engine.pictures("front")
    assert (first.pixels == PIXELS).all()
    assert [(picture.ts, picture.seq, picture.stream_ns) for picture in (first, second)] == [
        (1_000, 0, 0),
        (2_000, 1, 1_000),
    ]


@pytest.mark.parametrize("chunk_frames", [1, 2, 4, 6, 8])
def test_a_stream_ends_with_all_its_frames_in_memory(engine: FakeEngine, intake: Intake, chunk_frames: int):
    add_stream(engine, intake, chunk_frames=chunk_frames)
    with publisher(intake) as camera:
        publish(camera, 13)
        camera.end()
    until(lambda: intake.stream_stats()[0].state == "ended")
    counters = intake.counters("front")
    assert (counters.received, counters.encoded, counters.pending, counters.dropped) == (13, 13, 0, {})
    assert counters.padded == (0 if chunk_frames == 1 else 1)
    assert (counters.last_seq, counters.last_session) == (13, camera.session)
    assert [picture.seq for picture in engine.pictures("front")] == list(range(13))


def test_a_publisher_that_watches_the_counters_loses_nothing(engine: FakeEngine, intake: Intake):
    add_stream(engine, intake, ring_frames=8)
    engine.encode_s = 0.001
    num_sent = 0

    def num_in_flight() -> int:
        counters = intake.counters("front")
        return num_sent - counters.encoded - sum(counters.dropped.values())

    with publisher(intake) as camera:
        for num_sent in range(1, 201):
            publish(camera, 1, ts=num_sent * 40 * MS)
            until(lambda: num_in_flight() < 8)
        camera.end()
    until(lambda: intake.stream_stats()[0].state == "ended")
    assert [picture.seq for picture in engine.pictures("front")] == list(range(200))
    assert (intake.counters("front").dropped, intake.counters("front").gaps) == ({}, 0)


def test_an_engine_that_stands_still_costs_frames_and_never_the_node(engine: FakeEngine, intake: Intake):
    add_stream(engine, intake, ring_frames=8)
    engine.hold()
    with publisher(intake) as camera:
        publish(camera, 100)
        until(lambda: intake.counters("front").received == 100)
        assert is_balanced(intake.counters("front"))
        engine.let_go()
        until(lambda: intake.counters("front").pending == 0)
    counters = intake.counters("front")
    assert counters.dropped == {"ring_full": 100 - counters.encoded}
    assert engine.pictures("front")[-1].seq == 99


def test_a_camera_that_binds_is_connected_to(engine: FakeEngine, intake: Intake, tmp_path: Path):
    with FramePublisher("front", bind=f"ipc://{tmp_path}/camera") as camera:
        add_stream(engine, intake, connect=camera.endpoint)
        assert camera.wait_for_subscriber(5)
        publish(camera, 4)
        until(lambda: intake.counters("front").encoded == 4)
        intake.remove_stream("front")
        until(lambda: not camera.has_subscriber)
    assert intake.stream_stats() == []


def test_streams_are_kept_apart(engine: FakeEngine, intake: Intake):
    for name in ("cam1", "cam10"):
        add_stream(engine, intake, name=name)
    with publisher(intake, "cam1") as one, publisher(intake, "cam10") as ten, publisher(intake, "cam2") as unknown:
        publish(one, 2)
        publish(ten, 4)
        publish(unknown, 3)
        until(lambda: intake.counters("cam1").encoded == 2 and intake.counters("cam10").encoded == 4)
        until(lambda: intake.rejected == {"unknown_stream": 3})


def test_a_publisher_that_is_restarted_after_its_end_goes_on_at_once(engine: FakeEngine, intake: Intake):
    add_stream(engine, intake)
    for _ in range(2):
        with publisher(intake) as camera:
            publish(camera, 2)
            camera.end()
            until(lambda: intake.counters("front").last_session == camera.session)
            until(lambda: intake.stream_stats()[0].state == "ended")
    assert [picture.stream_ns for picture in engine.pictures("front")] == [n * 40 * MS for n in range(4)]


def test_a_publisher_that_died_is_replaced_once_it_was_silent(engine: FakeEngine, context: zmq.Context):
    with Intake(engine, context=context, bind=TCP, takeover_s=0.2) as intake:
        add_stream(engine, intake)
        with publisher(intake) as dead:
            publish(dead, 2)
            until(lambda: intake.counters("front").encoded == 2)
        with publisher(intake) as camera:
            until(lambda: publish(camera, 1) or intake.counters("front").encoded >= 4)
            assert intake.counters("front").last_session == camera.session
    until(lambda: is_balanced(intake.counters("front")))


def test_two_publishers_of_one_stream_never_mix(engine: FakeEngine, intake: Intake):
    add_stream(engine, intake)
    with publisher(intake) as first, publisher(intake) as second:
        publish(first, 1)
        until(lambda: intake.counters("front").received == 1)
        publish(second, 3)
        until(lambda: intake.counters("front").dropped == {"second_publisher": 3})
        publish(first, 1, ts=40 * MS)
        until(lambda: intake.counters("front").encoded == 2)


def test_a_reset_empties_the_way_and_the_memory_together(engine: FakeEngine, intake: Intake):
    add_stream(engine, intake, chunk_frames=4)
    with publisher(intake) as camera:
        publish(camera, 6)
        until(lambda: intake.counters("front").encoded == 4 and intake.counters("front").received == 6)
        assert intake.reset("front").result(1).num_tokens == 0
        assert intake.counters("front").dropped == {"reset": 2}
        publish(camera, 4, ts=10**12)
        until(lambda: len(engine.pictures("front")) == 4)
    assert engine.pictures("front")[0].stream_ns == 0


def test_no_frame_from_before_a_rollback_is_in_the_memory_after_it(engine: FakeEngine, intake: Intake):
    add_stream(engine, intake, chunk_frames=4, ring_frames=16)
    with publisher(intake) as camera:
        publish(camera, 4)
        until(lambda: intake.counters("front").encoded == 4)
        engine.mark("front", "here").result(1)
        publish(camera, 6, ts=10**10)
        until(lambda: intake.counters("front").encoded == 8 and intake.counters("front").received == 10)
        intake.rollback("front", "here").result(1)
        assert intake.counters("front").dropped == {"reset": 2}
        publish(camera, 4, ts=2 * 10**10)
        until(lambda: intake.counters("front").encoded == 12)
    pictures = engine.pictures("front")
    assert [picture.seq for picture in pictures] == [0, 1, 2, 3, 10, 11, 12, 13]
    assert [picture.stream_ns for picture in pictures[4:]] == [2 * 10**10] * 4


def test_no_frame_from_before_a_reset_is_in_the_memory_after_it(engine: FakeEngine, intake: Intake):
    add_stream(engine, intake)
    with publisher(intake) as camera:
        for last_seq in range(9, 200, 10):
            publish(camera, 10)
            until(lambda: intake.counters("front").last_seq == last_seq)  # noqa: B023
            intake.reset("front").result(1)
            assert engine.pictures("front") == []
            until(lambda: intake.counters("front").pending == 0)
            assert engine.pictures("front") == []
    assert is_balanced(intake.counters("front"))


def test_a_paused_stream_takes_nothing_in(engine: FakeEngine, intake: Intake):
    add_stream(engine, intake)
    intake.pause("front")
    with publisher(intake) as camera:
        publish(camera, 3)
        until(lambda: intake.counters("front").dropped == {"paused": 3})
        assert intake.stream_stats()[0].state == "paused"
        intake.resume("front")
        publish(camera, 2)
        until(lambda: intake.counters("front").encoded == 2)


def test_every_frame_is_accounted_for_while_cameras_and_controls_do_what_they_like(engine: FakeEngine, intake: Intake):
    names = ["one", "two", "three"]
    for name in names:
        add_stream(engine, intake, name=name, ring_frames=4, stride=2)
    stop = threading.Event()
    unbalanced: list[FrameCounters] = []

    def watch() -> None:
        while not stop.is_set():
            unbalanced.extend(c for name in names if not is_balanced(c := intake.counters(name)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    cameras = [publisher(intake, name) for name in names]
    for n in range(60):
        for camera in cameras:
            publish(camera, 3, ts=n * 40 * MS)
        intake.reset(names[n % 3])
        (intake.pause if n % 4 == 0 else intake.resume)(names[n % 2])
    for camera in cameras:
        camera.end()
        camera.close()
    until(lambda: all(intake.counters(name).last_seq == 180 for name in names))
    until(lambda: all(intake.counters(name).pending == 0 for name in names))
    stop.set()
    watcher.join()
    assert unbalanced == []
    assert [intake.counters(name).received for name in names] == [180] * 3


def test_cameras_are_let_in_by_key(engine: FakeEngine, context: zmq.Context, tmp_path: Path):
    node, camera_pair, stranger = (curve.generate() for _ in range(3))
    for name, pair in (("node", node), ("camera", camera_pair), ("stranger", stranger)):
        curve.write_keypair(tmp_path, name, pair)
    authenticator = ThreadAuthenticator(context)
    authenticator.start()

    class Cameras:
        def callback(self, domain: str, key: bytes) -> bool:
            return key == camera_pair.public

    authenticator.configure_curve_callback(domain=curve.DOMAIN.decode(), credentials_provider=Cameras())

    def secure(socket: zmq.Socket, role: str, options: StreamOptions | None) -> None:
        curve.become_server(socket, node)

    try:
        with Intake(engine, context=context, bind=TCP, secure=secure) as intake:
            add_stream(engine, intake)
            keys: dict[str, Any] = {"server_key": tmp_path / "node.key"}
            with publisher(intake, **keys, client_key=tmp_path / "camera.key_secret") as camera:
                publish(camera, 2)
                until(lambda: intake.counters("front").encoded == 2)
            with FramePublisher(
                "front", connect=intake.bound_endpoint, **keys, client_key=tmp_path / "stranger.key_secret"
            ):
                until(lambda: intake.rejected.get("handshake_failed"))
            assert intake.counters("front").received == 2
    finally:
        authenticator.stop()


@pytest.mark.parametrize("verb", ["remove_stream", "pause", "resume", "reset", "counters"])
def test_a_stream_that_is_not_there_is_an_error_that_names_those_that_are(engine, intake: Intake, verb: str):
    add_stream(engine, intake)
    with pytest.raises(NodeError) as failed:
        getattr(intake, verb)("back")
    assert (failed.value.code, failed.value.details) == ("UNKNOWN_STREAM", {"streams": ["front"]})


def test_a_picture_of_more_pixels_than_allowed_is_too_large(engine: FakeEngine, context: zmq.Context):
    with Intake(engine, context=context, bind=TCP, max_pixels=32 * 16 - 1) as intake:
        add_stream(engine, intake)
        with publisher(intake) as camera:
            publish(camera, 1)
            until(lambda: intake.counters("front").dropped == {"too_large": 1})


def test_a_stream_cannot_be_added_twice(engine: FakeEngine, intake: Intake):
    add_stream(engine, intake)
    with pytest.raises(NodeError, match="STREAM_EXISTS"):
        intake.add_stream(StreamOptions(name="front"))


def test_a_stream_whose_camera_cannot_be_connected_is_not_added(intake: Intake):
    with pytest.raises(NodeError, match="BAD_REQUEST: stream front cannot connect to nonsense"):
        intake.add_stream(StreamOptions(name="front", connect="nonsense"))
    with pytest.raises(NodeError, match="UNKNOWN_STREAM"):
        intake.counters("front")


def test_a_stream_without_a_memory_has_no_telemetry(intake: Intake):
    intake.add_stream(StreamOptions(name="front"))
    assert intake.stream_stats() == []


def test_closing_is_quick_while_frames_come_and_the_engine_stands_still(engine: FakeEngine, context: zmq.Context):
    intake = Intake(engine, context=context, bind=TCP)
    intake.start()
    add_stream(engine, intake)
    engine.hold()
    with publisher(intake) as camera:
        publish(camera, 50)
        until(lambda: intake.counters("front").received > 10)
        started = time.monotonic()
        intake.close()
        assert time.monotonic() - started < 1.0
    engine.let_go()


def test_the_frames_side_of_the_node_needs_no_torch():
    check = "import sys, onlooker.node.intake; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
