"""CURVE keys: their files, in the certificate format of the zmq tools, and how a socket takes them."""

import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from zmq.utils import z85

DOMAIN = b"onlooker"

_PUBLIC_TEXT = """\
#   ZeroMQ CURVE Public Certificate
#   Give it to those who are to recognise its owner.

metadata
curve
    public-key = "{public}"
"""
_SECRET_TEXT = """\
#   ZeroMQ CURVE **Secret** Certificate
#   Do not give it to anybody, nor change its permissions.

metadata
curve
    public-key = "{public}"
    secret-key = "{secret}"
"""
_KEY = re.compile(r'^\s*(public|secret)-key\s*=\s*"([^"\n]*)"\s*$', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A public key and, if it is our own, its secret one; 40 characters of Z85 each."""

    public: bytes
    secret: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a socket that connects shows, and whom it expects."""

    server_public: bytes
    pair: KeyPair


def load_credentials(server_key: str | Path | None, client_key: str | Path | None) -> Credentials | None:
    """Read a server's public key and a client's own secret key; None if neither is given.

    Raises OSError, or ValueError for one without the other and for files that are no such keys.
    """
    if server_key is None and client_key is None:
        return None
    if server_key is None or client_key is None:
        raise ValueError("server_key and client_key go together")
    return Credentials(load_public(Path(server_key)), load_keypair(Path(client_key)))


def generate() -> KeyPair:
    """Make a new pair."""
    return KeyPair(*zmq.curve_keypair())


def write_keypair(folder: Path, name: str, pair: KeyPair) -> tuple[Path, Path]:
    """Write `<name>.key` and, for its owner alone, `<name>.key_secret`; return both paths.

    Raises FileExistsError, with nothing written, if either is there.
    """
    if pair.secret is None:
        raise ValueError("a pair without its secret key cannot be written")
    public_path, secret_path = folder / f"{name}.key", folder / f"{name}.key_secret"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    public, secret = pair.public.decode(), pair.secret.decode()
    _write_new(secret_path, 0o600, _SECRET_TEXT.format(public=public, secret=secret))
    try:
        _write_new(public_path, 0o644, _PUBLIC_TEXT.format(public=public))
    except OSError:
        secret_path.unlink()
        raise
    return public_path, secret_path


def _write_new(path: Path, mode: int, text: str) -> None:
    # The mode is given at creation: a file that is narrowed afterwards was open for an instant.
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
        file.write(text)


def load_public(path: Path) -> bytes:
    """Read the public key of a certificate. Raises OSError, or ValueError if there is none."""
    return _parse(path, path.read_text(errors="replace")).public


def load_keypair(path: Path) -> KeyPair:
    """Read a secret certificate.

    Raises OSError, or ValueError if it holds no pair or if others than its owner may read it.
    """
    with path.open(errors="replace") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        if mode & 0o077:
            raise ValueError(f"{path} has mode {mode:04o}: a secret key must be 0600, its owner's alone")
        pair = _parse(path, file.read())
    if pair.secret is None:
        raise ValueError(f"{path} holds no secret key")
    if zmq.curve_public(pair.secret) != pair.public:
        raise ValueError(f"the public and the secret key in {path} are not a pair")
    return pair


def _parse(path: Path, text: str) -> KeyPair:
    keys = {match[1]: _checked_key(path, match[2]) for match in _KEY.finditer(text)}
    if "public" not in keys:
        raise ValueError(f"{path} holds no public key")
    return KeyPair(keys["public"], keys.get("secret"))


def _checked_key(path: Path, text: str) -> bytes:
    key = text.encode()
    if len(key) != 40 or not set(key) <= set(z85.Z85CHARS):
        raise ValueError(f"{path} holds a key that is not 40 characters of Z85")
    return key


def become_server(socket: zmq.Socket, pair: KeyPair, domain: bytes = DOMAIN) -> None:
    """Take only encrypted connections of peers that the ZAP authenticator of `domain` lets in."""
    socket.set(zmq.CURVE_SERVER, 1)
    socket.set(zmq.CURVE_SECRETKEY, _secret_of(pair))
    socket.set(zmq.ZAP_DOMAIN, domain)
    # While the context has no authenticator nobody gets in, whatever the release of libzmq.
    socket.set(zmq.ZAP_ENFORCE_DOMAIN, 1)


def become_client(socket: zmq.Socket, server_public: bytes, pair: KeyPair) -> None:
    """Connect only to the owner of `server_public`, as the owner of `pair`."""
    socket.set(zmq.CURVE_SERVERKEY, server_public)
    socket.set(zmq.CURVE_PUBLICKEY, pair.public)
    socket.set(zmq.CURVE_SECRETKEY, _secret_of(pair))


def _secret_of(pair: KeyPair) -> bytes:
    if pair.secret is None:
        raise ValueError("a socket needs the secret key of its own pair")
    return pair.secret
