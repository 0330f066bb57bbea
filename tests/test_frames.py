import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq
from deadline import until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onlooker.node.frames import FrameSubscriber
from onlooker.node.options import StreamOptions
from onlooker.protocol.codec import ReceivedFrame, encode, encode_frame
from onlooker.protocol.errors import ClosedError
from onlooker.protocol.messages import FrameHeader

TCP = "tcp://127.0.0.1:*"


@pytest.fixture(scope="module")
def context() -> Iterator[zmq.Context]:
    with zmq.Context() as context:
        yield context


class Receiver:
    """Takes the frames of the streams it knows."""

    def __init__(self, *streams: str) -> None:
        self.streams = set(streams)
        self.frames: list[ReceivedFrame] = []

    def __call__(self, frame: ReceivedFrame) -> bool:
        self.frames.append(frame)
        return frame.header.stream in self.streams

    def seqs(self, stream: str = "front") -> list[int]:
        return [frame.seq for frame in self.frames if frame.header.stream == stream]


def message(seq: int, stream: str = "front", payload: bytes = b"jpeg", **fields) -> list:
    header = FrameHeader(**{"session": "s", "stream": stream, "ts": seq, "enc": "jpeg"} | fields)
    return encode_frame(header, seq, payload)


class Camera:
    """A bare PUB, so that it can also send what no publisher would."""

    def __init__(
        self, context: zmq.Context, *, connect: str | None = None, bind: str | None = None, hwm: int = 10_000
    ) -> None:
        self.socket = context.socket(zmq.XPUB)
        self.socket.set(zmq.LINGER, 0)
        self.socket.set(zmq.SNDHWM, hwm)
        if bind is not None:
            self.socket.bind(bind)
        if connect is not None:
            self.socket.connect(connect)
        self.endpoint = self.socket.get(zmq.LAST_ENDPOINT).decode()

    def __enter__(self) -> "Camera":
        return self

    def __exit__(self, *exc: object) -> None:
        self.socket.close()

    def wait_for_subscriber(self) -> "Camera":
        assert self.socket.poll(5000)
        assert self.socket.recv().startswith(b"\x01frame/")
        return self

    def send(self, *messages: list) -> None:
        for parts in messages:
            self.socket.send_multipart(parts)


@pytest.fixture
def receiver() -> Receiver:
    return Receiver("front")


@pytest.fixture
def subscriber(context: zmq.Context, receiver: Receiver) -> Iterator[FrameSubscriber]:
    subscriber = FrameSubscriber(receiver, context=context, bind=TCP)
    subscriber.start()
    yield subscriber
    subscriber.close()


@pytest.fixture
def camera(context: zmq.Context, subscriber: FrameSubscriber) -> Iterator[Camera]:
    with Camera(context, connect=subscriber.bound_endpoint) as camera:
        yield camera.wait_for_subscriber()


def test_frames_of_a_camera_that_connects_arrive_whole_and_in_order(camera: Camera, receiver: Receiver):
    camera.send(*[message(seq, payload=bytes([seq]) * 100_000) for seq in range(50)])
    until(lambda: receiver.seqs() == list(range(50)))
    assert [bytes(frame.payload) == bytes([seq]) * 100_000 for seq, frame in enumerate(receiver.frames)] == [True] * 50


def test_a_camera_cannot_fill_the_memory_while_nobody_reads(context: zmq.Context):
    may_go_on = threading.Event()
    subscriber = FrameSubscriber(lambda _: may_go_on.wait(20), context=context, bind=TCP)
    subscriber.start()
    num_sent = 0
    with Camera(context, connect=subscriber.bound_endpoint, hwm=1) as camera:
        camera.wait_for_subscriber()
        camera.socket.set(zmq.XPUB_NODROP, 1)
        camera.socket.set(zmq.SNDTIMEO, 200)
        with pytest.raises(zmq.Again):
            while num_sent < 200:
                camera.send(message(num_sent, payload=bytes(1 << 20)))
                num_sent += 1
    may_go_on.set()
    subscriber.close()
    assert num_sent < 64  # the kernel's buffers hold some as well


def test_the_wildcard_port_is_resolved(subscriber: FrameSubscriber):
    assert subscriber.bound_endpoint is not None
    assert subscriber.bound_endpoint.startswith("tcp://127.0.0.1:") and "*" not in subscriber.bound_endpoint


