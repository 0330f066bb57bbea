import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Self

import msgpack
import numpy as np
import pytest
import zmq
from deadline import until
from probes import probe

from onlooker.protocol.camera import FramePublisher
from onlooker.protocol.curve import KeyPair, become_client, generate, write_keypair
from onlooker.protocol.errors import AuthError, ClosedError, NoReplyError

WAIT_S = 5.0
RED = np.full((2, 3, 3), (255, 0, 0), np.uint8)


@pytest.fixture
def context() -> Iterator[zmq.Context]:
    with zmq.Context() as context:
        yield context


class RawNode:
    """A SUB socket as anybody would open it, read by a thread of its own while `is_reading`."""

    def __init__(self, context: zmq.Context, topic: bytes, hwm: int) -> None:
        self.socket = context.socket(zmq.SUB)
        self.socket.set(zmq.LINGER, 0)
        self.socket.set(zmq.RCVHWM, hwm)
        self.socket.subscribe(topic)
        self.socket.bind("tcp://127.0.0.1:*")
        self.endpoint = self.socket.get_string(zmq.LAST_ENDPOINT)
        self._received: queue.Queue[list[bytes]] = queue.Queue()
        self._steps: queue.Queue[Callable[[], None]] = queue.Queue()
        self._should_stop = False
        self._thread = threading.Thread(target=self._run)
        self.is_reading = True

    def _run(self) -> None:
        while not self._should_stop:
            # A bound SUB sends its subscription to a new peer only while somebody polls it.
            if self.socket.poll(5) and self.is_reading:
                self._received.put(self.socket.recv_multipart())
            while not self._steps.empty():
                self._steps.get()()

    def recv(self) -> list[bytes]:
        return self._received.get(timeout=WAIT_S)

    def connect(self, endpoint: str) -> None:
        self._steps.put(lambda: self.socket.connect(endpoint))

    def subscribe(self, topic: bytes) -> None:
        self._steps.put(lambda: self.socket.subscribe(topic))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._should_stop = True
        self._thread.join()
        self.socket.close()


def raw_node(context: zmq.Context, topic: bytes = b"frame/", hwm: int = 1000) -> RawNode:
    return RawNode(context, topic, hwm)


def number_of(parts: list[bytes]) -> int:
    return int.from_bytes(parts[1], "big")


def test_an_image_is_four_plain_messagepack_parts(context: zmq.Context) -> None:
    with raw_node(context) as node, FramePublisher("cam", connect=node.endpoint) as camera:
        assert camera.wait_for_subscriber(WAIT_S)
        assert camera.publish_image(RED, ts=1_700_000_000_000_000_000, fps=25.0) == 0
        topic, seq, header, payload = node.recv()
    assert (topic, seq, payload) == (b"frame/cam/", bytes(8), bytes([255, 0, 0] * 6))
    assert msgpack.unpackb(header) == {
        "v": 1,
        "session": camera.session,
        "stream": "cam",
        "ts": 1_700_000_000_000_000_000,
        "ts_kind": "capture",
        "enc": "rgb8",
        "w": 3,
        "h": 2,
        "fps": 25.0,
        "eos": False,
    }


def test_a_time_that_nobody_gave_is_the_time_of_publishing(context: zmq.Context) -> None:
    with raw_node(context) as node, FramePublisher("cam", connect=node.endpoint) as camera:
        assert camera.wait_for_subscriber(WAIT_S)
        before = time.time_ns()
        camera.publish_image(RED)
        header = msgpack.unpackb(node.recv()[2])
    assert header["ts_kind"] == "publish"
    assert before <= header["ts"] <= time.time_ns()


def test_numbers_start_at_zero_and_the_end_is_a_message_of_three_parts(context: zmq.Context) -> None:
    with raw_node(context) as node, FramePublisher("cam", connect=node.endpoint) as camera:
        assert camera.wait_for_subscriber(WAIT_S)
        assert camera.publish_encoded(b"\xff\xd8\xff", "jpeg") == 0
        assert camera.publish_encoded(b"\xff\xd8\xff", "jpeg", size=(640, 480), loop=2) == 1
        camera.end()
        messages = [node.recv() for _ in range(3)]
    assert [number_of(parts) for parts in messages] == [0, 1, 2]
    headers = [msgpack.unpackb(parts[2]) for parts in messages]
    assert "w" not in headers[0]
    assert (headers[1]["w"], headers[1]["h"], headers[1]["loop"]) == (640, 480, 2)
    assert len(messages[2]) == 3
    assert headers[2]["eos"] is True


@pytest.mark.parametrize(
    ("pixels", "encoding"),
    [
        (np.zeros((4, 4, 3), np.uint8)[:, ::2], "rgb8"),
        (np.zeros((4, 4, 3), np.uint8)[..., ::-1], "bgr8"),
        (np.zeros((5, 4), np.uint8).T, "mono8"),
    ],
)
def test_pixels_are_sent_row_by_row_however_they_lie_in_memory(
    context: zmq.Context, pixels: np.ndarray, encoding: str
) -> None:
    pixels[...] = np.arange(pixels.size).reshape(pixels.shape)
    with raw_node(context) as node, FramePublisher("cam", connect=node.endpoint) as camera:
        assert camera.wait_for_subscriber(WAIT_S)
        camera.publish_image(pixels, encoding=encoding)
        assert node.recv()[3] == np.ascontiguousarray(pixels).tobytes()


