"""Tells those who watch: who the node is, how it does once a period, and what changed as it happens."""

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import msgspec
import zmq
from msgspec import UNSET

from ..protocol.codec import encode_telemetry, telemetry_topic
from ..protocol.errors import NodeError
from ..protocol.messages import Event, MemoryLimit, StreamStats
from .outbox import Outbox
from .security import RefusedPeers
from .state import NodeState

logger = logging.getLogger(__name__)

MAX_SUBSCRIPTION_BYTES = 4096
CLOSE_LINGER_MS = 200
MAX_LOOK_S = 0.25  # how soon a change of a stream is told
SUBSCRIBE = b"\x01"
_SUBSCRIPTION_BURST = 64  # messages of subscribers between two looks at what else is due

STATE_EVENTS = {
    "waiting": ("stream_waiting", "no frame has come yet"),
    "online": ("stream_online", "frames are coming in"),
    "offline": ("stream_offline", "no frame came for a while"),
    "paused": ("stream_paused", "frames are dropped until it is resumed"),
    "full": ("memory_full", "the memory is full: new frames are dropped, answers go on"),
    "ended": ("stream_ended", "the publisher said that no more frames follow"),
}
FULL_MESSAGES: dict[MemoryLimit, str] = {
    "memory": "the memory is full: new frames are dropped, answers go on",
    "positions": "the model's positions are used up: new frames are dropped until a reset, answers go on",
}
FORGOT_MESSAGES = {
    "reset": "the memory was full and has started over",
    "others": "older frames were forgotten to make room",
}
FORGOT_PERIOD_S = 10.0  # between two events of one stream
_WARNED = frozenset({"memory_full", "degraded", "stream_offline", "request_failed", "trace_left"})


class _Forgot(NamedTuple):
    """What was told of a stream's forgetting, and when."""

    num_frames: int
    at: float  # time.monotonic() seconds


_NOTHING_FORGOT = _Forgot(0, -math.inf)


class Announce(Protocol):
    """Publish an event; any thread may call it."""

    def __call__(self, kind: str, message: str, *, stream: str | None = None, **details: Any) -> None: ...


