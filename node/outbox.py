"""How other threads hand something to a thread that polls sockets."""

import socket
import threading
from typing import Generic, TypeVar

T = TypeVar("T")


class Outbox(Generic[T]):
    """A queue with a file descriptor that is readable while something waits: poll it beside ZeroMQ sockets.

    `put` may be called from any thread, also after `close`; what comes then is dropped, because nobody is
    left to take it.
    """

    def __init__(self) -> None:
        self._items: list[T] = []
        self._lock = threading.Lock()
        self._reader, self._writer = socket.socketpair()

    def fileno(self) -> int:
        return self._reader.fileno()

    def put(self, item: T) -> None:
        with self._lock:
            if self._writer.fileno() == -1:
                return
            self._items.append(item)
            if len(self._items) == 1:
                self._writer.send(b"\0")

    def take(self) -> list[T]:
        """Everything that waits, oldest first."""
        with self._lock:
            items, self._items = self._items, []
            if items:
                self._reader.recv(1)
        return items

    def close(self) -> None:
        with self._lock:
            self._reader.close()
            self._writer.close()
            self._items.clear()
