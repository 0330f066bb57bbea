"""A node in a process of its own, on this machine, for as long as a command needs one."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..protocol.errors import OnlookerError

NODE_MODULE = "onlooker.node"
READY_TIMEOUT_S = 180.0  # torch may have to be read from a cold disk
END_TIMEOUT_S = 2.0
MAX_LOG_LINES = 20

_SOCKETS = ("frames", "ask", "control", "telemetry")


class NodeProcessError(OnlookerError):
    """A node could not be started, or ended by itself; the message has the end of its log."""


class NodeProcess:
    """`python -m onlooker.node` with free ports on the loopback interface, ready for questions.

    The environment's own settings of nodes are kept from it: it is the same on every machine. A terminal's Ctrl-C
    reaches whoever started it alone, who ends it once it is not needed any more.
    """

    def __init__(self, arguments: Sequence[str], log: Path, module: str = NODE_MODULE) -> None:
        """Start it and wait until it is ready; its log goes to a file. Raises NodeProcessError.

        `module` is what Python runs: the node, or what starts one with more flags than the node has.
        """
        self._log = log
        self.end_s: float | None = None  # how long it took to end when it was asked to
        command = [sys.executable, "-m", module, "--print-ready", *_free_ports(), *arguments]
        environment = {name: value for name, value in os.environ.items() if not name.upper().startswith("ONLOOKER_")}
        with log.open("wb") as stderr, _interrupts_held_back():
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, env=environment
            )
        try:
            self.endpoints: dict[str, str] = json.loads(self._ready_line())["endpoints"]
        except BaseException:
            self.kill()
            raise

    def _ready_line(self) -> bytes:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            has_spoken = bool(selector.select(READY_TIMEOUT_S))
        line = self._process.stdout.readline() if has_spoken else b""
        if not line:
            reason = "ended" if has_spoken else f"was not ready after {READY_TIMEOUT_S:g} s"
            raise NodeProcessError(f"the node {reason}; its log ends with:\n{self.log_end()}")
        return line

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def status(self) -> int | None:
        """Its exit status, or None while it runs."""
        return self._process.poll()

    def log_end(self) -> str:
        """The last lines of its log."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-MAX_LOG_LINES:])

    def end(self) -> None:
        """Ask it to end; `end_s` stays None if it does not within `END_TIMEOUT_S`."""
        asked = time.monotonic()
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return
        self.end_s = time.monotonic() - asked

    def kill(self) -> None:
        """Leave nothing running, whatever happened."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


@contextmanager
def running_node(arguments: Sequence[str], log: Path, module: str = NODE_MODULE) -> Iterator[NodeProcess]:
    """Have a node for the time of a `with`, and ask it to end afterwards.

    Raises NodeProcessError instead of what went wrong meanwhile, if the node was gone then.
    """
    node = NodeProcess(arguments, log, module)
    try:
        yield node
        node.end()
    except OnlookerError as error:
        if node.status is None:
            raise
        raise NodeProcessError(f"the node ended by itself; its log ends with:\n{node.log_end()}") from error
    finally:
        node.kill()


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Block SIGINT on this thread; a process that is started meanwhile never gets one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _free_ports() -> list[str]:
    return [part for name in _SOCKETS for part in ("--set", f"endpoints.{name}=tcp://127.0.0.1:*")]
