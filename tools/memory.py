"""`onlooker status`, `streams`, `reset`, `mark`, `rollback`, `marks`: a look at a node's memory, and a hand in it."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import msgspec
import typer

from ..protocol.messages import CacheInfo, Mark, StreamStats
from ..protocol.sockets import ASK_ENDPOINT, CONTROL_ENDPOINT
from .connection import (
    ClientKeyOption,
    ControlOption,
    JsonOption,
    Keys,
    ServerKeyOption,
    StreamOption,
    TimeoutOption,
    only_stream,
    open_client,
)
from .quantity import bytes_text, reasons_text, seconds_text

TIMEOUT_S = 5.0

StreamArgument = Annotated[str, typer.Argument(metavar="STREAM")]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Name of the mark.")]


def status(
    is_json: JsonOption = False,
    control: ControlOption = CONTROL_ENDPOINT,
    server_key: ServerKeyOption = None,
    client_key: ClientKeyOption = None,
    timeout_s: TimeoutOption = TIMEOUT_S,
) -> None:
    """Say what a node is and how it does."""
    with open_client(ASK_ENDPOINT, control, Keys(server_key, client_key), timeout_s) as client:
        hello, stats = client.hello(), client.status()
    if is_json:
        _print_json({"hello": hello, "stats": stats})
        return
    typer.echo(f"{hello.node}: {stats.state} for {seconds_text(stats.uptime_s)}, version {hello.version}")
    typer.echo(f"model {hello.model} ({hello.model_type}), {hello.dtype} on {hello.device}")
    typer.echo(f"weights {bytes_text(stats.vram.weights_bytes)}, memory {bytes_text(stats.vram.kv_bytes)}")
    typer.echo(f"streams: {', '.join(hello.streams) or 'none'}")
    if isinstance(hello.notice, str):
        typer.echo(f"note: {hello.notice}")


def streams(
    is_json: JsonOption = False,
    control: ControlOption = CONTROL_ENDPOINT,
    server_key: ServerKeyOption = None,
    client_key: ClientKeyOption = None,
    timeout_s: TimeoutOption = TIMEOUT_S,
) -> None:
    """List the streams of a node and what is remembered of each."""
    with open_client(ASK_ENDPOINT, control, Keys(server_key, client_key), timeout_s) as client:
        found = client.streams()
    if is_json:
        _print_json(found)
        return
    for stats in found:
        typer.echo(_stream_text(stats))
    if not found:
        typer.echo("the node has no stream", err=True)


def reset(
    stream: StreamArgument,
    is_json: JsonOption = False,
    control: ControlOption = CONTROL_ENDPOINT,
    server_key: ServerKeyOption = None,
    client_key: ClientKeyOption = None,
    timeout_s: TimeoutOption = TIMEOUT_S,
) -> None:
    """Forget everything a stream has shown, marks too."""
    with open_client(ASK_ENDPOINT, control, Keys(server_key, client_key), timeout_s) as client:
        cache = client.reset(stream)
    _print(is_json, cache, f"{stream}: {_cache_text(cache)}")


def mark(
    name: NameArgument,
    stream: StreamOption = None,
    is_json: JsonOption = False,
    control: ControlOption = CONTROL_ENDPOINT,
    server_key: ServerKeyOption = None,
    client_key: ClientKeyOption = None,
    timeout_s: TimeoutOption = TIMEOUT_S,
) -> None:
    """Name a stream's memory as it is now.

    A mark of that name that exists already moves here.
    """
    with open_client(ASK_ENDPOINT, control, Keys(server_key, client_key), timeout_s) as client:
        made = client.mark(stream or only_stream(client), name)
    _print(is_json, made, _mark_text(made))


def rollback(
    name: NameArgument,
    stream: StreamOption = None,
    is_json: JsonOption = False,
    control: ControlOption = CONTROL_ENDPOINT,
    server_key: ServerKeyOption = None,
    client_key: ClientKeyOption = None,
    timeout_s: TimeoutOption = TIMEOUT_S,
) -> None:
    """Forget everything a stream has shown since a mark."""
    with open_client(ASK_ENDPOINT, control, Keys(server_key, client_key), timeout_s) as client:
        stream = stream or only_stream(client)
        cache = client.rollback(stream, name)
    _print(is_json, cache, f"{stream}: {_cache_text(cache)}")


def marks(
    stream: StreamOption = None,
    delete: Annotated[str | None, typer.Option(metavar="NAME", help="Delete this mark first.")] = None,
    is_json: JsonOption = False,
    control: ControlOption = CONTROL_ENDPOINT,
    server_key: ServerKeyOption = None,
    client_key: ClientKeyOption = None,
    timeout_s: TimeoutOption = TIMEOUT_S,
) -> None:
    """List the marks of a stream."""
    with open_client(ASK_ENDPOINT, control, Keys(server_key, client_key), timeout_s) as client:
        stream = stream or only_stream(client)
        found = client.delete_mark(stream, delete) if delete else client.marks(stream)
    if is_json:
        _print_json(found.marks)
        return
    for each in found.marks:
        typer.echo(_mark_text(each))
    if not found.marks:
        typer.echo(f"{stream} has no mark", err=True)


def _stream_text(stats: StreamStats) -> str:
    frames = stats.frames
    dropped = reasons_text(frames.dropped)
    return (
        f"{stats.stream}: {stats.state}; {_cache_text(stats.cache)}; received {frames.received} frames, "
        f"encoded {frames.encoded}, pending {frames.pending}, dropped {dropped or 'none'}"
    )


def _cache_text(cache: CacheInfo) -> str:
    used = f"{cache.num_tokens} of {cache.capacity_tokens} tokens ({bytes_text(cache.logical_bytes)})"
    return f"remembers {cache.num_frames} frames in {used}"


def _mark_text(mark: Mark) -> str:
    return f"{mark.name}: {mark.num_frames} frames, {mark.num_tokens} tokens"


def _print(is_json: bool, message: Any, text: str) -> None:
    if is_json:
        _print_json(message)
    else:
        typer.echo(text)


def _print_json(message: Any) -> None:
    sys.stdout.write(msgspec.json.encode(message).decode() + "\n")
