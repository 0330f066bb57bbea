"""The watcher's side: what a node says about itself."""

import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

import zmq

from .codec import TelemetryRecord, check_stream_name, decode_telemetry
from .curve import become_client, load_credentials
from .errors import ClosedError, DecodeError
from .messages import Hello
from .sockets import MAX_REQUEST_BYTES, TELEMETRY_ENDPOINT, HandshakeMonitor, connect, open_socket


class TelemetrySubscriber:
    """Receives the telemetry of a node: all of it, or some `kinds` such as `stats` and `event`.

    `gaps` counts by topic the messages that were missed, and `num_malformed` those that were no telemetry.
    Telemetry is state, told again and again: a gap needs no repair. The subscriber connects by itself again
    after a node was restarted, and counts from the start.

    Not for use by several threads at once. Reading raises ClosedError after `close`, and AuthError while the
    node refuses the keys.
    """

    def __init__(
        self,
        endpoint: str = TELEMETRY_ENDPOINT,
        *,
        kinds: Iterable[str] | None = None,
        server_key: str | Path | None = None,
        client_key: str | Path | None = None,
        context: zmq.Context | None = None,
    ) -> None:
        """Connect, now or as soon as the node is there. Raises OSError or ValueError for unusable keys."""
        self._kinds = None if kinds is None else frozenset(map(check_stream_name, kinds))
        credentials = load_credentials(server_key, client_key)
        self._order = _Order()
        self.num_malformed = 0
        self._owns_context = context is None
        self._context = zmq.Context() if context is None else context
        self._socket = open_socket(self._context, zmq.SUB, max_message_bytes=MAX_REQUEST_BYTES)
        self._monitor = HandshakeMonitor(self._socket)
        try:
            if credentials is not None:
                become_client(self._socket, credentials.server_public, credentials.pair)
            self._subscribe()
            connect(self._socket, endpoint)
        except BaseException:
            self.close()
            raise

    def _subscribe(self) -> None:
        if self._kinds is None:
            self._socket.subscribe(b"")
            return
        for kind in self._kinds | {"hello"}:  # which tells that a node was restarted
            self._socket.subscribe(f"{kind}/".encode())

    @property
    def gaps(self) -> dict[str, int]:
        """Messages missed since the start, by topic."""
        return dict(self._order.gaps)

    def receive(self, timeout_s: float | None = None) -> TelemetryRecord | None:
        """Return the next record, or None if there was none within `timeout_s`; None waits for ever."""
        if timeout_s is not None and not timeout_s >= 0:
            raise ValueError(f"timeout_s must be 0 or above, got {timeout_s}")
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            if self._socket.closed:
                raise ClosedError("the subscriber is closed")
            self._monitor.raise_if_refused()
            while self._socket.poll(0):
                record = self._take()
                if record is not None:
                    return record
            left_s = None if deadline is None else deadline - time.monotonic()
            if left_s is not None and left_s <= 0:
                return None
            zmq.select([self._socket, self._monitor.socket], [], [], left_s)

    def _take(self) -> TelemetryRecord | None:
        try:
            record = decode_telemetry(self._socket.recv_multipart())
        except DecodeError:
            self.num_malformed += 1
            return None
        self._order.note(record)
        return record if self._kinds is None or record.kind in self._kinds else None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> TelemetryRecord:
        record = self.receive()
        assert record is not None  # there was no time limit
        return record

    def close(self) -> None:
        """Close. Does nothing the second time."""
        if self._socket.closed:
            return
        self._monitor.close()
        self._socket.close()
        if self._owns_context:
            self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Order:
    """Which number comes next under each topic."""

    def __init__(self) -> None:
        self.gaps: Counter[str] = Counter()
        self._next: dict[str, int] = {}
        self._sessions: dict[str, str] = {}

    def note(self, record: TelemetryRecord) -> None:
        if isinstance(record.record, Hello):
            self._note_session(record.node, record.record.session)
        expected = self._next.get(record.topic, record.seq)
        # A number that is lower than expected is of a node that started anew.
        if record.seq > expected:
            self.gaps[record.topic] += record.seq - expected
        self._next[record.topic] = record.seq + 1

    def _note_session(self, node: str, session: str) -> None:
        if self._sessions.setdefault(node, session) == session:
            return
        self._sessions[node] = session
        self._next = {topic: seq for topic, seq in self._next.items() if topic.split("/")[1] != node}