def test_cameras_that_bind_come_and_go_while_it_runs(
    context: zmq.Context, subscriber: FrameSubscriber, receiver: Receiver, tmp_path: Path
):
    for endpoint in (TCP, f"ipc://{tmp_path}/camera"):
        with Camera(context, bind=endpoint) as camera:
            subscriber.add(StreamOptions(name="front", connect=camera.endpoint))
            camera.wait_for_subscriber().send(message(1), message(2), message(3, stream="front2"))
            until(lambda: receiver.seqs() == [1, 2])
            subscriber.remove("front")
            assert camera.socket.recv() == b"\x00frame/front/"
            receiver.frames.clear()
    assert subscriber.rejected == {}


def test_frames_of_unknown_streams_are_counted_and_said_once(
    camera: Camera, receiver: Receiver, subscriber: FrameSubscriber, caplog
):
    camera.send(*[message(seq, stream="nobody") for seq in range(20)], message(1))
    until(receiver.seqs)
    assert subscriber.rejected == {"unknown_stream": 20}
    assert len(caplog.records) == 1 and "there is no stream nobody" in caplog.text


BAD = {
    "malformed": [
        [b"frame/front/"],
        [b"frame/front/", b"12345678"],
        [b"frame/front/", b"1234567", encode(FrameHeader(session="s", stream="front", ts=0, enc="jpeg")), b"x"],
        [b"frame/front/", bytes(8), b"not msgpack", b"x"],
        [b"frame/front/", bytes(8), b"", b"x"],
        [b"frame/back/", *message(0)[1:]],
        [*message(0), b"one too many"],
        message(0)[:3],
        message(0, ts=-1),
        message(0, session=""),
    ],
    "unsupported_version": [message(0, v=2)],
    "unsupported_encoding": [message(0, enc="h264")],
    "bad_size": [message(0, payload=b""), message(0, enc="rgb8", w=2, h=2), message(0, enc="rgb8")],
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_message_is_counted_by_reason_and_the_next_is_received(
    camera: Camera, receiver: Receiver, subscriber: FrameSubscriber, reason: str
):
    camera.send(*BAD[reason], message(7))
    until(receiver.seqs)
    assert receiver.seqs() == [7]
    assert subscriber.rejected == {reason: len(BAD[reason])}


def test_each_reason_is_logged_once(camera: Camera, receiver: Receiver, caplog):
    camera.send(*BAD["malformed"] * 3, *BAD["bad_size"] * 3, message(7))
    until(receiver.seqs)
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]


def test_a_receiver_that_fails_costs_the_frame_alone(context: zmq.Context, caplog):
    seen = []

    def receive(frame: ReceivedFrame) -> bool:
        seen.append(frame.seq)
        return 1 // frame.seq > 0

    subscriber = FrameSubscriber(receive, context=context, bind=TCP)
    subscriber.start()
    with Camera(context, connect=subscriber.bound_endpoint) as camera:
        camera.wait_for_subscriber().send(message(0), message(1))
        until(lambda: seen == [0, 1])
    subscriber.close()
    assert subscriber.rejected == {"internal_error": 1}
    assert "ZeroDivisionError" in caplog.text


def test_a_message_beyond_the_limit_ends_the_connection_and_nothing_else(
    context: zmq.Context, camera: Camera, receiver: Receiver, subscriber: FrameSubscriber
):
    with Camera(context, connect=subscriber.bound_endpoint) as other:
        monitor = other.socket.get_monitor_socket(zmq.Event.DISCONNECTED)
        other.wait_for_subscriber().send([b"frame/front/", bytes(8), bytes((64 << 20) + 1)])
        assert monitor.poll(5000)
        other.socket.disable_monitor()
        monitor.close()
        camera.send(message(1))
        until(lambda: receiver.seqs() == [1])


def test_a_connection_that_is_refused_is_counted(context: zmq.Context, subscriber: FrameSubscriber):
    public, secret = zmq.curve_keypair()
    with Camera(context) as camera:
        camera.socket.set(zmq.CURVE_SERVERKEY, public)
        camera.socket.set(zmq.CURVE_PUBLICKEY, public)
        camera.socket.set(zmq.CURVE_SECRETKEY, secret)
        assert subscriber.bound_endpoint is not None
        camera.socket.connect(subscriber.bound_endpoint)
        until(lambda: subscriber.rejected.get("handshake_failed"))


