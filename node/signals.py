"""SIGTERM and SIGINT: the first asks the node to end, a second ends it at once."""

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)

NUMBERS = (signal.SIGTERM, signal.SIGINT)
GRACE_S = 1.8
EXIT_AT_ONCE = 130
EXIT_TOO_LATE = 1


class Interrupted(BaseException):
    """A signal came while the main thread did something that cannot be asked to end."""


class Signals:
    """Watches for signals from `__enter__` on; `on_stop` is called on a thread of its own at the first one.

    Python runs its handlers only between two bytecodes of the main thread, which may be deep in a library. The
    thread here is told by the C handler itself, so the second signal, and the end of the grace that follows
    the first, always end the process.
    """

    def __init__(self, on_stop: Callable[[], None], grace_s: float = GRACE_S) -> None:
        self._on_stop = on_stop
        self._grace_s = grace_s
        self._interrupts = False
        self._has_come = False
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)

    def __enter__(self) -> "Signals":
        """Only the main thread may do this."""
        signal.set_wakeup_fd(self._writer.fileno())
        for number in NUMBERS:
            signal.signal(number, self._note)
        threading.Thread(target=self._watch, name="signals", daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        """Nothing is undone: until the process is gone, its end stays bounded in time."""

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """While inside, a signal raises Interrupted in the main thread; so does one that came before."""
        self._interrupts = True
        try:
            if self._has_come:
                raise Interrupted
            yield
        finally:
            self._interrupts = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._has_come = True
        if self._interrupts:
            self._interrupts = False
            raise Interrupted

    def _watch(self) -> None:
        number = self._next(None)
        logger.info("ending", extra={"facts": {"signal": signal.Signals(number).name}})
        self._on_stop()
        try:
            self._next(time.monotonic() + self._grace_s)
        except TimeoutError:
            logger.error("the end took longer than %g s; leaving without it", self._grace_s)
            os._exit(EXIT_TOO_LATE)
        os._exit(EXIT_AT_ONCE)

    def _next(self, until: float | None) -> int:
        """Wait for one of our signals; the descriptor also tells of those that others handle."""
        while True:
            self._reader.settimeout(None if until is None else max(1e-3, until - time.monotonic()))
            number = self._reader.recv(1)[0]
            if number in NUMBERS:
                return number
