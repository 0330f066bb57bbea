"""What the service manager is told: that the node is ready, that it is alive, and that it ends.

The protocol of systemd's sd_notify(3), which others speak too: a datagram to the socket that `NOTIFY_SOCKET` names.
"""

import logging
import os
import socket
from collections.abc import Mapping

from ..protocol.messages import Pong

logger = logging.getLogger(__name__)


class Service:
    """The service manager that started this process. Without one, nothing is sent.

    A manager that does not listen is logged once, and never a reason to end.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._address = _address(environment.get("NOTIFY_SOCKET", ""))
        self._is_watched = _is_watched(environment)
        self._is_well = True
        self._has_failed = False

    def loading(self, model: str) -> None:
        """Say what takes so long."""
        self._send("STATUS=loading " + " ".join(model.split()))

    def ready(self) -> None:
        self._send("READY=1\nSTATUS=ready")

    def observe(self, pong: Pong) -> None:
        """Put off the moment at which the process is taken for stuck, if the engine came round lately."""
        if pong.ready and self._is_watched:
            self._send("WATCHDOG=1")
        if pong.ready != self._is_well:
            self._is_well = pong.ready
            age_s = pong.engine_progress_age_ms / 1e3
            self._send("STATUS=ready" if pong.ready else f"STATUS=the engine has not come round for {age_s:.0f} s")

    def stopping(self) -> None:
        self._send("STOPPING=1\nSTATUS=ending")

    def _send(self, state: str) -> None:
        if self._address is None:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.setblocking(False)
                sender.sendto(state.encode(), self._address)
        except OSError as error:
            if not self._has_failed:
                logger.warning("the service manager cannot be told %s: %s", state.partition("\n")[0], error)
            self._has_failed = True
        else:
            self._has_failed = False


def _address(name: str) -> str | None:
    """The address of a socket in the file system or, beginning with @, of an abstract one."""
    if not name:
        return None
    if name[0] not in "/@":
        logger.warning("NOTIFY_SOCKET is neither a path nor an abstract socket: %s", name)
        return None
    return "\0" + name[1:] if name[0] == "@" else name


def _is_watched(environment: Mapping[str, str]) -> bool:
    """Whether the manager acts when this process is silent."""
    is_ours = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    return is_ours and environment.get("WATCHDOG_USEC", "0") != "0"
