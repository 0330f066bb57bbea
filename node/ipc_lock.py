"""Keeps two nodes from taking one ipc endpoint: ZeroMQ lets the second bind steal it without a word."""

import fcntl
import os
from pathlib import Path


class EndpointTaken(OSError):
    """Another process listens at an ipc endpoint."""


class IpcLock:
    """Holds the lock file beside an ipc socket, from `__init__` to `close`.

    The socket's folder is made if need be, with mode 0700. The lock file stays when the node ends: removing it
    could take it from under a node that starts at that moment.
    """

    def __init__(self, endpoint: str) -> None:
        """Raises EndpointTaken, or OSError for a folder that cannot be used."""
        path = Path(endpoint.removeprefix("ipc://"))
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._fd = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._fd)
            raise EndpointTaken(f"another process listens at {endpoint}") from error

    def close(self) -> None:
        os.close(self._fd)
