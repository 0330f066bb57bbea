"""How a command reaches a node: the options that commands share, and the client they make."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..protocol.client import NodeClient
from ..protocol.interface import VideoMemory

_ENDPOINT = re.compile(r"tcp://[^\s/]+:(\d{1,5}|\*)|ipc://\S+")


def _checked_endpoint(endpoint: str | None) -> str | None:
    match = None if endpoint is None else _ENDPOINT.fullmatch(endpoint)
    if endpoint is not None and (match is None or not _is_port(match[1])):
        raise typer.BadParameter(f"an endpoint is tcp://host:port or ipc://path, got {endpoint}")
    return endpoint


def _is_port(port: str | None) -> bool:
    """Whether this is a port, one to be picked, or of an endpoint that has none."""
    return port in (None, "*") or int(port) <= 65535


def _endpoint(*flags: str, help: str) -> typer.models.OptionInfo:
    return typer.Option(*flags, metavar="ENDPOINT", help=help, callback=_checked_endpoint)


AskOption = Annotated[str, _endpoint("--ask", help="The node's ask socket.")]
ControlOption = Annotated[str, _endpoint("--control", help="The node's control socket.")]
TelemetryOption = Annotated[str, _endpoint("--telemetry", help="The node's telemetry socket.")]
FramesOption = Annotated[str, _endpoint("--frames", "--endpoint", help="The node's frames socket.")]
BindOption = Annotated[
    str | None, _endpoint("--bind", help="Listen here, for nodes that connect to their cameras, instead.")
]
ServerKeyOption = Annotated[Path | None, typer.Option("--server-key", help="The node's public key file.")]
ClientKeyOption = Annotated[Path | None, typer.Option("--client-key", help="Your own secret key file.")]
TimeoutOption = Annotated[float, typer.Option("--timeout", metavar="SECONDS", min=0.001, help="How long to wait.")]
StreamOption = Annotated[
    str | None, typer.Option("--stream", "-s", metavar="NAME", help="Which stream; not needed if there is one.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@dataclass(frozen=True, slots=True)
class Keys:
    """The two files of a connection under CURVE."""

    server: Path | None = None
    client: Path | None = None


@contextmanager
def usable_keys() -> Iterator[None]:
    """Turn what is wrong with a key file into a mistake of the command line."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--server-key, --client-key") from error


def open_client(ask: str, control: str, keys: Keys, timeout_s: float) -> NodeClient:
    """Make the client of a command."""
    with usable_keys():
        return NodeClient(ask, control, timeout_s=timeout_s, server_key=keys.server, client_key=keys.client)


def only_stream(node: VideoMemory) -> str:
    """The node's stream, if it has one; otherwise the command line must say which."""
    names = node.stream_names()
    if len(names) == 1:
        return names[0]
    known = f"the node has {', '.join(names)}" if names else "the node has no stream yet"
    raise typer.BadParameter(f"which one? {known}", param_hint="--stream")