def test_sockets_are_secured_on_the_thread_that_owns_them_before_they_are_used(context: zmq.Context):
    secured = []

    def secure(socket: zmq.Socket, role: str, options: StreamOptions | None) -> None:
        assert socket.get(zmq.LAST_ENDPOINT) == b""
        secured.append((threading.current_thread().name, role, options and options.name))

    subscriber = FrameSubscriber(Receiver(), context=context, bind=TCP, secure=secure)
    subscriber.start()
    subscriber.add(StreamOptions(name="front", connect="tcp://127.0.0.1:9"))
    subscriber.close()
    assert secured == [("frames", "bind", None), ("frames", "connect", "front")]


def test_a_key_that_cannot_be_read_leaves_nothing_connected(context: zmq.Context):
    def secure(socket: zmq.Socket, role: str, options: StreamOptions | None) -> None:
        raise FileNotFoundError("camera.key")

    subscriber = FrameSubscriber(Receiver(), context=context, secure=secure)
    subscriber.start()
    with pytest.raises(FileNotFoundError, match=r"camera\.key"):
        subscriber.add(StreamOptions(name="front", connect="tcp://127.0.0.1:9"))
    subscriber.close()


@pytest.mark.parametrize("endpoint", ["nonsense", "tcp://127.0.0.1", "smoke://x"])
def test_an_endpoint_that_is_none_is_an_error_and_the_others_go_on(
    subscriber: FrameSubscriber, camera: Camera, receiver: Receiver, endpoint: str
):
    with pytest.raises(zmq.ZMQError):
        subscriber.add(StreamOptions(name="front", connect=endpoint))
    camera.send(message(1))
    until(receiver.seqs)


def test_an_endpoint_that_is_taken_is_an_error_and_leaves_no_thread(context: zmq.Context, subscriber: FrameSubscriber):
    num_threads = threading.active_count()
    second = FrameSubscriber(Receiver(), context=context, bind=subscriber.bound_endpoint)
    with pytest.raises(zmq.ZMQError, match="in use"):
        second.start()
    assert threading.active_count() == num_threads


def test_after_closing_nothing_can_be_added_and_closing_again_does_nothing(context: zmq.Context):
    subscriber = FrameSubscriber(Receiver(), context=context)
    subscriber.start()
    subscriber.close()
    subscriber.close()
    with pytest.raises(ClosedError):
        subscriber.add(StreamOptions(name="front", connect="tcp://127.0.0.1:9"))


def test_it_ends_by_itself_when_its_context_does():
    context = zmq.Context()
    subscriber = FrameSubscriber(Receiver(), context=context, bind=TCP)
    subscriber.start()
    context.term()
    subscriber.close()
    with pytest.raises(ClosedError):
        subscriber.remove("front")


parts = st.lists(st.binary(max_size=40), max_size=4)
headers = st.dictionaries(
    st.sampled_from(list(FrameHeader.__struct_fields__)) | st.text(max_size=4),
    st.none() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=8) | st.booleans(),
    max_size=8,
).map(msgspec.msgpack.encode)
garbage = (
    parts
    | st.tuples(st.just(b"frame/front/"), st.binary(min_size=8, max_size=8), headers, st.binary(max_size=9)).map(list)
    | st.tuples(st.integers(0, 3), st.binary(max_size=40)).map(
        lambda change: [*message(0)[: change[0]], change[1], *message(0)[change[0] + 1 :]]
    )
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(garbage, min_size=1, max_size=60))
def test_whatever_is_sent_is_received_or_counted_and_the_next_frame_arrives(
    camera: Camera, receiver: Receiver, subscriber: FrameSubscriber, messages: list[list[bytes]]
):
    receiver.frames.clear()
    counted_before = sum(subscriber.rejected.values())
    sent = [[b"frame/" + (parts[0] if parts else b""), *parts[1:]] for parts in messages]
    camera.send(*sent, message(2**40))
    until(lambda: 2**40 in receiver.seqs())
    num_known = sum(frame.header.stream == "front" for frame in receiver.frames) - 1
    assert num_known + sum(subscriber.rejected.values()) - counted_before == len(sent)
    assert "internal_error" not in subscriber.rejected