def test_the_array_may_be_drawn_over_as_soon_as_publishing_returns(context: zmq.Context) -> None:
    pixels = np.zeros((256, 256, 3), np.uint8)
    with raw_node(context) as node, FramePublisher("cam", connect=node.endpoint) as camera:
        assert camera.wait_for_subscriber(WAIT_S)
        for value in range(3):
            pixels[...] = value
            camera.publish_image(pixels)
            pixels[...] = 255
        assert [set(node.recv()[3]) for _ in range(3)] == [{0}, {1}, {2}]


@pytest.mark.parametrize(
    ("pixels", "encoding"),
    [
        (np.zeros((2, 2, 3), np.float32), "rgb8"),
        (np.zeros((2, 2, 4), np.uint8), "rgb8"),
        (np.zeros((2, 2), np.uint8), "bgr8"),
        (np.zeros((2, 2, 1), np.uint8), "mono8"),
        (np.zeros((2, 2, 3), np.uint8), "jpeg"),
        (np.zeros((0, 2, 3), np.uint8), "rgb8"),
        (np.zeros((1, 16385), np.uint8), "mono8"),
    ],
)
def test_pixels_that_do_not_fit_their_encoding_are_refused_before_they_are_sent(
    pixels: np.ndarray, encoding: str
) -> None:
    with FramePublisher("cam", bind="tcp://127.0.0.1:*") as camera, pytest.raises(ValueError):
        camera.publish_image(pixels, encoding=encoding)


def test_a_payload_of_an_unknown_encoding_is_refused_before_it_is_sent() -> None:
    with FramePublisher("cam", bind="tcp://127.0.0.1:*") as camera, pytest.raises(ValueError, match="h264"):
        camera.publish_encoded(b"x", "h264")


def test_a_bound_publisher_serves_several_nodes(context: zmq.Context) -> None:
    with (
        FramePublisher("cam", bind="tcp://127.0.0.1:*") as camera,
        raw_node(context) as first,
        raw_node(context, b"frame/cam/") as second,
    ):
        first.connect(camera.endpoint)
        second.connect(camera.endpoint)
        assert camera.wait_for_subscriber(WAIT_S, count=2)
        camera.publish_image(RED)
        assert first.recv() == second.recv()


def test_only_a_subscription_that_matches_counts(context: zmq.Context) -> None:
    with raw_node(context, b"frame/cam10/") as node, FramePublisher("cam1", connect=node.endpoint) as one:
        assert not one.wait_for_subscriber(0.1)
        node.subscribe(b"frame/cam1/")
        assert one.wait_for_subscriber(WAIT_S)


def test_a_node_that_goes_away_is_no_subscriber_any_more(context: zmq.Context) -> None:
    with FramePublisher("cam", bind="tcp://127.0.0.1:*") as camera:
        with raw_node(context) as node:
            node.connect(camera.endpoint)
            assert camera.wait_for_subscriber(WAIT_S)
        until(lambda: not camera.has_subscriber)


def test_lossless_waits_for_a_slow_node_and_then_says_that_it_does_not_read(context: zmq.Context) -> None:
    picture = np.zeros((1024, 1024, 3), np.uint8)
    with raw_node(context, hwm=1) as node:
        node.is_reading = False
        camera = FramePublisher("cam", connect=node.endpoint, lossless=True, send_timeout_s=0.2)
        with camera:
            assert camera.wait_for_subscriber(WAIT_S)
            with pytest.raises(NoReplyError):
                for _ in range(100):
                    camera.publish_image(picture)
            node.is_reading = True
            assert camera.publish_image(picture) < 100


def test_lossless_loses_nothing(context: zmq.Context) -> None:
    picture = np.zeros((512, 512, 3), np.uint8)
    with raw_node(context, hwm=1) as node:
        with FramePublisher("cam", connect=node.endpoint, lossless=True) as camera:
            assert camera.wait_for_subscriber(WAIT_S)
            for _ in range(60):
                camera.publish_image(picture)
        assert [number_of(node.recv()) for _ in range(60)] == list(range(60))


def test_a_node_that_lags_behind_keeps_the_oldest_frames_and_sees_a_gap(context: zmq.Context) -> None:
    picture = np.zeros((512, 512, 3), np.uint8)
    with raw_node(context, hwm=1) as node, FramePublisher("cam", connect=node.endpoint) as camera:
        assert camera.wait_for_subscriber(WAIT_S)
        node.is_reading = False
        for _ in range(60):
            camera.publish_image(picture)
        node.is_reading = True
        numbers = [number_of(node.recv())]
        while numbers[-1] < 60:
            camera.publish_image(picture)
            numbers.append(number_of(node.recv()))
    assert numbers[:2] == [0, 1]
    assert len(numbers) < 60
    assert numbers == sorted(set(numbers))


