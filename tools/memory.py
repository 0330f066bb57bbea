"""`onlooker status`, `streams`, `add`, `remove`, `pause`, `resume`, `reset`, `mark`, `rollback`, `marks`.

A look at a node's memory, and a hand in it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
import typer
from msgspec import UNSET

from ..protocol.client import NodeClient
from ..protocol.messages import CacheInfo, Mark, RetentionName, StreamSpec, StreamStats, or_unset
from ..protocol.sockets import ASK_ENDPOINT, CONTROL_ENDPOINT
from .connection import (
    ClientKeyOption,
    ControlOption,
    JsonOption,
    Keys,
    ServerKeyOption,
    StreamOption,
    TimeoutOption,
    checked_name,
    only_stream,
    open_client,
    parsed_bytes,
    wait_ready,
)
from .link import added_text, forecast_text, stats_of
from .quantity import bytes_text, horizon_text, reasons_text, seconds_text

TIMEOUT_S = 60.0

StreamArgument = Annotated[str, typer.Argument(metavar="STREAM", callback=checked_name)]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Name of the mark.", callback=checked_name)]


def of_node(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that lead to a node, and the client of a node that is ready as its first argument."""

    def run(
        *,
        control: ControlOption = CONTROL_ENDPOINT,
        server_key: ServerKeyOption = None,
        client_key: ClientKeyOption = None,
        timeout_s: TimeoutOption = TIMEOUT_S,
        **arguments: Any,
    ) -> None:
        with open_client(ASK_ENDPOINT, control, Keys(server_key, client_key), timeout_s) as client:
            wait_ready(client, timeout_s)
            command(client, **arguments)

    _, *own = inspect.signature(command, eval_str=True).parameters.values()
    *shared, _ = inspect.signature(run, eval_str=True).parameters.values()
    parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in (*own, *shared)]
    # Typer reads a command's options from these.
    run.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run


@of_node
def status(client: NodeClient, is_json: JsonOption = False) -> None:
    """Say what a node is and how it does."""
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


@of_node
def streams(client: NodeClient, is_json: JsonOption = False) -> None:
    """List the streams of a node and what is remembered of each."""
    found = client.streams()
    if is_json:
        _print_json(found)
        return
    for stats in found:
        typer.echo(_stream_text(stats))
    if not found:
        typer.echo("the node has no stream", err=True)


@of_node
def add(
    client: NodeClient,
    stream: StreamArgument,
    memory: Annotated[
        int | None,
        typer.Option(
            metavar="SIZE",
            help="For keys and values, such as 2GiB; without it, what the node's settings say.",
            parser=parsed_bytes,
        ),
    ] = None,
    min_memory: Annotated[
        int | None,
        typer.Option(
            metavar="SIZE",
            help="The least that will do where others need the rest; without it, what the node's settings say.",
            parser=parsed_bytes,
        ),
    ] = None,
    fps: Annotated[
        float | None, typer.Option(min=0.001, help="Frames a second to keep; without it, what the node's settings say.")
    ] = None,
    retention: Annotated[
        RetentionName | None, typer.Option(help="What a full memory does; without it, what the node's settings say.")
    ] = None,
    gate: Annotated[
        float | None,
        typer.Option(min=0, max=255, help="Leave out frames that changed by less, in grey levels; 0 leaves out none."),
    ] = None,
    drop: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Leave out tokens more similar to the last ones kept; 1 leaves out none."),
    ] = None,
    last_frames: Annotated[
        int | None,
        typer.Option(min=0, help="Hold only the newest frames, so many, encoded anew with each chunk; 0: all."),
    ] = None,
    degrade: Annotated[
        bool | None,
        typer.Option("--degrade/--no-degrade", help="Give up quality while there is too little time or memory."),
    ] = None,
    is_json: JsonOption = False,
) -> None:
    """Add a stream to a node, which reserves its memory.

    What that will hold is foretold.
    """
    spec = StreamSpec(
        stream=stream,
        memory_bytes=or_unset(memory),
        min_memory_bytes=or_unset(min_memory),
        fps=or_unset(fps),
        retention=or_unset(retention),
        gate=or_unset(gate),
        drop=or_unset(drop),
        last_frames=or_unset(last_frames),
        degrade=or_unset(degrade),
    )
    added = client.add_stream(spec)
    if is_json:
        _print_json(msgspec.to_builtins(stats_of(client, stream)) | msgspec.to_builtins(added))
        return
    typer.echo(added_text(spec, added))
    if added.forecast is not UNSET:
        typer.echo(forecast_text(added.forecast))


