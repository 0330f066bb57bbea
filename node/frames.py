"""Frame messages off the wire: a thread that does nothing else, so that no camera's queue grows."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Literal

import zmq

from ..protocol.codec import ReceivedFrame, decode_frame, frame_topic
from ..protocol.errors import ClosedError, DecodeError
from ..protocol.sockets import MAX_FRAME_BYTES, HandshakeMonitor, bind, connect, open_socket
from .options import StreamOptions
from .outbox import Outbox
from .tally import Tally

# At its high-water mark a SUB reads no further, and its publisher keeps the oldest messages and loses the new ones.
# The sockets are drained all the time, so a short queue is never full for long; the rings choose what to drop. Every
# publisher may fill a queue of its own with the largest of messages.
FRAMES_HWM = 16
MAX_MESSAGES_PER_TURN = 64  # of one socket, so that a flood on it does not starve the others

Secure = Callable[[zmq.Socket, Literal["bind", "connect"], StreamOptions | None], None]
Receive = Callable[[ReceivedFrame], bool]

logger = logging.getLogger(__name__)


def leave_open(socket: zmq.Socket, role: Literal["bind", "connect"], options: StreamOptions | None) -> None:
    """Secure nothing."""


class FrameSubscriber:
    """Receives the frames of all streams on one thread, which owns the sockets.

    One SUB is bound for cameras that connect; each stream with `connect` has one of its own. Every valid frame goes
    to `receive`, which returns whether its stream is known and must return at once. `secure` is called for each
    socket before it is bound or connected, on the subscriber's thread. What is refused is counted in `rejected`
    by reason: those of `decode_frame`, `unknown_stream`, and `handshake_failed`.
    """

    def __init__(
        self,
        receive: Receive,
        *,
        context: zmq.Context,
        bind: str | None = None,
        secure: Secure = leave_open,
    ) -> None:
        self.bound_endpoint: str | None = None  # with its port, once started
        self._receive = receive
        self._context = context
        self._bind = bind
        self._secure = secure
        self._rejected = Tally()
        self._warned: set[tuple[str | None, str]] = set()
        self._links: dict[str | None, _Link] = {}  # by stream; None is the bound socket
        self._poller = zmq.Poller()
        self._calls: Outbox[tuple[Callable[[], None], Future[None]]] = Outbox()
        self._lock = threading.Lock()  # between those who call and the thread that ends
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="frames", daemon=True)

    @property
    def rejected(self) -> dict[str, int]:
        """Messages and connections refused, by reason."""
        return self._rejected.counts()

    def start(self) -> None:
        """Bind and begin to receive. Raises zmq.ZMQError, with nothing left open, if the endpoint cannot be had."""
        self._thread.start()
        try:
            self._call(self._open_bound)
        except Exception:
            self.close()
            raise

    def close(self) -> None:
        """End the thread and its sockets."""
        if self._thread.is_alive():
            self._calls.put((self._stop, Future()))
            self._thread.join()
        self._calls.close()

    def add(self, options: StreamOptions) -> None:
        """Connect to a stream's camera, if it is one that binds. Raises zmq.ZMQError for a bad endpoint."""
        if options.connect is not None:
            self._call(lambda: self._open_connected(options))

    def remove(self, stream: str) -> None:
        """Leave a stream's camera; without one, do nothing."""
        self._call(lambda: self._close_link(stream))

    def _call(self, action: Callable[[], None]) -> None:
        """Do something on the subscriber's thread, and wait until it is done."""
        future: Future[None] = Future()
        with self._lock:
            if self._is_closing or not self._thread.is_alive():
                raise ClosedError("no frames are received any more")
            self._calls.put((action, future))
        future.result()

    # On the subscriber's thread

    def _run(self) -> None:
        self._poller.register(self._calls, zmq.POLLIN)
        try:
            while not self._is_closing:
                readable = dict(self._poller.poll())
                if self._calls.fileno() in readable:
                    self._answer_calls()
                for stream, link in list(self._links.items()):
                    if link.socket in readable:
                        self._drain(stream, link.socket)
                    if link.monitor.socket in readable:
                        self._watch(stream, link.monitor)
        except zmq.ContextTerminated:
            logger.info("the ZeroMQ context is gone, no more frames are received")
        finally:
            with self._lock:
                self._is_closing = True
            for stream in list(self._links):
                self._close_link(stream)
            for _, future in self._calls.take():
                future.set_exception(ClosedError("no frames are received any more"))

    def _answer_calls(self) -> None:
        for action, future in self._calls.take():
            try:
                action()
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(None)

    def _stop(self) -> None:
        self._is_closing = True

    def _open_bound(self) -> None:
        if self._bind is None:
            return
        endpoint = self._bind
        link = _Link(self._context)
        try:
            self._secure(link.socket, "bind", None)
            link.socket.subscribe(b"frame/")
            self.bound_endpoint = bind(link.socket, endpoint)
        except Exception:
            link.close()
            raise
        self._add_link(None, link)

    def _open_connected(self, options: StreamOptions) -> None:
        assert options.connect is not None
        link = _Link(self._context)
        try:
            self._secure(link.socket, "connect", options)
            link.socket.subscribe(frame_topic(options.name))
            connect(link.socket, options.connect)
        except Exception:
            link.close()
            raise
        self._add_link(options.name, link)

    def _add_link(self, stream: str | None, link: "_Link") -> None:
        self._links[stream] = link
        self._poller.register(link.socket, zmq.POLLIN)
        self._poller.register(link.monitor.socket, zmq.POLLIN)

    def _close_link(self, stream: str | None) -> None:
        link = self._links.pop(stream, None)
        if link is not None:
            self._poller.unregister(link.socket)
            self._poller.unregister(link.monitor.socket)
            link.close()

    def _drain(self, stream: str | None, socket: zmq.Socket) -> None:
        for _ in range(MAX_MESSAGES_PER_TURN):
            try:
                parts = socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            self._take(stream, [part.buffer for part in parts])

    def _take(self, stream: str | None, parts: list[memoryview]) -> None:
        try:
            frame = decode_frame(parts)
            if not self._receive(frame):
                self._reject(stream, "unknown_stream", f"there is no stream {frame.header.stream}")
        except DecodeError as error:
            self._reject(stream, error.details.get("reason", "malformed"), str(error))
        except Exception:  # whatever a message does, the next one is received
            self._rejected.add("internal_error")
            logger.exception("a frame message failed in an unknown way")

    def _watch(self, stream: str | None, monitor: HandshakeMonitor) -> None:
        for event in monitor.events():
            if event.kind == "refused":
                self._reject(stream, "handshake_failed", event.reason)

    def _reject(self, stream: str | None, reason: str, message: str) -> None:
        self._rejected.add(reason)
        if (stream, reason) not in self._warned:
            self._warned.add((stream, reason))
            source = "a camera that connected" if stream is None else f"the camera of stream {stream}"
            logger.warning("%s: refused as %s: %s (said once, counted always)", source, reason, message)


class _Link:
    """A SUB socket and its monitor."""

    def __init__(self, context: zmq.Context) -> None:
        self.socket = open_socket(context, zmq.SUB, max_message_bytes=MAX_FRAME_BYTES, hwm=FRAMES_HWM)
        self.monitor = HandshakeMonitor(self.socket)

    def close(self) -> None:
        self.monitor.close()
        self.socket.close()
