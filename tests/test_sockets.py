import socketserver
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zmq
from deadline import until
from probes import probe

from onlooker.protocol.curve import KeyPair, become_client, become_server, generate
from onlooker.protocol.errors import AuthError
from onlooker.protocol.sockets import (
    MAX_FRAME_BYTES,
    MAX_REQUEST_BYTES,
    ConnectionEvent,
    HandshakeMonitor,
    bind,
    connect,
    is_loopback,
    open_socket,
)


@pytest.fixture
def context() -> Iterator[zmq.Context]:
    with zmq.Context() as context:
        yield context


def test_a_socket_keeps_every_rule_of_the_protocol(context: zmq.Context) -> None:
    with open_socket(context, zmq.DEALER, max_message_bytes=MAX_REQUEST_BYTES, linger_ms=200, hwm=4) as socket:
        assert socket.get(zmq.LINGER) == 200
        assert socket.get(zmq.MAXMSGSIZE) == 4 << 20
        assert (socket.get(zmq.SNDHWM), socket.get(zmq.RCVHWM)) == (4, 4)
        assert (socket.get(zmq.HEARTBEAT_IVL), socket.get(zmq.HEARTBEAT_TIMEOUT)) == (2000, 6000)
        assert socket.get(zmq.HEARTBEAT_TTL) == 6000
        assert socket.get(zmq.TCP_KEEPALIVE) == 1


def test_closing_waits_for_nobody_unless_told_to(context: zmq.Context) -> None:
    with open_socket(context, zmq.DEALER, max_message_bytes=100) as socket:
        assert socket.get(zmq.LINGER) == 0


def test_the_limits_are_those_of_the_protocol() -> None:
    assert (MAX_FRAME_BYTES, MAX_REQUEST_BYTES) == (64 << 20, 4 << 20)


def test_a_part_beyond_the_limit_ends_the_connection(context: zmq.Context) -> None:
    with (
        open_socket(context, zmq.PULL, max_message_bytes=1000) as receiver,
        open_socket(context, zmq.PUSH, max_message_bytes=1000) as sender,
        HandshakeMonitor(sender) as monitor,
    ):
        connect(sender, bind(receiver, "tcp://127.0.0.1:*"))
        sender.send(bytes(1001))
        kinds: list[str] = []
        until(lambda: kinds.extend(event.kind for event in monitor.events()) or "lost" in kinds)
        assert not receiver.poll(0)


def test_binding_tells_the_port_that_was_taken(context: zmq.Context, tmp_path: Path) -> None:
    with open_socket(context, zmq.ROUTER, max_message_bytes=100) as socket:
        assert bind(socket, f"ipc://{tmp_path}/s") == f"ipc://{tmp_path}/s"
        endpoint = bind(socket, "tcp://127.0.0.1:*")
        assert endpoint.startswith("tcp://127.0.0.1:")
        assert not endpoint.endswith(("*", ":0"))


@pytest.mark.parametrize(
    "endpoint",
    [
        "tcp://127.0.0.1:5560",
        "tcp://127.0.0.1:*",
        "tcp://127.8.9.1:5560",
        "tcp://localhost:5560",
        "tcp://[::1]:5560",
        "tcp://[::ffff:127.0.0.1]:5560",
        "ipc:///run/onlooker/ask.sock",
        "ipc://@abstract",
        "inproc://frames",
    ],
)
def test_what_only_this_machine_can_reach_is_loopback(endpoint: str) -> None:
    assert is_loopback(endpoint)


@pytest.mark.parametrize(
    "endpoint",
    [
        "tcp://*:5560",
        "tcp://0.0.0.0:5560",
        "tcp://[::]:5560",
        "tcp://192.168.1.7:5560",
        "tcp://[::ffff:192.168.1.7]:5560",
        "tcp://eth0:5560",
        "tcp://lo:5560",
        "tcp://127.0.0.1.example.com:5560",
        "tcp://localhost.example.com:5560",
        "tcp://eth0;127.0.0.1:5560",
        "tcp://127.0.0.1",
        "tcp://:5560",
        "udp://127.0.0.1:5560",
        "127.0.0.1:5560",
        "",
    ],
)
def test_what_others_may_reach_is_not_loopback(endpoint: str) -> None:
    assert not is_loopback(endpoint)


def test_ipv6_is_on_where_the_endpoint_asks_for_it(context: zmq.Context) -> None:
    with open_socket(context, zmq.ROUTER, max_message_bytes=100) as socket:
        try:
            assert bind(socket, "tcp://[::1]:*").startswith("tcp://[::1]:")
        except zmq.ZMQError as error:
            pytest.skip(f"no IPv6 here: {error}")


SERVER, CLIENT, STRANGER = generate(), generate(), generate()


