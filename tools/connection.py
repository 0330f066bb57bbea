"""How a command reaches a node: the options that commands share, and the client they make."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..protocol.client import NodeClient
from ..protocol.codec import check_stream_name
from ..protocol.curve import load_keypair, load_public
from ..protocol.errors import DecodeError, ErrorCode, NodeError, NoReplyError
from ..protocol.interface import VideoMemory
from ..protocol.sockets import ASK_ENDPOINT, CONTROL_ENDPOINT, FRAMES_ENDPOINT, TELEMETRY_ENDPOINT
from .quantity import num_bytes_of, seconds_text

# A node that is alive says so at once, also while its model is being loaded.
PING_TIMEOUT_S = 3.0

_HAS_SECRET = re.compile(r"^\s*secret-key\s*=", re.MULTILINE)
_ENDPOINT = re.compile(r"tcp://[^\s/]+:(\d{1,5}|\*)|ipc://\S+")


def _checked_endpoint(endpoint: str | None) -> str | None:
    match = None if endpoint is None else _ENDPOINT.fullmatch(endpoint)
    if endpoint is not None and (match is None or not _is_port(match[1])):
        raise typer.BadParameter(f"an endpoint is tcp://host:port or ipc://path, got {endpoint}")
    return endpoint


def _is_port(port: str | None) -> bool:
    """Whether this is a port, one to be picked, or of an endpoint that has none."""
    return port in (None, "*") or int(port) <= 65535


def endpoint_option(*flags: str, help: str, default: str | None = None) -> typer.models.OptionInfo:
    """An option for an endpoint. A whole endpoint as its default would be cut off in a narrow terminal."""
    if default is not None:
        help += f" Default: port {default.rpartition(':')[2]} of this machine."
    return typer.Option(*flags, metavar="ENDPOINT", help=help, show_default=False, callback=_checked_endpoint)


def parsed_bytes(text: str) -> int:
    """The bytes of an option such as 512MiB. Raises BadParameter."""
    try:
        return num_bytes_of(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def checked_name(name: str | None) -> str | None:
    """The name of a stream or a mark, as far as one was given. Raises BadParameter for one that cannot be."""
    try:
        return None if name is None else check_stream_name(name)
    except DecodeError as error:
        raise typer.BadParameter(str(error)) from error


def checked_names(names: list[str] | None) -> list[str] | None:
    """As `checked_name`, for an option that is given several times."""
    for name in names or []:
        checked_name(name)
    return names


AskOption = Annotated[str, endpoint_option("--ask", help="The node's ask socket.", default=ASK_ENDPOINT)]
ControlOption = Annotated[
    str, endpoint_option("--control", help="The node's control socket.", default=CONTROL_ENDPOINT)
]
TelemetryOption = Annotated[
    str, endpoint_option("--telemetry", help="The node's telemetry socket.", default=TELEMETRY_ENDPOINT)
]
FramesOption = Annotated[
    str, endpoint_option("--frames", "--endpoint", help="The node's frames socket.", default=FRAMES_ENDPOINT)
]
BindOption = Annotated[
    str | None, endpoint_option("--bind", help="Listen here, for nodes that connect to their cameras, instead.")
]
ServerKeyOption = Annotated[Path | None, typer.Option("--server-key", help="The node's public key file.")]
ClientKeyOption = Annotated[Path | None, typer.Option("--client-key", help="Your own secret key file.")]
TimeoutOption = Annotated[float, typer.Option("--timeout", metavar="SECONDS", min=0.001, help="How long to wait.")]
StreamOption = Annotated[
    str | None,
    typer.Option(
        "--stream", "-s", metavar="NAME", help="Which stream; not needed if there is one.", callback=checked_name
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@dataclass(frozen=True, slots=True)
class Keys:
    """The two files of a connection under CURVE."""

    server: Path | None = None
    client: Path | None = None


class NoNodeError(NoReplyError):
    """Nobody is there: not even a node that is still loading its model."""

    def __init__(self, endpoint: str, timeout_s: float) -> None:
        super().__init__(endpoint, timeout_s)
        self.args = (f"no node answers at {endpoint}; is one running? onlooker node",)


def check_keys(keys: Keys, *, is_server: bool = False) -> None:
    """Raise BadParameter, naming the option, for a key file that cannot be used.

    With `is_server` the peers' public keys may be a folder.
    """
    if keys.server is None and keys.client is None:
        return
    if keys.server is None or keys.client is None:
        missing = "--server-key" if keys.server is None else "--client-key"
        raise typer.BadParameter("--server-key and --client-key go together", param_hint=missing)
    if not (is_server and keys.server.is_dir()):
        _check_key("--server-key", keys.server)
    _check_key("--client-key", keys.client)


def _check_key(option: str, path: Path) -> None:
    """Read a key file. Whether it is secret at all comes before whether it is kept so."""
    try:
        load_public(path)
        if option == "--client-key":
            if not _HAS_SECRET.search(path.read_text(errors="replace")):
                message = f"{path}: this is a public key; your own secret one is wanted, NAME.key_secret"
                raise typer.BadParameter(message, param_hint=option)
            load_keypair(path)
    except OSError as error:
        raise typer.BadParameter(f"{path}: {error.strerror}", param_hint=option) from error
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def open_client(ask: str, control: str, keys: Keys, timeout_s: float) -> NodeClient:
    """Make the client of a command."""
    check_keys(keys)
    return NodeClient(ask, control, timeout_s=timeout_s, server_key=keys.server, client_key=keys.client)


def wait_ready(client: NodeClient, timeout_s: float) -> None:
    """Wait until the node can answer, and say so where that takes a while.

    Raises NoNodeError soon if there is none, and NOT_READY after `timeout_s` if it is only alive.
    """
    ping_s = min(PING_TIMEOUT_S, timeout_s)
    try:
        is_ready = client.ping(timeout_s=ping_s).ready
    except NoReplyError as error:
        raise NoNodeError(error.endpoint, ping_s) from error
    if not is_ready:
        typer.echo("the node is loading its model ...", err=True)
        try:
            client.wait_ready(timeout_s)
        except NodeError as error:
            if error.code != ErrorCode.NOT_READY:
                raise
            message = f"the model is still being loaded after {seconds_text(timeout_s)}; --timeout waits longer"
            raise NodeError(error.code, message) from error


def only_stream(node: VideoMemory) -> str:
    """The node's stream, if it has one; otherwise the command line must say which."""
    names = node.stream_names()
    if len(names) == 1:
        return names[0]
    known = f"the node has {', '.join(names)}" if names else "the node has no stream yet"
    raise typer.BadParameter(f"which one? {known}", param_hint="--stream")
