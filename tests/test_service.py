"""The service manager is told of the node's life over a real datagram socket, and the watchdog follows the engine."""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import FakeEngine
from nodes import FREE_PORTS, running_node

from onlooker.node import node as node_module
from onlooker.node.service import Service
from onlooker.protocol.messages import Pong

FAKE_NODE = Path(__file__).parent / "fake_node.py"
WATCHED = {"WATCHDOG_USEC": "60000000"}
WELL = Pong(live=True, ready=True, engine_progress_age_ms=1.0)
STUCK = Pong(live=True, ready=False, engine_progress_age_ms=12_000.0)


class Manager:
    """What listens for the notifications of a service."""

    def __init__(self, address: str) -> None:
        self.environment = {"NOTIFY_SOCKET": address.replace("\0", "@")}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address)
        self._socket.settimeout(20)

    def hear(self) -> str:
        return self._socket.recv(4096).decode()

    def heard(self) -> list[str]:
        """All that waits."""
        self._socket.settimeout(0)
        try:
            return list(iter(self._hear_or_empty, ""))
        finally:
            self._socket.settimeout(20)

    def _hear_or_empty(self) -> str:
        try:
            return self.hear()
        except BlockingIOError:
            return ""

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["a path", "an abstract name"])
def any_manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(str(tmp_path / "notify") if request.param == "a path" else f"\0onlooker-test-{os.getpid()}")
    yield manager
    manager.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(str(tmp_path / "notify"))
    yield manager
    manager.close()


def test_a_service_tells_its_life(any_manager: Manager) -> None:
    service = Service(any_manager.environment | WATCHED)
    service.loading("a\nmodel")
    service.ready()
    service.observe(WELL)
    service.stopping()
    assert any_manager.heard() == [
        "STATUS=loading a model",
        "READY=1\nSTATUS=ready",
        "WATCHDOG=1",
        "STOPPING=1\nSTATUS=ending",
    ]


def test_while_the_engine_is_stuck_the_watchdog_is_not_put_off(manager: Manager) -> None:
    service = Service(manager.environment | WATCHED)
    for pong in (WELL, STUCK, STUCK, WELL):
        service.observe(pong)
    stuck = "STATUS=the engine has not come round for 12 s"
    assert manager.heard() == ["WATCHDOG=1", stuck, "WATCHDOG=1", "STATUS=ready"]


@pytest.mark.parametrize("watch", [{}, {"WATCHDOG_USEC": "0"}, WATCHED | {"WATCHDOG_PID": "1"}])
def test_without_a_watchdog_nothing_is_put_off(manager: Manager, watch: dict[str, str]) -> None:
    Service(manager.environment | watch).observe(WELL)
    assert manager.heard() == []


def test_without_a_manager_nothing_is_sent_and_nothing_said(caplog: pytest.LogCaptureFixture) -> None:
    Service({}).ready()
    assert caplog.records == []


def test_a_manager_that_does_not_listen_is_logged_once_and_the_node_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    service = Service({"NOTIFY_SOCKET": "/nowhere/at/all"} | WATCHED)
    with caplog.at_level(logging.WARNING):
        service.ready()
        service.observe(WELL)
    (record,) = caplog.records
    assert "cannot be told READY=1: " in record.getMessage()


def test_a_socket_of_another_kind_is_said(caplog: pytest.LogCaptureFixture) -> None:
    Service({"NOTIFY_SOCKET": "vsock:2:1234"}).ready()
    assert "neither a path nor an abstract socket" in caplog.text


@pytest.mark.parametrize(("age_ms", "is_put_off"), [(5.0, True), (12_000.0, False)])
def test_the_watchdog_follows_the_progress_of_the_engine(
    manager: Manager, monkeypatch: pytest.MonkeyPatch, age_ms: float, is_put_off: bool
) -> None:
    monkeypatch.setattr(node_module, "ENGINE_CHECK_S", 0.05)

    class Engine(FakeEngine):
        @property
        def progress_age_ms(self) -> float:
            return age_ms

    with Engine() as engine, running_node(engine) as node:
        service = Service(manager.environment | WATCHED)
        running = threading.Thread(target=node.run, args=(service.observe,))
        running.start()
        first = manager.hear()
        node.request_stop()
        running.join()
    assert (first == "WATCHDOG=1") is is_put_off


def test_a_node_is_a_service_of_type_notify(manager: Manager) -> None:
    ports = [part for key, value in FREE_PORTS.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, str(FAKE_NODE), "0", "0", "0", "--stream", "front", *ports]
    environment = {**os.environ, **manager.environment, **WATCHED}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        assert [manager.hear() for _ in range(3)] == ["STATUS=loading builtin", "READY=1\nSTATUS=ready", "WATCHDOG=1"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0
    assert manager.heard()[-1] == "STOPPING=1\nSTATUS=ending"


def test_a_node_that_cannot_start_never_says_that_it_is_ready(manager: Manager) -> None:
    ports = [part for key, value in FREE_PORTS.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, str(FAKE_NODE), "0", "0", "0", "--model", "broken", *ports]
    ended = subprocess.run(command, env={**os.environ, **manager.environment}, stderr=subprocess.DEVNULL, timeout=20)
    assert ended.returncode == 1
    assert not [state for state in manager.heard() if "READY=1" in state]