def test_the_end_of_a_burst_waits_for_a_node_that_lags_behind(context: zmq.Context) -> None:
    picture = np.zeros((512, 512, 3), np.uint8)
    with raw_node(context, hwm=1) as node, FramePublisher("cam", connect=node.endpoint) as camera:
        assert camera.wait_for_subscriber(WAIT_S)
        for _ in range(60):
            camera.publish_image(picture)
        camera.end()
        messages = [node.recv()]
        while len(messages[-1]) > 3:
            messages.append(node.recv())
    assert number_of(messages[-1]) == 60


def test_the_last_frames_arrive_although_the_publisher_has_closed(context: zmq.Context) -> None:
    with raw_node(context) as node:
        with FramePublisher("cam", connect=node.endpoint) as camera:
            assert camera.wait_for_subscriber(WAIT_S)
            camera.publish_image(RED)
            camera.end()
        assert len(node.recv()) == 4
        assert len(node.recv()) == 3


def test_after_the_end_and_after_closing_nothing_can_be_published() -> None:
    camera = FramePublisher("cam", bind="tcp://127.0.0.1:*")
    camera.end()
    with pytest.raises(ClosedError, match="ended"):
        camera.publish_image(RED)
    camera.close()
    camera.close()
    with pytest.raises(ClosedError, match="closed"):
        camera.publish_image(RED)


@pytest.mark.parametrize("stream", ["", "a b", "a/b", "x" * 65, "ä", "cam\n"])
def test_a_stream_name_that_cannot_be_a_topic_is_refused(stream: str) -> None:
    with pytest.raises(ValueError, match="name"):
        FramePublisher(stream)


def test_arguments_that_do_not_go_together_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="connects or binds"):
        FramePublisher("cam", connect="tcp://127.0.0.1:1", bind="tcp://127.0.0.1:2")
    with pytest.raises(ValueError, match="together"):
        FramePublisher("cam", server_key=tmp_path / "node.key")


def test_a_node_with_other_keys_is_an_error_at_once_and_not_a_silence(tmp_path, context: zmq.Context) -> None:
    with raw_node(context) as node:
        write_keypair(tmp_path, "node", generate())
        write_keypair(tmp_path, "camera", generate())
        camera = FramePublisher(
            "cam",
            connect=node.endpoint,
            server_key=tmp_path / "node.key",
            client_key=tmp_path / "camera.key_secret",
        )
        with camera, pytest.raises(AuthError, match="CURVE"):
            camera.wait_for_subscriber(WAIT_S)


def _curve_subscriber(context: zmq.Context, endpoint: str, server: KeyPair, own: KeyPair) -> zmq.Socket:
    socket = context.socket(zmq.SUB)
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.RCVTIMEO, int(WAIT_S * 1000))
    socket.subscribe(b"frame/")
    become_client(socket, server.public, own)
    socket.connect(endpoint)
    return socket


def test_a_bound_publisher_with_keys_lets_in_only_the_nodes_it_knows(tmp_path, context: zmq.Context) -> None:
    own, known, stranger = generate(), generate(), generate()
    write_keypair(tmp_path, "camera", own)
    write_keypair(tmp_path / "nodes", "known", known)
    camera = FramePublisher(
        "cam",
        bind="tcp://127.0.0.1:*",
        server_key=tmp_path / "nodes",
        client_key=tmp_path / "camera.key_secret",
    )
    with camera, _curve_subscriber(context, camera.endpoint, own, stranger):
        assert not camera.wait_for_subscriber(0.3)
        with _curve_subscriber(context, camera.endpoint, own, known) as node:
            assert camera.wait_for_subscriber(WAIT_S)
            camera.publish_image(RED)
            assert len(node.recv_multipart()) == 4


def test_a_publisher_that_binds_is_not_stopped_by_strangers_that_come_and_go(context: zmq.Context) -> None:
    with FramePublisher("cam", bind="tcp://127.0.0.1:*") as camera:
        probe(camera.endpoint, 1500)
        with context.socket(zmq.SUB) as node:
            node.set(zmq.LINGER, 0)
            node.subscribe(b"frame/cam/")
            node.connect(camera.endpoint)
            assert camera.wait_for_subscriber(WAIT_S)
            camera.publish_image(RED)
            assert node.poll(int(WAIT_S * 1000))


def test_topics_that_nobody_asks_for_any_more_are_forgotten(context: zmq.Context) -> None:
    with FramePublisher("cam", bind="tcp://127.0.0.1:*") as camera, context.socket(zmq.XSUB) as stranger:
        stranger.set(zmq.LINGER, 0)
        stranger.connect(camera.endpoint)
        for number in range(100):
            stranger.send(b"\x01%d" % number)
            stranger.send(b"\x00%d" % number)
        stranger.send(b"\x01frame/cam/")
        assert camera.wait_for_subscriber(WAIT_S)
        assert dict(camera._subscriptions) == {b"frame/cam/": 1}