@of_node
def remove(client: NodeClient, stream: StreamArgument) -> None:
    """Remove a stream from a node, with all that is remembered of it."""
    client.remove_stream(stream)
    typer.echo(f"{stream}: removed, and its memory is free")


@of_node
def pause(client: NodeClient, stream: StreamArgument) -> None:
    """Drop a stream's frames until it is resumed; what is remembered stays."""
    client.pause_stream(stream)
    typer.echo(f"{stream}: paused")


@of_node
def resume(client: NodeClient, stream: StreamArgument) -> None:
    """Take in the frames of a paused stream again."""
    client.resume_stream(stream)
    typer.echo(f"{stream}: resumed")


@of_node
def reset(client: NodeClient, stream: StreamArgument, is_json: JsonOption = False) -> None:
    """Forget everything a stream has shown, marks too."""
    cache = client.reset(stream)
    _print(is_json, cache, f"{stream}: {_cache_text(cache)}")


@of_node
def mark(client: NodeClient, name: NameArgument, stream: StreamOption = None, is_json: JsonOption = False) -> None:
    """Name a stream's memory as it is now.

    A mark of that name that exists already moves here.
    """
    made = client.mark(stream or only_stream(client), name)
    _print(is_json, made, _mark_text(made))


@of_node
def rollback(client: NodeClient, name: NameArgument, stream: StreamOption = None, is_json: JsonOption = False) -> None:
    """Forget everything a stream has shown since a mark."""
    stream = stream or only_stream(client)
    cache = client.rollback(stream, name)
    _print(is_json, cache, f"{stream}: {_cache_text(cache)}")


@of_node
def marks(
    client: NodeClient,
    stream: StreamOption = None,
    delete: Annotated[
        str | None, typer.Option(metavar="NAME", help="Delete this mark first.", callback=checked_name)
    ] = None,
    is_json: JsonOption = False,
) -> None:
    """List the marks of a stream."""
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
    last = "" if stats.last_frames is UNSET else f", the last {stats.last_frames} frames at most"
    given_up = f"; given up: {', '.join(stats.degraded)}" if stats.degraded else ""
    return (
        f"{stats.stream}: {stats.state}; {_cache_text(stats.cache)}{last}; received {frames.received} frames, "
        f"encoded {frames.encoded}, pending {frames.pending}, dropped {dropped or 'none'}{given_up}"
    )


def _cache_text(cache: CacheInfo) -> str:
    used = f"{cache.num_tokens} of {cache.capacity_tokens} tokens ({bytes_text(cache.logical_bytes)})"
    dropped = f", {cache.num_dropped_tokens} tokens dropped" if cache.num_dropped_tokens else ""
    horizon = horizon_text(cache)
    return f"remembers {cache.num_frames} frames in {used}{dropped}" + (f", {horizon}" if horizon else "")


def _mark_text(mark: Mark) -> str:
    return f"{mark.name}: {mark.num_frames} frames, {mark.num_tokens} tokens"


def _print(is_json: bool, message: Any, text: str) -> None:
    if is_json:
        _print_json(message)
    else:
        typer.echo(text)


def _print_json(message: Any) -> None:
    sys.stdout.write(msgspec.json.encode(message).decode() + "\n")
