"""How every ZeroMQ socket of this protocol is opened, and what its monitor says about the connection."""

import struct
import uuid
from collections.abc import Iterator
from ipaddress import IPv6Address, ip_address
from typing import Literal, NamedTuple, Self

import zmq

from .errors import AuthError

FRAMES_ENDPOINT = "tcp://127.0.0.1:5556"
ASK_ENDPOINT = "tcp://127.0.0.1:5560"
CONTROL_ENDPOINT = "tcp://127.0.0.1:5561"
TELEMETRY_ENDPOINT = "tcp://127.0.0.1:5562"

MAX_FRAME_BYTES = 64 << 20
MAX_REQUEST_BYTES = 4 << 20
DEFAULT_HWM = 1000  # messages a peer may lag behind, not counting what the kernel buffers
FRAMES_HWM = 4

HEARTBEAT_IVL_MS = 2000
HEARTBEAT_TIMEOUT_MS = 6000


def open_socket(
    context: zmq.Context,
    kind: int,
    *,
    max_message_bytes: int,
    linger_ms: int = 0,
    hwm: int = DEFAULT_HWM,
) -> zmq.Socket:
    """Open a socket that notices a dead peer, bounds its queues and its messages, and closes in time.

    `max_message_bytes` holds for each part; a peer that sends a larger one is disconnected.
    """
    socket = context.socket(kind)
    socket.set(zmq.LINGER, linger_ms)  # the default waits for ever
    socket.set(zmq.MAXMSGSIZE, max_message_bytes)
    socket.set(zmq.SNDHWM, hwm)
    socket.set(zmq.RCVHWM, hwm)
    # TCP alone does not notice a frozen peer or a pulled cable.
    socket.set(zmq.HEARTBEAT_IVL, HEARTBEAT_IVL_MS)
    socket.set(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    socket.set(zmq.HEARTBEAT_TTL, HEARTBEAT_TIMEOUT_MS)
    socket.set(zmq.TCP_KEEPALIVE, 1)
    return socket


def bind(socket: zmq.Socket, endpoint: str) -> str:
    """Bind, and return the endpoint with the port that was taken. Raises zmq.ZMQError."""
    _allow_ipv6(socket, endpoint)
    socket.bind(endpoint)
    return socket.get_string(zmq.LAST_ENDPOINT)


def connect(socket: zmq.Socket, endpoint: str) -> None:
    """Connect, now or as soon as somebody binds. Raises zmq.ZMQError for an endpoint that is none."""
    _allow_ipv6(socket, endpoint)
    socket.connect(endpoint)


def _allow_ipv6(socket: zmq.Socket, endpoint: str) -> None:
    # Not always on: `tcp://*` would then also take the IPv6 side, and 127.0.0.1 reads ::ffff:127.0.0.1.
    socket.set(zmq.IPV6, int("[" in endpoint))


def is_loopback(endpoint: str) -> bool:
    """Whether only this machine can reach `endpoint`. An address that tells nothing is taken as open."""
    transport, _, address = endpoint.partition("://")
    if transport in ("ipc", "inproc"):
        return True
    host = address.rpartition(":")[0]
    if transport != "tcp" or not host:
        return False
    return host == "localhost" or _is_loopback_address(host.removeprefix("[").removesuffix("]"))


def _is_loopback_address(host: str) -> bool:
    try:
        address = ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (mapped or address).is_loopback


class ConnectionEvent(NamedTuple):
    """A connection became usable, was lost, or was refused in its handshake.

    `is_final` tells a refusal by keys or mechanism from a handshake that a dying peer broke off.
    """

    kind: Literal["ready", "lost", "refused"]
    endpoint: str
    reason: str = ""
    is_final: bool = False


_WATCHED = (
    zmq.Event.HANDSHAKE_SUCCEEDED
    | zmq.Event.DISCONNECTED
    | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
    | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
    | zmq.Event.HANDSHAKE_FAILED_AUTH
)
_FINAL_ERRORS: dict[int, str] = {
    zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH: "one side uses CURVE and the other does not",
    zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC: "the keys do not fit",
}
# A CURVE server that cannot read our greeting closes without a word, and so does a peer that is killed.
# The one goes on doing so, 100 ms apart; the other does not.
_MAX_BROKEN_HANDSHAKES = 3


class HandshakeMonitor:
    """What happens to the connections of one socket, of which ZeroMQ itself says nothing.

    A wrong CURVE key looks like silence: only the socket's monitor tells. Make it before the socket connects
    or binds, use it on the socket's thread, and close it before the socket. One that is not read holds some 100
    bytes for each event. A bound socket, where strangers make events, needs one that is read all the time, or none.
    """

    def __init__(self, watched: zmq.Socket) -> None:
        self._watched = watched
        self._num_broken = 0
        self._refusal: ConnectionEvent | None = None
        self.socket: zmq.Socket = _monitor_socket(watched)  # for a poller

    def events(self) -> Iterator[ConnectionEvent]:
        """Take the events that are there, without waiting."""
        while self.socket.poll(0):
            # Read here and not by zmq.utils.monitor, which loads asyncio.
            facts, endpoint = self.socket.recv_multipart()
            event = self._event(*struct.unpack("=Hi", facts), endpoint.decode())
            if event.is_final or event.kind == "ready":
                self._refusal = event if event.is_final else None
            yield event

    def raise_if_refused(self) -> None:
        """Take the events that are there. Raises AuthError if the last handshake was a final refusal."""
        for _ in self.events():
            pass
        if self._refusal is not None:
            raise AuthError(self._refusal.endpoint, self._refusal.reason)

    def _event(self, event: int, value: int, endpoint: str) -> ConnectionEvent:
        match event:
            case zmq.Event.HANDSHAKE_SUCCEEDED:
                self._num_broken = 0
                return ConnectionEvent("ready", endpoint)
            case zmq.Event.HANDSHAKE_FAILED_AUTH:
                reason = f"the key is not allowed (status {value})"
                return ConnectionEvent("refused", endpoint, reason, is_final=True)
            case zmq.Event.HANDSHAKE_FAILED_PROTOCOL:
                reason = _FINAL_ERRORS.get(value, f"handshake error 0x{value:08x}")
                return ConnectionEvent("refused", endpoint, reason, is_final=value in _FINAL_ERRORS)
            case zmq.Event.HANDSHAKE_FAILED_NO_DETAIL:
                return self._broken_handshake(endpoint)
            case _:
                return ConnectionEvent("lost", endpoint)

    def _broken_handshake(self, endpoint: str) -> ConnectionEvent:
        self._num_broken += 1
        uses_curve = self._watched.get(zmq.MECHANISM) == zmq.CURVE
        is_final = uses_curve and self._num_broken >= _MAX_BROKEN_HANDSHAKES
        reason = "the server broke off the handshake"
        if is_final:
            reason += ": its key is another, or it does not use CURVE"
        return ConnectionEvent("refused", endpoint, reason, is_final)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        try:
            self._watched.disable_monitor()
        except zmq.ContextTerminated:
            pass  # nothing happens to the socket any more
        finally:
            self.socket.close(linger=0)


def _monitor_socket(watched: zmq.Socket) -> zmq.Socket:
    """Read what libzmq tells of a socket.

    Its I/O thread waits when the queue of events is full, and with it all sockets of the context: the queue
    must have no bound, which holds only if it is set before the two ends meet.
    """
    address = f"inproc://monitor-{uuid.uuid4()}"
    watched.monitor(address, _WATCHED)
    socket = watched.context.socket(zmq.PAIR)
    try:
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.RCVHWM, 0)
        socket.connect(address)
    except BaseException:
        watched.disable_monitor()
        socket.close(linger=0)
        raise
    return socket
