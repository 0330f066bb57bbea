"""Connections to a request socket of a node, each for one request at a time."""

import math
import random
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager

import msgspec
import zmq

from .codec import decode_reply, encode
from .curve import Credentials, become_client
from .errors import AuthError, ClosedError, DecodeError, ErrorCode, NodeError, NoReplyError
from .messages import Reply, Request
from .sockets import MAX_REQUEST_BYTES, HandshakeMonitor, connect, open_socket

MAX_DEADLINE_MS = 86_400_000
_FIRST_BACKOFF_S = 0.05
_MAX_BACKOFF_S = 1.0


class Connection:
    """A DEALER socket that sends a request until it is answered."""

    def __init__(self, context: zmq.Context, endpoint: str, credentials: Credentials | None) -> None:
        """Open the socket. Raises zmq.ZMQError for an endpoint that is none."""
        self.endpoint = endpoint
        self._socket = open_socket(context, zmq.DEALER, max_message_bytes=MAX_REQUEST_BYTES)
        self._monitor = HandshakeMonitor(self._socket)
        self._poller = zmq.Poller()
        self._poller.register(self._monitor.socket, zmq.POLLIN)
        try:
            # A request that waits for a connection must not be sent after the caller has given up.
            self._socket.set(zmq.IMMEDIATE, 1)
            if credentials is not None:
                become_client(self._socket, credentials.server_public, credentials.pair)
            connect(self._socket, endpoint)
        except zmq.ZMQError:
            self.close()
            raise

    def replies(self, request: Request, timeout_s: float) -> Generator[Reply]:
        """Send a request and yield its replies up to the final one.

        When the connection is lost the request goes out again, after a growing pause: the node knows it by its
        id and session, and does the work once. Raises NoReplyError, AuthError, or DecodeError for bytes that
        are no reply, and then the connection is of no further use.
        """
        delivery = _Delivery(time.monotonic() + timeout_s)
        self._note_events(_Delivery(0.0))  # of the time between two requests
        while True:
            if delivery.is_due and self._try_send(request, delivery):
                delivery.is_sent = True
            if delivery.left_s <= 0:
                raise NoReplyError(self.endpoint, timeout_s)
            self._wait(delivery)
            for reply in self._received(request.id):
                yield reply
                if reply.status != "partial":
                    return
            self._note_events(delivery)

    def _try_send(self, request: Request, delivery: "_Delivery") -> bool:
        body = encode(msgspec.structs.replace(request, deadline_ms=_node_budget_ms(delivery.left_s)))
        if len(body) > MAX_REQUEST_BYTES:
            message = f"the request has {len(body)} bytes, at most {MAX_REQUEST_BYTES} are allowed"
            raise NodeError(ErrorCode.TOO_LARGE, message)
        try:
            self._socket.send_multipart([b"", body], zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def _wait(self, delivery: "_Delivery") -> None:
        self._poller.register(self._socket, zmq.POLLIN | (zmq.POLLOUT if delivery.is_due else 0))
        self._poller.poll(math.ceil(max(0.0, delivery.wait_s) * 1000))

    def _received(self, request_id: str) -> Iterator[Reply]:
        while self._socket.poll(0, zmq.POLLIN):
            parts = self._socket.recv_multipart()
            if len(parts) != 2 or parts[0]:
                raise DecodeError(f"a reply has an empty part and a body, got {len(parts)} parts")
            reply = decode_reply(parts[1])
            # Others are late answers to requests that were given up; without an id the node could not read ours.
            if reply.id in (request_id, ""):
                yield reply

    def _note_events(self, delivery: "_Delivery") -> None:
        for event in self._monitor.events():
            if event.is_final:
                raise AuthError(self.endpoint, event.reason)
            if event.kind == "lost":
                delivery.note_loss()

    def close(self) -> None:
        self._monitor.close()
        self._socket.close()


class _Delivery:
    """How far the sending of one request has come; times are `time.monotonic()` seconds."""

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self._send_at = 0.0
        self._num_losses = 0
        self.is_sent = False

    @property
    def left_s(self) -> float:
        return self._deadline - time.monotonic()

    @property
    def is_due(self) -> bool:
        return not self.is_sent and time.monotonic() >= self._send_at

    @property
    def wait_s(self) -> float:
        if self.is_sent or self.is_due:
            return self.left_s
        return min(self.left_s, self._send_at - time.monotonic())

    def note_loss(self) -> None:
        if not self.is_sent:
            return
        pause_s = min(_MAX_BACKOFF_S, _FIRST_BACKOFF_S * 2**self._num_losses)
        # Jittered, or all clients of a node that restarts would come back in the same instant.
        self._send_at = time.monotonic() + pause_s * random.uniform(0.5, 1.0)
        self._num_losses += 1
        self.is_sent = False


def _node_budget_ms(left_s: float) -> int:
    """What the node may take: a little less than we wait, so that its own word on being late arrives."""
    return max(1, min(MAX_DEADLINE_MS, int(1000 * (left_s - min(0.1, 0.1 * left_s)))))


class ConnectionPool:
    """Connections to one endpoint, as many as there are requests at the same time. Safe from any thread."""

    def __init__(self, context: zmq.Context, endpoint: str, credentials: Credentials | None) -> None:
        self._context = context
        self._endpoint = endpoint
        self._credentials = credentials
        self._lock = threading.Lock()
        self._idle: list[Connection] = []
        self._is_open = True

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """Lend a connection. It is closed if its use ends with an error, and kept for the next one if not.

        Raises ClosedError, also when the pool's context is terminated meanwhile.
        """
        try:
            connection = self._take()
        except zmq.ContextTerminated as error:
            raise ClosedError(f"the client of {self._endpoint} is closed") from error
        try:
            yield connection
        except zmq.ContextTerminated as error:
            connection.close()
            raise ClosedError(f"the client of {self._endpoint} was closed") from error
        except BaseException:
            connection.close()
            raise
        self._give_back(connection)

    def _take(self) -> Connection:
        with self._lock:
            if not self._is_open:
                raise ClosedError(f"the client of {self._endpoint} is closed")
            if self._idle:
                return self._idle.pop()
        return Connection(self._context, self._endpoint, self._credentials)

    def _give_back(self, connection: Connection) -> None:
        with self._lock:
            if self._is_open:
                self._idle.append(connection)
                return
        connection.close()

    def close(self) -> None:
        with self._lock:
            self._is_open = False
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()
