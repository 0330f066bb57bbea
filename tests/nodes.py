"""A node around a fake engine, and the plainest clients there can be: raw sockets and the msgpack package."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import msgpack
import numpy as np
import zmq
from fakes import FakeEngine

from onlooker.node.chunk import Chunk, Picture
from onlooker.node.config import load
from onlooker.node.engine_protocol import EngineProtocol
from onlooker.node.node import Node

FREE_PORTS = {f"endpoints.{name}": "tcp://127.0.0.1:*" for name in ("frames", "ask", "control", "telemetry")}
PATIENCE_MS = 5000


@contextmanager
def running_node(engine: EngineProtocol | None, **settings: Any) -> Iterator[Node]:
    """A node with a stream `front`; double underscores in settings stand for dots."""
    overrides = {key.replace("__", "."): value for key, value in settings.items()}
    config = load(None, {"name": "n1", **FREE_PORTS, **overrides}, streams=["front"])
    with Node(config, engine) as node:
        yield node


def remember(engine: FakeEngine, num_frames: int = 2, stream: str = "front", first_seq: int = 0) -> None:
    """Put one chunk of small pictures into a stream's memory."""
    pixels = np.zeros((4, 4, 3), np.uint8)
    seqs = range(first_seq, first_seq + num_frames)
    engine.encode(stream, Chunk(tuple(Picture(pixels, seq, seq * 1000, "capture", seq) for seq in seqs))).result(5)


def packed(value: object) -> bytes:
    return cast("bytes", msgpack.packb(value))


class RawClient:
    """A REQ or DEALER socket that speaks MessagePack by hand."""

    def __init__(
        self, endpoint: str, kind: int = zmq.DEALER, prefix: tuple[bytes, ...] = (b"",), **options: int
    ) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(kind)
        self.socket.set(zmq.LINGER, 0)
        for name, value in options.items():
            self.socket.set(getattr(zmq, name), value)
        self._prefix = prefix if kind == zmq.DEALER else ()
        self.session = uuid.uuid4().hex
        self.socket.connect(endpoint)

    def __enter__(self) -> "RawClient":
        return self

    def __exit__(self, *exc: object) -> None:
        self.socket.close(linger=0)
        self._context.term()

    def send(self, endpoint: str, data: object = None, /, **fields: object) -> str:
        """Send a request and return its id; `fields` replace those of the envelope."""
        request: dict[str, object] = {"v": 1, "id": uuid.uuid4().hex, "session": self.session, "endpoint": endpoint}
        request |= {"data": {} if data is None else data} | fields
        self.send_bytes(packed(request))
        return str(request["id"])

    def send_bytes(self, body: bytes) -> None:
        self.socket.send_multipart([*self._prefix, body])

    def receive(self, timeout_ms: int = PATIENCE_MS) -> dict[str, Any]:
        assert self.socket.poll(timeout_ms), "no reply came"
        *envelope, body = self.socket.recv_multipart()
        assert tuple(envelope) == self._prefix
        return msgpack.unpackb(body)

    def has_reply(self, timeout_ms: int = 50) -> bool:
        return bool(self.socket.poll(timeout_ms))

    def call(self, endpoint: str, data: object = None, /, **fields: object) -> dict[str, Any]:
        request_id = self.send(endpoint, data, **fields)
        reply = self.receive()
        assert reply["id"] == request_id
        return reply

    def ok(self, endpoint: str, data: object = None, /, **fields: object) -> dict[str, Any]:
        reply = self.call(endpoint, data, **fields)
        assert reply["status"] == "ok", reply
        return reply["data"]

    def error(self, endpoint: str, data: object = None, /, **fields: object) -> dict[str, Any]:
        reply = self.call(endpoint, data, **fields)
        assert reply["status"] == "error", reply
        return reply["error"]
