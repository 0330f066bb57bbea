import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest
import zmq
from raw_node import HELLO, STATUS, Fields, packed

from onlooker.protocol.curve import generate, write_keypair
from onlooker.protocol.errors import AuthError, ClosedError
from onlooker.protocol.messages import Event, Hello, NodeStats
from onlooker.protocol.telemetry import TelemetrySubscriber

WAIT_S = 5.0
EVENT: Fields = {"v": 1, "ts": 5, "kind": "reset", "message": "the memory was forgotten"}


class RawTelemetry:
    """An XPUB socket that publishes MessagePack packed by hand."""

    def __init__(self, context: zmq.Context) -> None:
        self.socket = context.socket(zmq.XPUB)
        self.socket.set(zmq.LINGER, 0)
        self.socket.set(zmq.RCVTIMEO, int(WAIT_S * 1000))
        self.socket.bind("tcp://127.0.0.1:*")
        self.endpoint = self.socket.get_string(zmq.LAST_ENDPOINT)

    def wait_for(self, *topics: bytes) -> Self:
        """Wait until all these are subscribed to, and nothing else."""
        heard = {self.socket.recv() for _ in topics}
        assert heard == {b"\x01" + topic for topic in topics}
        return self

    def publish(self, topic: bytes, seq: int, record: Fields) -> None:
        self.publish_parts(topic, struct.pack(">Q", seq), packed(record))

    def publish_parts(self, *parts: bytes) -> None:
        self.socket.send_multipart(parts)


@pytest.fixture
def node() -> Iterator[RawTelemetry]:
    with zmq.Context() as context:
        node = RawTelemetry(context)
        yield node
        node.socket.close()


def test_records_come_as_messages_with_their_topic_and_number(node: RawTelemetry) -> None:
    with TelemetrySubscriber(node.endpoint) as subscriber:
        node.wait_for(b"")
        node.publish(b"stats/n1/", 3, STATUS)
        record = subscriber.receive(WAIT_S)
    assert record is not None
    assert (record.topic, record.seq, record.kind, record.node) == ("stats/n1/", 3, "stats", "n1")
    assert isinstance(record.record, NodeStats)
    assert record.record.uptime_s == 1.5


def test_nothing_within_the_time_is_none(node: RawTelemetry) -> None:
    with TelemetrySubscriber(node.endpoint) as subscriber:
        assert subscriber.receive(0) is None
        assert subscriber.receive(0.05) is None
        with pytest.raises(ValueError, match="timeout_s"):
            subscriber.receive(-1)


def test_iterating_gives_record_after_record(node: RawTelemetry) -> None:
    with TelemetrySubscriber(node.endpoint) as subscriber:
        node.wait_for(b"")
        for seq in range(3):
            node.publish(b"event/n1/", seq, EVENT)
        records = [record for _, record in zip(range(3), subscriber, strict=False)]
    assert [record.seq for record in records] == [0, 1, 2]
    assert all(isinstance(record.record, Event) for record in records)


def test_only_the_kinds_that_were_asked_for_come(node: RawTelemetry) -> None:
    with TelemetrySubscriber(node.endpoint, kinds=["stats"]) as subscriber:
        node.wait_for(b"stats/", b"hello/")
        node.publish(b"hello/n1/", 0, HELLO)
        node.publish(b"event/n1/", 0, EVENT)
        node.publish(b"stats/n1/", 0, STATUS)
        record = subscriber.receive(WAIT_S)
        assert record is not None
        assert record.kind == "stats"
        assert subscriber.receive(0) is None


def test_hello_comes_if_it_was_asked_for(node: RawTelemetry) -> None:
    with TelemetrySubscriber(node.endpoint, kinds=["hello"]) as subscriber:
        node.wait_for(b"hello/").publish(b"hello/n1/", 0, HELLO)
        record = subscriber.receive(WAIT_S)
    assert record is not None
    assert isinstance(record.record, Hello)


def _hear(node: RawTelemetry, subscriber: TelemetrySubscriber, *messages: tuple[bytes, int, Fields]) -> None:
    for topic, seq, record in messages:
        node.publish(topic, seq, record)
        assert subscriber.receive(WAIT_S) is not None