class Telemetry:
    """Publishes records on one XPUB socket, bound already, on its own thread from `start` to `close`."""

    def __init__(self, socket: zmq.Socket[bytes], state: NodeState, *, refused: RefusedPeers, period_s: float) -> None:
        self._socket = socket
        self._state = state
        self._refused = refused
        self._node = state.config.name
        self._period_s = period_s
        self._look_s = min(period_s, MAX_LOOK_S)
        self._seqs: Counter[bytes] = Counter()
        self._streams: dict[str, StreamStats] = {}
        self._forgot: dict[str, _Forgot] = {}
        self._has_greeted = False
        self._outbox: Outbox[Callable[[], None]] = Outbox()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout_s: float = 1.0) -> None:
        """Publish what is still to be said, and close the socket."""
        if not self._thread.is_alive():
            self._end()
            return
        self._outbox.put(self._stop)
        self._thread.join(timeout_s)

    def announce(self, kind: str, message: str, *, stream: str | None = None, **details: Any) -> None:
        """Publish and log an event. For any thread."""
        level = logging.WARNING if kind in _WARNED else logging.INFO
        logger.log(level, message, extra={"facts": {"event": kind, "stream": stream, **details}})
        event = Event(
            ts=time.time_ns(),
            kind=kind,
            stream=UNSET if stream is None else stream,
            message=message,
            details=details,
        )
        self._outbox.put(partial(self._publish, "event", event))

    # The thread

    def _run(self) -> None:
        try:
            self._publish_all()
        except zmq.ContextTerminated:
            logger.warning("telemetry: it was stuck, and ends after the node")
        finally:
            self._end()

    def _publish_all(self) -> None:
        poller = zmq.Poller()
        for source in (self._socket, self._refused.socket, self._outbox.fileno()):
            poller.register(source, zmq.POLLIN)
        look_due = report_due = time.monotonic()
        while not self._is_stopping:
            poller.poll(1 + int(1e3 * max(0.0, look_due - time.monotonic())))
            for act in self._outbox.take():
                self._shielded(act)
            self._shielded(self._refused.note)
            self._shielded(self._greet_new)
            now = time.monotonic()
            if now >= report_due:
                report_due = max(report_due + self._period_s, now)
                look_due = now + self._look_s
                self._shielded(self._report)
            elif now >= look_due:
                look_due = now + self._look_s
                self._shielded(self._look)

    def _shielded(self, act: Callable[[], None]) -> None:
        try:
            act()
        except NodeError as error:
            logger.debug("nothing to publish: %s", error)  # the model is still being loaded
        except Exception:  # watching must never be what ends a node, nor telemetry a defect elsewhere
            logger.exception("a step of telemetry failed")

    def _stop(self) -> None:
        self._is_stopping = True
        self._report()

    def _end(self) -> None:
        if self._socket.closed:
            return
        self._refused.close()
        self._socket.close(linger=CLOSE_LINGER_MS)
        self._outbox.close()

    def _greet_new(self) -> None:
        """Say hello once to all who subscribed just now."""
        has_new = False
        for _ in range(_SUBSCRIPTION_BURST):
            if not self._socket.poll(0):
                break
            has_new |= self._socket.recv(copy=True)[:1] == SUBSCRIBE
        if has_new:
            self._publish("hello", self._state.hello())

    def _report(self) -> None:
        """Publish everything."""
        if not self._has_greeted:
            self._publish("hello", self._state.hello())
            self._has_greeted = True
        self._publish("stats", self._state.stats())
        self._look(report_all=True)

    def _look(self, *, report_all: bool = False) -> None:
        """Publish and announce what changed of the streams since the last look."""
        streams = {stats.stream: stats for stats in self._state.stream_stats()}
        for name, stats in streams.items():
            before = self._streams.get(name)
            if report_all or before is None or _condition(stats) != _condition(before):
                self._publish("stream", stats, name)
            self._announce_changes(before, stats)
        for gone in self._streams.keys() - streams.keys():
            self._seqs.pop(telemetry_topic("stream", self._node, gone), None)
            self._forgot.pop(gone, None)
        self._streams = streams

    def _announce_changes(self, before: StreamStats | None, stats: StreamStats) -> None:
        session = stats.frames.last_session
        known = before.frames.last_session if before else UNSET
        if known is not UNSET and session != known:
            self.announce("publisher_restarted", "another session publishes the stream", stream=stats.stream)
        if stats.state != (before.state if before else "waiting"):
            kind, message = STATE_EVENTS[stats.state]
            if kind == "memory_full" and stats.cache.limit is not UNSET:
                limit = stats.cache.limit
                self.announce(kind, FULL_MESSAGES[limit], stream=stats.stream, limit=limit)
            else:
                self.announce(kind, message, stream=stats.stream)
        self._announce_forgotten(stats)

    def _announce_forgotten(self, stats: StreamStats) -> None:
        """Tell how many frames were forgotten since it was told last, which a small memory does all the time.

        A memory of the last frames forgets with every chunk, full or not: that is no news.
        """
        if stats.last_frames is not UNSET:
            return
        told, now = self._forgot.get(stats.stream, _NOTHING_FORGOT), time.monotonic()
        num_frames = stats.frames.forgotten - told.num_frames
        if num_frames == 0 or now < told.at + FORGOT_PERIOD_S:
            return
        self._forgot[stats.stream] = _Forgot(stats.frames.forgotten, now)
        details = {"retention": stats.retention, "num_frames": num_frames}
        known = {} if stats.cache.oldest_ns is UNSET else {"oldest_ns": stats.cache.oldest_ns}
        message = FORGOT_MESSAGES["reset" if stats.retention == "reset" else "others"]
        self.announce("forgot", message, stream=stats.stream, **details, **known)

    def _publish(self, kind: str, record: msgspec.Struct, stream: str | None = None) -> None:
        topic = telemetry_topic(kind, self._node, stream)
        self._socket.send_multipart(encode_telemetry(topic, self._seqs[topic], record), zmq.NOBLOCK)
        self._seqs[topic] += 1


def _condition(stats: StreamStats) -> tuple[object, ...]:
    """What of a stream is worth a record before its time."""
    return (
        stats.state,
        stats.degraded,
        stats.received_size,
        stats.encoded_size,
        stats.cache.num_chunks,
        stats.frames.forgotten,
        stats.cache.full,
        stats.frames.last_session,
    )
