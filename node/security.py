"""CURVE on every socket of a node: who it is, who may connect, and who was turned away.

Bound sockets are CURVE servers whose clients must be listed; sockets that connect to a camera are its CURVE
clients. It fails closed: without the keys, or without the authenticator, nobody gets in.
"""

import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, TypeVar

import zmq
from zmq.auth.thread import ThreadAuthenticator

from ..protocol.curve import DOMAIN, KeyPair, become_client, become_server, load_keypair, load_public
from ..protocol.sockets import HandshakeMonitor
from .config import ConfigError
from .config import Security as SecuritySettings
from .options import StreamOptions
from .tally import Tally

logger = logging.getLogger(__name__)

KEY_FILES = "*.key"

T = TypeVar("T")


class ClientKeys:
    """The public keys that may connect: every *.key file of a folder.

    The folder is read again whenever it has changed, so that a key can be added, or taken away from those who
    connect anew, while the node runs. A folder that cannot be read lets nobody in.
    """

    def __init__(self, folder: Path) -> None:
        """Raises OSError or ValueError, which names the file, if the folder or a key cannot be read."""
        self._folder = folder
        self._version = self._read_version()
        self._keys = self._read_keys()
        self._often = OncePerSecond()

    def __len__(self) -> int:
        return len(self._keys)

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether a client may connect; `key` is Z85. The authenticator calls it, on its thread."""
        self._refresh()
        if key in self._keys:
            return True
        if self._often.allows(key.decode("ascii", "replace")):
            logger.warning(
                "a client was refused: its key %s is not in %s", key.decode("ascii", "replace"), self._folder
            )
        return False

    def _refresh(self) -> None:
        try:
            version = self._read_version()
            if version != self._version:
                self._keys = self._read_keys()
                self._version = version
                logger.info("%d client keys are allowed now", len(self._keys))
        except (OSError, ValueError) as error:
            self._keys = frozenset()
            self._version = ()
            if self._often.allows("unreadable"):
                logger.error("nobody can connect: %s", error)

    def _read_version(self) -> tuple[tuple[str, int, int], ...]:
        """What changes when a key file does."""
        with os.scandir(self._folder) as entries:
            stats = [(entry.name, entry.stat()) for entry in entries]
        return tuple(sorted((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats))

    def _read_keys(self) -> frozenset[bytes]:
        return frozenset(load_public(path) for path in sorted(self._folder.glob(KEY_FILES)))


class Security:
    """Secures the sockets of one ZeroMQ context; does nothing while curve is off."""

    def __init__(self, settings: SecuritySettings, camera_keys: Mapping[str, Path] | None = None) -> None:
        """`camera_keys` are the files of cameras by setting. Raises ConfigError for keys that cannot be read."""
        self._pair: KeyPair | None = None
        self._clients: ClientKeys | None = None
        self._authenticator: ThreadAuthenticator | None = None
        if settings.curve == "off":
            return
        assert settings.server_key is not None and settings.client_keys is not None  # the config's promise
        self._pair = _read("security.server_key", load_keypair, settings.server_key)
        self._clients = _read("security.client_keys", ClientKeys, settings.client_keys)
        for name, path in (camera_keys or {}).items():
            _read(name, load_public, path)
        if not self._clients:
            logger.warning("no client can connect: %s holds no %s files", settings.client_keys, KEY_FILES)

    def start(self, context: zmq.Context) -> None:
        """Start the authenticator; sockets are bound only after this. Raises what keeps it from starting."""
        if self._clients is None:
            return
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.configure_curve_callback(domain=DOMAIN.decode(), credentials_provider=self._clients)
        self._authenticator.start()

    def close(self) -> None:
        if self._authenticator is not None:
            self._authenticator.stop()

    def secure(
        self, socket: zmq.Socket, role: Literal["bind", "connect"], options: StreamOptions | None = None
    ) -> None:
        """Prepare a socket before it is bound, or before it connects to the camera of `options`.

        Raises OSError or ValueError if that camera's key cannot be read.
        """
        if self._pair is None:
            return
        if role == "bind":
            become_server(socket, self._pair, DOMAIN)
        elif options is None or options.camera_key is None:
            raise ValueError("camera_key is needed to connect to a camera")
        else:
            become_client(socket, load_public(Path(options.camera_key)), self._pair)


def _read(key: str, load: Callable[[Path], T], path: Path) -> T:
    try:
        return load(path)
    except (OSError, ValueError) as error:
        raise ConfigError([f"{key}: {error}"]) from error


class RefusedPeers:
    """Counts and logs those whose handshake with a bound socket failed. Lives on the socket's thread."""

    def __init__(self, socket: zmq.Socket, name: str, rejected: Tally) -> None:
        self._monitor = HandshakeMonitor(socket)
        self._name = name
        self._rejected = rejected
        self._often = OncePerSecond()

    @property
    def socket(self) -> zmq.Socket:
        """Readable when somebody came or was refused."""
        return self._monitor.socket

    def note(self) -> None:
        for event in self._monitor.events():
            if event.kind == "refused":
                self._rejected.add("handshake_failed")
                if self._often.allows(event.reason):
                    logger.warning("%s: a peer was refused: %s", self._name, event.reason)

    def close(self) -> None:
        """Before the socket itself is closed."""
        self._monitor.close()


class OncePerSecond:
    """Says the same thing at most once a second."""

    MAX_KEYS = 256

    def __init__(self) -> None:
        self._said: dict[str, float] = {}

    def allows(self, key: str) -> bool:
        now = time.monotonic()
        if now - self._said.get(key, float("-inf")) < 1.0:
            return False
        if len(self._said) >= self.MAX_KEYS:
            self._said = {key: said for key, said in self._said.items() if now - said < 1.0}
        if len(self._said) >= self.MAX_KEYS:
            return False  # a flood of different ones
        self._said[key] = now
        return True