def _first_final_event(context: zmq.Context, server: KeyPair | None, client: KeyPair | None) -> ConnectionEvent:
    """Connect a client that expects SERVER; without keys a side does not use CURVE."""
    with (
        open_socket(context, zmq.ROUTER, max_message_bytes=100) as listener,
        open_socket(context, zmq.DEALER, max_message_bytes=100) as socket,
        HandshakeMonitor(socket) as monitor,
    ):
        if server is not None:
            become_server(listener, server)
        if client is not None:
            become_client(socket, SERVER.public, client)
        connect(socket, bind(listener, "tcp://127.0.0.1:*"))
        events: list[ConnectionEvent] = []
        until(lambda: events.extend(e for e in monitor.events() if e.is_final or e.kind == "ready") or events)
        event = events[0]
        if event.is_final:
            with pytest.raises(AuthError, match=event.endpoint):
                monitor.raise_if_refused()
        else:
            monitor.raise_if_refused()
        return event


def test_the_monitor_tells_a_connection_that_is_usable(context: zmq.Context) -> None:
    assert _first_final_event(context, None, None).kind == "ready"


@pytest.mark.parametrize(("server", "client"), [(SERVER, None), (None, CLIENT)], ids=["server", "client"])
def test_the_monitor_tells_curve_on_one_side_only(
    context: zmq.Context, server: KeyPair | None, client: KeyPair | None
) -> None:
    event = _first_final_event(context, server, client)
    assert event.kind == "refused"
    assert "CURVE" in event.reason


def test_the_monitor_tells_a_wrong_server_key(context: zmq.Context) -> None:
    event = _first_final_event(context, STRANGER, CLIENT)
    assert (event.kind, event.is_final) == ("refused", True)
    assert "key" in event.reason


def test_a_curve_server_without_an_authenticator_lets_nobody_in(context: zmq.Context) -> None:
    assert _first_final_event(context, SERVER, CLIENT).kind == "refused"


def test_a_peer_that_goes_away_is_a_lost_connection_and_no_refusal(context: zmq.Context) -> None:
    with (
        open_socket(context, zmq.DEALER, max_message_bytes=100) as socket,
        HandshakeMonitor(socket) as monitor,
    ):
        events: list[ConnectionEvent] = []
        with open_socket(context, zmq.ROUTER, max_message_bytes=100) as listener:
            connect(socket, bind(listener, "tcp://127.0.0.1:*"))
            until(lambda: events.extend(monitor.events()) or events)
        until(lambda: events.extend(monitor.events()) or len(events) > 1)
        assert [event.kind for event in events[:2]] == ["ready", "lost"]
        assert not any(event.is_final for event in events)
        monitor.raise_if_refused()


@pytest.fixture
def closing_proxy() -> Iterator[str]:
    """Takes every connection and closes it at once, as a proxy does whose node is down."""
    with socketserver.TCPServer(("127.0.0.1", 0), socketserver.BaseRequestHandler) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, args=(0.01,))
        thread.start()
        yield f"tcp://127.0.0.1:{proxy.server_address[1]}"
        proxy.shutdown()
        thread.join()


def test_a_peer_that_hangs_up_during_the_handshake_is_no_refusal_without_curve(
    context: zmq.Context, closing_proxy: str
) -> None:
    with (
        open_socket(context, zmq.DEALER, max_message_bytes=100) as socket,
        HandshakeMonitor(socket) as monitor,
    ):
        socket.set(zmq.RECONNECT_IVL, 10)
        connect(socket, closing_proxy)
        events: list[ConnectionEvent] = []
        until(lambda: events.extend(monitor.events()) or sum(e.kind == "refused" for e in events) > 5)
        monitor.raise_if_refused()
        assert not any(event.is_final for event in events)


def test_a_monitor_can_be_closed_while_its_context_ends() -> None:
    context = zmq.Context()
    socket = open_socket(context, zmq.DEALER, max_message_bytes=100)
    monitor = HandshakeMonitor(socket)
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(context.term)
        with pytest.raises(zmq.ContextTerminated):
            socket.poll(5000)
        monitor.close()
        socket.close()
        ended.result(timeout=5)


def test_a_monitor_that_nobody_reads_stops_nothing(context: zmq.Context) -> None:
    with (
        open_socket(context, zmq.PULL, max_message_bytes=100) as receiver,
        HandshakeMonitor(receiver) as monitor,
        open_socket(context, zmq.PUSH, max_message_bytes=100) as sender,
    ):
        endpoint = bind(receiver, "tcp://127.0.0.1:*")
        probe(endpoint, 2500)  # the default bound is 1000 messages on each side
        connect(sender, endpoint)
        sender.send(b"hello")
        assert receiver.poll(5000)
        refused: list[ConnectionEvent] = []
        until(lambda: refused.extend(e for e in monitor.events() if e.kind != "ready") or len(refused) >= 2500)