def test_missing_numbers_are_counted_by_topic(node: RawTelemetry) -> None:
    with TelemetrySubscriber(node.endpoint) as subscriber:
        node.wait_for(b"")
        _hear(node, subscriber, (b"event/n1/", 5, EVENT), (b"event/n1/", 6, EVENT), (b"event/n1/", 9, EVENT))
        _hear(node, subscriber, (b"stats/n1/", 0, STATUS), (b"stats/n1/", 1, STATUS), (b"event/n1/", 11, EVENT))
        assert subscriber.gaps == {"event/n1/": 3}


def test_a_node_that_restarted_is_no_gap(node: RawTelemetry) -> None:
    with TelemetrySubscriber(node.endpoint) as subscriber:
        node.wait_for(b"")
        _hear(node, subscriber, (b"hello/n1/", 0, HELLO), (b"stats/n1/", 50, STATUS))
        # It counts from 0 again, whether its hello is heard first or not.
        _hear(node, subscriber, (b"stats/n1/", 0, STATUS), (b"stats/n1/", 1, STATUS))
        assert subscriber.gaps == {}


def test_a_hello_of_another_session_forgets_the_numbers_of_that_node(node: RawTelemetry) -> None:
    with TelemetrySubscriber(node.endpoint) as subscriber:
        node.wait_for(b"")
        _hear(node, subscriber, (b"hello/n1/", 0, HELLO), (b"stats/n1/", 1, STATUS), (b"stats/n2/", 1, STATUS))
        _hear(node, subscriber, (b"hello/n1/", 7, HELLO | {"session": "s2"}))
        _hear(node, subscriber, (b"stats/n1/", 90, STATUS), (b"stats/n2/", 90, STATUS))
        assert subscriber.gaps == {"stats/n2/": 88}


def test_a_hello_that_is_repeated_forgets_nothing(node: RawTelemetry) -> None:
    with TelemetrySubscriber(node.endpoint, kinds=["stats"]) as subscriber:
        node.wait_for(b"stats/", b"hello/")
        _hear(node, subscriber, (b"stats/n1/", 0, STATUS))
        for seq in (0, 1):
            node.publish(b"hello/n1/", seq, HELLO)
        _hear(node, subscriber, (b"stats/n1/", 2, STATUS))
        assert subscriber.gaps == {"stats/n1/": 1}


def test_what_is_no_telemetry_is_counted_and_passed_over(node: RawTelemetry) -> None:
    with TelemetrySubscriber(node.endpoint) as subscriber:
        node.wait_for(b"")
        node.publish_parts(b"stats/n1/")
        node.publish_parts(b"stats/n1/", bytes(8), b"\xc1")
        node.publish(b"stats/n1/", 0, STATUS | {"v": 2})
        node.publish(b"stats/n1/", 0, STATUS)
        assert subscriber.receive(WAIT_S) is not None
        assert subscriber.num_malformed == 3


def test_a_kind_of_a_newer_node_comes_without_its_record(node: RawTelemetry) -> None:
    with TelemetrySubscriber(node.endpoint) as subscriber:
        node.wait_for(b"")
        node.publish_parts(b"kv/n1/m/", bytes(8), b"\x90", b"more")
        record = subscriber.receive(WAIT_S)
    assert record is not None
    assert (record.kind, record.record) == ("kv", None)


def test_a_node_that_is_bound_later_is_heard(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/telemetry"
    with zmq.Context() as context, TelemetrySubscriber(endpoint) as subscriber, context.socket(zmq.XPUB) as node:
        node.set(zmq.LINGER, 0)
        node.bind(endpoint)
        node.recv()
        node.send_multipart([b"stats/n1/", bytes(8), packed(STATUS)])
        assert subscriber.receive(WAIT_S) is not None


def test_keys_that_do_not_fit_are_an_error_at_once(node: RawTelemetry, tmp_path: Path) -> None:
    server_key, _ = write_keypair(tmp_path, "server", generate())
    _, client_key = write_keypair(tmp_path, "own", generate())
    with TelemetrySubscriber(node.endpoint, server_key=server_key, client_key=client_key) as subscriber:
        for _ in range(2):
            with pytest.raises(AuthError, match="CURVE"):
                subscriber.receive(WAIT_S)


def test_a_closed_subscriber_says_so(node: RawTelemetry) -> None:
    subscriber = TelemetrySubscriber(node.endpoint)
    subscriber.close()
    subscriber.close()
    with pytest.raises(ClosedError):
        subscriber.receive(0)
