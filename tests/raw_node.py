"""A node made of raw sockets and plain MessagePack: what a client speaks with if it knows only PROTOCOL.md."""

import queue
import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Self

import msgpack
import zmq
from deadline import until

Fields = dict[str, Any]
Answers = Callable[[Fields], Iterable[Fields | bytes]]

PROVENANCE: Fields = {
    "num_tokens": 100,
    "num_frames": 4,
    "from_ns": 1,
    "until_ns": 2,
    "until_seq": 3,
    "ts_kind": "capture",
    "num_forgotten_chunks": 0,
    "num_forgotten_frames": 0,
    "seconds_forgotten": 0.0,
    "ranges": [],
    "fingerprint_before": "aa",
    "fingerprint_after": "aa",
    "unchanged": True,
}
TIMING: Fields = {"queue_ms": 1.0, "prefill_ms": 2.0, "first_token_ms": 3.0, "decode_ms": 4.0, "total_ms": 5.0}
ANSWER: Fields = {
    "text": "a red circle",
    "finish": "stop",
    "num_prompt_tokens": 7,
    "num_answer_tokens": 3,
    "memory": PROVENANCE,
    "timing": TIMING,
}
CHOICE: Fields = {
    "index": 1,
    "option": "blue",
    "margin": 0.5,
    "rank_by": "calibrated",
    "scores": [],
    "memory": PROVENANCE,
    "timing": TIMING,
}
CACHE: Fields = {
    "num_tokens": 0,
    "capacity_tokens": 10,
    "logical_bytes": 0,
    "resident_bytes": 640,
    "bytes_per_token": 64,
    "num_chunks": 0,
    "num_frames": 0,
    "num_padded_frames": 0,
    "positions_used": 0,
}
FRAMES: Fields = {
    "received": 0,
    "kept": 0,
    "encoded": 0,
    "pending": 0,
    "padded": 0,
    "dropped": {},
    "gaps": 0,
}
STREAM: Fields = {
    "v": 1,
    "ts": 5,
    "stream": "cam",
    "state": "online",
    "layout": "native",
    "chunk_frames": 4,
    "cache": CACHE,
    "frames": FRAMES,
    "stages": {},
}
STATUS: Fields = {
    "v": 1,
    "ts": 5,
    "state": "ready",
    "uptime_s": 1.5,
    "engine_progress_age_ms": 2.0,
    "model": "m",
    "vram": {"device": "cpu", "weights_bytes": 1, "kv_bytes": 2},
    "questions": {"received": 0, "answered": 0, "failed": {}, "waiting": 0, "running": 0},
    "rejected": {},
}
HELLO: Fields = {
    "v": 1,
    "protocol": "1.0",
    "features": [],
    "node": "n1",
    "session": "s1",
    "version": "0.1.0",
    "model": "m",
    "model_type": "t",
    "dtype": "float32",
    "device": "cpu",
    "endpoints": {},
    "max_question_chars": 10,
    "max_new_tokens": 5,
    "max_options": 4,
    "streams": ["cam"],
}


def packed(value: object) -> bytes:
    body = msgpack.packb(value)
    assert body is not None
    return body


def ok(request: Fields, data: Fields | None = None, status: str = "ok") -> Fields:
    """A reply that carries data."""
    return {
        "v": 1,
        "id": request["id"],
        "status": status,
        "node": "n1",
        "session": "s1",
        "data": data or {},
    }


def error(request: Fields, **failure: Any) -> Fields:
    """A reply that says no."""
    facts = {"message": "no", "retryable": False, **failure}
    return {
        "v": 1,
        "id": request["id"],
        "status": "error",
        "node": "n1",
        "session": "s1",
        "error": facts,
    }


class RawNode:
    """ROUTER sockets for `ask` and `control`, answered on a thread.

    `seen` gets every request and `answers` turns it into replies, to this request or, by their id, to earlier
    ones; bytes are sent as they are. `prepare` may add keys to a socket.
    """

    def __init__(self, answers: Answers, prepare: Callable[[zmq.Socket], None] = lambda socket: None) -> None:
        self.answers = answers
        self.seen: queue.Queue[Fields] = queue.Queue()
        self.context = zmq.Context()
        self._prepare = prepare
        self._envelopes: dict[str, list[bytes]] = {}
        self._should_stop = threading.Event()
        self._should_restart = threading.Event()
        self._sockets = [self._bound("tcp://127.0.0.1:*") for _ in range(2)]
        self.ask, self.control = (socket.get_string(zmq.LAST_ENDPOINT) for socket in self._sockets)
        self._thread = threading.Thread(target=self._run)

    def _bound(self, endpoint: str) -> zmq.Socket:
        socket = self.context.socket(zmq.ROUTER)
        socket.set(zmq.LINGER, 0)
        self._prepare(socket)
        try:
            socket.bind(endpoint)
        except zmq.ZMQError:
            socket.close()
            raise
        return socket

    def _run(self) -> None:
        try:
            while not self._should_stop.is_set():
                if self._should_restart.is_set():
                    self._restart()
                for socket in zmq.select(self._sockets, [], [], 0.01)[0]:
                    self._serve(socket)
        finally:
            for socket in self._sockets:
                socket.close()

    def _restart(self) -> None:
        self._should_restart.clear()
        for socket in self._sockets:
            socket.close()
        # ZeroMQ frees a port some time after its socket was closed.
        self._sockets = [until(partial(self._rebound, endpoint))[0] for endpoint in (self.ask, self.control)]

    def _rebound(self, endpoint: str) -> list[zmq.Socket]:
        try:
            return [self._bound(endpoint)]
        except zmq.ZMQError as error:
            assert error.errno == zmq.EADDRINUSE
            return []

    def _serve(self, socket: zmq.Socket) -> None:
        *envelope, body = socket.recv_multipart()
        request = msgpack.unpackb(body)
        self._envelopes[request["id"]] = envelope
        self.seen.put(request)
        for reply in self.answers(request):
            if isinstance(reply, bytes):
                socket.send_multipart([*envelope, reply])
            else:
                socket.send_multipart([*self._envelopes[reply["id"]], packed(reply)])

    def lose_connections(self) -> None:
        """Close both sockets and bind them again, as a node that is restarted does."""
        self._should_restart.set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._should_stop.set()
        self._thread.join()
        self.context.term()
