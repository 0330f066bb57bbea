"""Telemetry of a node that is not there: records as a test wants them, over a real socket."""

from __future__ import annotations

from collections import Counter
from typing import Any, Self

import msgspec
import zmq

from onlooker.protocol.codec import encode_telemetry, telemetry_topic
from onlooker.protocol.messages import StreamStats
from onlooker.protocol.telemetry import TelemetrySubscriber

KINDS = {"Hello": "hello", "NodeStats": "stats", "StreamStats": "stream", "Event": "event"}
PATIENCE_MS = 5000


class TelemetryPublisher:
    """An XPUB socket under the topics of a node."""

    def __init__(self, node: str = "n1") -> None:
        self._node = node
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.XPUB)
        self._socket.set(zmq.LINGER, 0)
        self._socket.bind("tcp://127.0.0.1:*")
        self.endpoint = self._socket.get_string(zmq.LAST_ENDPOINT)
        self._seqs: Counter[bytes] = Counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.close()
        self._context.term()

    def subscriber(self) -> TelemetrySubscriber:
        """One that is connected."""
        subscriber = TelemetrySubscriber(self.endpoint)
        assert self._socket.poll(PATIENCE_MS)
        self._socket.recv()
        return subscriber

    def publish(self, *records: Any) -> int:
        """Publish records, each under the topic of its kind; return how many."""
        for record in records:
            assert isinstance(record, msgspec.Struct)
            stream = record.stream if isinstance(record, StreamStats) else None
            topic = telemetry_topic(KINDS[type(record).__name__], self._node, stream)
            self._socket.send_multipart(encode_telemetry(topic, self._seqs[topic], record))
            self._seqs[topic] += 1
        return len(records)

    def publish_parts(self, *parts: bytes) -> None:
        self._socket.send_multipart(parts)

    def lose(self, num: int, topic: str) -> None:
        """Leave out some numbers of a topic, as if records had been lost."""
        self._seqs[topic.encode()] += num
