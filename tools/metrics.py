"""`onlooker metrics`: what a node says about itself, for Prometheus.

    onlooker metrics --listen 127.0.0.1:9562
    onlooker metrics --dashboard > onlooker.json

`/metrics` has the figures, `/livez` answers as long as this process does, and `/readyz` says whether the node would
answer a question: its telemetry is fresh, its model loaded, and its engine comes round.
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from socketserver import TCPServer, ThreadingMixIn
from typing import Annotated, Any, NamedTuple
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import typer
from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.process_collector import ProcessCollector

from ..protocol.errors import OnlookerError
from ..protocol.sockets import TELEMETRY_ENDPOINT
from ..protocol.telemetry import TelemetrySubscriber
from .connection import ClientKeyOption, Keys, ServerKeyOption, TelemetryOption, check_keys
from .dashboard import dashboard_json
from .exporter import Exporter
from .interrupt import ending_on_signal
from .rules import rules_yaml

LISTEN = "127.0.0.1:9562"
FOLLOW_S = 0.5
# A client that is silent for longer in the middle of its request is let go.
REQUEST_TIMEOUT_S = 10.0

_ADDRESS = re.compile(r"(?:(?P<host>[^\s:\[\]]+)|\[(?P<host6>[0-9A-Fa-f:.]+)\]):(?P<port>[0-9]{1,5})")

StartResponse = Callable[[str, list[tuple[str, str]]], Any]
App = Callable[[dict[str, Any], StartResponse], Iterable[bytes]]


class Address(NamedTuple):
    """Where to listen."""

    host: str
    port: int


class ListenError(OnlookerError):
    """The address cannot be had."""


def _checked_address(text: str) -> str:
    parse_address(text)
    return text


def parse_address(text: str) -> Address:
    """Read `host:port` or `[host]:port`. Raises BadParameter."""
    match = _ADDRESS.fullmatch(text)
    if match is None or int(match["port"]) > 65535:
        raise typer.BadParameter(f"an address is host:port, got {text}")
    return Address(match["host"] or match["host6"], int(match["port"]))


def metrics(
    listen: Annotated[
        str, typer.Option("--listen", metavar="HOST:PORT", help="Where Prometheus asks.", callback=_checked_address)
    ] = LISTEN,
    telemetry: TelemetryOption = TELEMETRY_ENDPOINT,
    server_key: ServerKeyOption = None,
    client_key: ClientKeyOption = None,
    is_dashboard: Annotated[bool, typer.Option("--dashboard", help="Print the Grafana dashboard and exit.")] = False,
    is_rules: Annotated[bool, typer.Option("--rules", help="Print the alerting rules and exit.")] = False,
) -> None:
    """Export the figures of a node to Prometheus, with /livez and /readyz."""
    if is_dashboard or is_rules:
        typer.echo(dashboard_json() if is_dashboard else rules_yaml(), nl=False)
        return
    check_keys(Keys(server_key, client_key))
    stop = threading.Event()
    with (
        TelemetrySubscriber(telemetry, server_key=server_key, client_key=client_key) as subscriber,
        serving(exporter := Exporter(subscriber, telemetry), parse_address(listen)) as url,
        ending_on_signal(stop),
    ):
        typer.echo(f"{url}/metrics of {telemetry}", err=True)
        while not stop.is_set():
            exporter.follow(FOLLOW_S)


@contextmanager
def serving(exporter: Exporter, address: Address) -> Iterator[str]:
    """Answer over HTTP on threads of its own for the time of a `with`; the value is the URL. Raises ListenError."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    server_class = type("_Server", (_Server,), {"address_family": family})
    try:
        server = make_server(address.host, address.port, _app(exporter), server_class, _RequestHandler)
    except OSError as error:
        raise ListenError(f"cannot listen at {address.host}:{address.port}: {error.strerror}") from error
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, name="http", daemon=True)
    thread.start()
    host = f"[{address.host}]" if ":" in address.host else address.host
    try:
        yield f"http://{host}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False  # a client that is slow must not hold up the end

    def server_bind(self) -> None:
        """Without the look-up of this host's own name, which can take long."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()


class _RequestHandler(WSGIRequestHandler):
    timeout = REQUEST_TIMEOUT_S

    def log_message(self, format: str, *args: Any) -> None:
        """A line for each scrape tells nobody anything."""


def _app(exporter: Exporter) -> App:
    """The pages, by path."""
    registry = CollectorRegistry()
    registry.register(exporter)
    ProcessCollector(registry=registry)
    pages: dict[str, App] = {
        "/metrics": make_wsgi_app(registry),
        "/livez": lambda environ, start: _say(start, "200 OK", "alive"),
        "/readyz": lambda environ, start: _say_ready(start, exporter),
    }

    def app(environ: dict[str, Any], start: StartResponse) -> Iterable[bytes]:
        page = pages.get(environ["PATH_INFO"])
        if page is None:
            return _say(start, "404 Not Found", "there are " + ", ".join(pages))
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return _say(start, "405 Method Not Allowed", "GET it")
        return page(environ, start)

    return app


def _say_ready(start: StartResponse, exporter: Exporter) -> Iterable[bytes]:
    readiness = exporter.readiness
    return _say(start, "200 OK" if readiness.is_ready else "503 Service Unavailable", readiness.reason)


def _say(start: StartResponse, status: str, text: str) -> Iterable[bytes]:
    start(status, [("Content-Type", "text/plain; charset=utf-8")])
    return [f"{text}\n".encode()]
