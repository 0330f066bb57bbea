"""`onlooker web`: a node in the browser.

    onlooker web

A client of the node like any other. Where no node answers, it starts one with the built-in model.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import tempfile
import webbrowser
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..protocol.client import NodeClient
from ..protocol.errors import NoReplyError
from ..protocol.sockets import ASK_ENDPOINT, CONTROL_ENDPOINT, FRAMES_ENDPOINT, TELEMETRY_ENDPOINT
from ..protocol.telemetry import TelemetrySubscriber
from .commands import EXIT_FAILED
from .connection import (
    AskOption,
    ClientKeyOption,
    ControlOption,
    FramesOption,
    Keys,
    ServerKeyOption,
    TelemetryOption,
    open_client,
)
from .link import LOSSLESS_IN_FLIGHT, Link
from .own_node import OwnNode, why_not
from .web_session import CONTROL_TIMEOUT_S, Session
from .web_source import Sources

LOOK_TIMEOUT_S = 1.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")

_MODULES = ("gradio", "cv2", "av")


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where the node's four sockets are."""

    frames: str
    ask: str
    control: str
    telemetry: str

    @property
    def by_name(self) -> dict[str, str]:
        return {name: getattr(self, name) for name in self.__slots__}


def web(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the page; 0 takes a free one.")] = 7860,
    host: Annotated[str, typer.Option(help="Address to serve the page at.")] = "127.0.0.1",
    is_insecure: Annotated[
        bool, typer.Option("--insecure", help="Serve beyond this machine, to anybody who can reach it.")
    ] = False,
    opens: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    starts_node: Annotated[
        bool, typer.Option("--start-node/--no-start-node", help="Start a node where none answers.")
    ] = True,
    frames: FramesOption = FRAMES_ENDPOINT,
    ask: AskOption = ASK_ENDPOINT,
    control: ControlOption = CONTROL_ENDPOINT,
    telemetry: TelemetryOption = TELEMETRY_ENDPOINT,
    server_key: ServerKeyOption = None,
    client_key: ClientKeyOption = None,
) -> None:
    """Watch, feed and ask a node in the browser."""
    _require_page()
    if host not in LOOPBACK and not is_insecure:
        raise typer.BadParameter("who can reach the page can steer the node: say --insecure too", param_hint="--host")
    # SIGTERM ends it as Ctrl-C does, and takes the node along.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    endpoints = Endpoints(frames, ask, control, telemetry)
    try:
        with ExitStack() as stack:
            _serve(stack, endpoints, Keys(server_key, client_key), (host, port), opens, starts_node)
    except KeyboardInterrupt:
        return  # which is how it ends, and no failure


def _require_page() -> None:
    """Exit with a word on what to install, if something the page needs is missing."""
    missing = [module for module in _MODULES if importlib.util.find_spec(module) is None]
    if missing:
        install = "pip install 'onlooker[web]'"
        typer.echo(f"onlooker: the page needs {', '.join(missing)}; install it with: {install}", err=True)
        raise typer.Exit(EXIT_FAILED)


def _serve(
    stack: ExitStack, endpoints: Endpoints, keys: Keys, place: tuple[str, int], opens: bool, starts_node: bool
) -> None:
    """Serve the page at `place`, host and port, until a signal."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="onlooker-web-")))
    client = stack.enter_context(open_client(endpoints.ask, endpoints.control, keys, CONTROL_TIMEOUT_S))
    own_node, no_node = _provide_node(client, endpoints, folder, is_wanted=starts_node and keys == Keys())
    if own_node is not None:
        stack.enter_context(own_node)
    # Gradio's own settings: what was uploaded goes when the page goes, and nothing is told to anybody.
    os.environ |= {"GRADIO_TEMP_DIR": str(folder / "uploads"), "GRADIO_ANALYTICS_ENABLED": "False"}
    from .web_page import Desk, Page
    from .web_server import PageServer

    subscribe = partial(TelemetrySubscriber, endpoints.telemetry, server_key=keys.server, client_key=keys.client)
    session = stack.enter_context(Session(client, subscribe, endpoints.telemetry))
    link = Link(endpoints.frames, control=endpoints.control, keys=keys, max_in_flight=LOSSLESS_IN_FLIGHT)
    sources = Sources(client, link)
    stack.callback(sources.close)
    desk = Desk(session, sources, folder, endpoints.control, own_node, no_node)
    try:
        server = PageServer(Page(desk).build(), sources.pictures, *place)
    except OSError as error:
        typer.echo(f"onlooker: {place[0]} port {place[1]}: {error.strerror}; --port 0 takes a free one", err=True)
        raise typer.Exit(EXIT_FAILED) from error
    if place[0] not in LOOPBACK:
        typer.echo("the page is open to anybody who can reach it, and with it the node", err=True)
    typer.echo(f"The page is at {server.address} (Ctrl-C ends it)")
    if opens:
        webbrowser.open(server.address)
    server.run()


def _provide_node(
    client: NodeClient, endpoints: Endpoints, folder: Path, *, is_wanted: bool
) -> tuple[OwnNode | None, str]:
    """A node to start, if none answers and one can run here; or why there is none, in words."""
    try:
        client.ping(timeout_s=LOOK_TIMEOUT_S)
    except NoReplyError:
        typer.echo(f"no node answers at {endpoints.control}", err=True)
    else:
        return None, ""
    reason = why_not(endpoints.by_name) if is_wanted else None
    if reason or not is_wanted:
        return None, reason or ""
    typer.echo("starting a node with the built-in model", err=True)
    return OwnNode(endpoints.by_name, folder), ""
