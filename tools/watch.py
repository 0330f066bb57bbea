"""`onlooker watch`: what a node says about itself, live in the terminal.

onlooker watch
onlooker watch --once --json
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Annotated, NamedTuple

import msgspec
import typer
from msgspec import UNSET, UnsetType
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..protocol.errors import NoReplyError
from ..protocol.messages import CacheInfo, Event, FrameCounters, NodeStats, StageTimings, StreamStats, Vram
from ..protocol.sockets import TELEMETRY_ENDPOINT
from ..protocol.telemetry import TelemetrySubscriber
from .connection import ClientKeyOption, JsonOption, Keys, NoNodeError, ServerKeyOption, TelemetryOption, check_keys
from .quantity import NS_PER_S, bytes_text, horizon_text, ms_text, reasons_text, seconds_text
from .view import MAX_EVENTS, View

HINT = "Ctrl-C ends it"
REFRESH_S = 0.25
BAR_WIDTH = 40

_STATE_STYLES = {"online": "green", "ready": "green", "full": "yellow", "offline": "red", "stopping": "red"}


def watch(
    once: Annotated[bool, typer.Option("--once", help="Show it once and exit.")] = False,
    is_json: JsonOption = False,
    telemetry: TelemetryOption = TELEMETRY_ENDPOINT,
    server_key: ServerKeyOption = None,
    client_key: ClientKeyOption = None,
    timeout_s: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", min=0.001, help="With --once: how long to wait.")
    ] = 10.0,
) -> None:
    """Watch the memory, VRAM, frames and questions of a node.

    With --json each record is a line of its own, and with --once and --json all is one document.
    """
    if not (once or is_json or sys.stdout.isatty()):
        raise typer.BadParameter("this is not a terminal: add --once or --json")
    check_keys(Keys(server_key, client_key))
    subscriber = TelemetrySubscriber(telemetry, server_key=server_key, client_key=client_key)
    view = View(telemetry)
    with subscriber:
        if once:
            _wait_whole(subscriber, view, timeout_s)
            _print_once(view, is_json)
        else:
            _follow(subscriber, view, is_json)


def _follow(subscriber: TelemetrySubscriber, view: View, is_json: bool) -> None:
    """Watch until Ctrl-C, which is how watching ends and no failure."""
    try:
        if is_json:
            _print_records(subscriber)
        else:
            _show(subscriber, view)
    except KeyboardInterrupt:
        return


def _wait_whole(subscriber: TelemetrySubscriber, view: View, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not view.is_whole:
        message = subscriber.receive(max(0.0, deadline - time.monotonic()))
        if message is None:
            raise (NoNodeError if view.hello is None else NoReplyError)(view.endpoint, timeout_s)
        view.take(message.record, time.monotonic())


def _print_once(view: View, is_json: bool) -> None:
    if is_json:
        typer.echo(msgspec.json.encode(view.facts).decode())
    else:
        Console().print(render(view, time.monotonic()))


def _print_records(subscriber: TelemetrySubscriber) -> None:
    for message in subscriber:
        record = {"topic": message.topic, "seq": message.seq, "record": message.record}
        sys.stdout.write(msgspec.json.encode(record).decode() + "\n")
        sys.stdout.flush()


def _show(subscriber: TelemetrySubscriber, view: View) -> None:
    """Draw what is known several times a second."""
    with Live(screen=True, auto_refresh=False) as live:
        while True:
            live.update(fitted(view, time.monotonic(), live.console), refresh=True)
            _take_for(subscriber, view, REFRESH_S)


def _take_for(subscriber: TelemetrySubscriber, view: View, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while (message := subscriber.receive(max(0.0, deadline - time.monotonic()))) is not None:
        view.take(message.record, time.monotonic())


def render(view: View, now: float) -> RenderableType:
    """Draw all that is known."""
    if view.stats is None:
        return _waiting(view, now)
    return Group(*_parts(view, view.stats, now, FULL))


class Form(NamedTuple):
    """How much is drawn."""

    max_events: int
    is_brief: bool  # device memory in a line
    max_streams: int | None = None
    hint: str = ""


FULL = Form(MAX_EVENTS, is_brief=False)


def fitted(view: View, now: float, console: Console) -> RenderableType:
    """Draw what fits the terminal: questions and the newest events always, then as many streams as there is room."""
    if view.stats is None:
        return Group(_waiting(view, now), Text(HINT, style="dim"))
    forms = [Form(num, is_brief, hint=HINT) for num, is_brief in ((MAX_EVENTS, False), (2, False), (2, True))]
    forms += [forms[-1]._replace(max_streams=num) for num in range(len(view.streams) - 1, -1, -1)]
    drawings = (Group(*_parts(view, view.stats, now, form)) for form in forms)
    fitting = (drawn for drawn in drawings if len(console.render_lines(drawn)) <= console.height)
    return next(fitting, Group(*_parts(view, view.stats, now, forms[-1])))


def _parts(view: View, stats: NodeStats, now: float, form: Form) -> Iterator[RenderableType]:
    shown = list(view.streams.values())[: form.max_streams]
    yield _head(view, stats, now)
    yield _brief_vram(stats) if form.is_brief else _vram(stats)
    yield from map(_stream, shown)
    if num_more := len(view.streams) - len(shown):
        yield Text(
            f"\N{HORIZONTAL ELLIPSIS} and {num_more} more {'stream' if num_more == 1 else 'streams'} (onlooker streams)"
        )
    yield _questions(stats)
    if view.events:
        yield _events(list(view.events)[-form.max_events :])
    if form.hint:
        yield Text(form.hint, style="dim")


def _waiting(view: View, now: float) -> RenderableType:
    if view.is_online(now):
        return Text(f"{view.endpoint}: the node is starting", style="yellow")
    return Text(f"{view.endpoint}: node offline", style="red")


def _head(view: View, stats: NodeStats, now: float) -> RenderableType:
    name = view.hello.node if view.hello else view.endpoint
    line = Text(name, style="bold")
    if view.is_online(now):
        line.append(f"  {stats.state}", style=_STATE_STYLES.get(stats.state, "yellow"))
        line.append(f" for {seconds_text(stats.uptime_s)}")
    else:
        line.append(f"  node offline, silent for {seconds_text(view.silent_s(now))}", style="bold red")
    line.append(f"  {stats.model}")
    if view.hello:
        line.append(f", {view.hello.dtype} on {view.hello.device}")
    if stats.host_rss_bytes is not UNSET:
        line.append(f"  host {bytes_text(stats.host_rss_bytes)}")
    if view.hello and view.hello.notice is not UNSET:
        line.append(f"\n{view.hello.notice}", style="yellow")
    return line


def _vram(stats: NodeStats) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    shares = _vram_shares(stats.vram)
    total = sum(num_bytes for _, num_bytes, _ in shares)
    for name, num_bytes, style in shares:
        bar = _bar(num_bytes / total if total else 0, style)
        table.add_row(name, Text(bytes_text(num_bytes), justify="right"), bar)
    if torch := _torch_text(stats.vram):
        table.add_row("torch", "", torch)
    return Panel(table, title=f"device memory ({stats.vram.device})", title_align="left")


def _brief_vram(stats: NodeStats) -> RenderableType:
    shares = ", ".join(f"{name} {bytes_text(num_bytes)}" for name, num_bytes, _ in _vram_shares(stats.vram))
    return Text(f"device memory ({stats.vram.device}): {shares}")


def _vram_shares(vram: Vram) -> list[tuple[str, int, str]]:
    """Components that are known, their bytes, and how they are drawn."""
    known = [
        ("weights", vram.weights_bytes, "blue"),
        ("keys and values", vram.kv_bytes, "green"),
        ("activations, peak", vram.activations_peak_bytes, "magenta"),
        ("other processes", vram.other_process_bytes, "red"),
        ("free", vram.free_bytes, "white"),
    ]
    return [(name, num_bytes, style) for name, num_bytes, style in known if num_bytes is not UNSET]


def _torch_text(vram: Vram) -> str:
    known = [
        ("allocated", vram.torch_allocated_bytes),
        ("reserved", vram.torch_reserved_bytes),
        ("peak", vram.torch_peak_bytes),
    ]
    return ", ".join(f"{name} {bytes_text(num_bytes)}" for name, num_bytes in known if num_bytes is not UNSET)


def _stream(stats: StreamStats) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_row("memory", _memory(stats.cache, fills=stats.state == "online"))
    table.add_row("frames", _frames_text(stats.frames, stats.fps_received, stats.fps_encoded))
    table.add_row("dropped", _dropped(stats.frames))
    table.add_row("chunks", _chunks_text(stats))
    table.add_row("settings", _settings_text(stats))
    title = Text.assemble(
        (stats.stream, "bold"),
        " ",
        (stats.state, _STATE_STYLES.get(stats.state, "cyan")),
        _size_text(stats),
    )
    return Panel(table, title=title, title_align="left")


def _memory(cache: CacheInfo, fills: bool) -> RenderableType:
    """Draw how full a memory is, and of one that fills, when it will be."""
    share = cache.num_tokens / cache.capacity_tokens if cache.capacity_tokens else 0
    text = f" {share:.0%}  {cache.num_tokens} of {cache.capacity_tokens} tokens\n"
    text += f"{bytes_text(cache.logical_bytes)} of {bytes_text(cache.resident_bytes)}, {cache.num_frames} frames"
    if cache.seconds is not UNSET:
        text += f" of {seconds_text(cache.seconds)}"
    if cache.num_forgotten_frames:
        text += f", {cache.num_forgotten_frames} forgotten"
    if cache.num_dropped_tokens:
        text += f", {cache.num_dropped_tokens} tokens dropped"
    if cache.full:
        text += ", the model's positions are used up" if cache.limit == "positions" else ", full"
    elif fills and cache.seconds_until_full is not UNSET:
        text += f", full in {seconds_text(cache.seconds_until_full)}"
    if horizon := horizon_text(cache):
        text += f"\n{horizon}"
    return _bar(share, "yellow" if cache.full else "green").append(text, style="default")


def _frames_text(frames: FrameCounters, received: float | UnsetType, encoded: float | UnsetType) -> str:
    return (
        f"received {frames.received}{_rate_text(received)}, kept {frames.kept}, "
        f"encoded {frames.encoded}{_rate_text(encoded)}, pending {frames.pending}, padded {frames.padded}"
    )


def _rate_text(fps: float | UnsetType) -> str:
    return "" if fps is UNSET else f" ({fps:.1f} a second)"


def _dropped(frames: FrameCounters) -> Text:
    reasons = reasons_text(frames.dropped) or "none"
    return Text(reasons + (f"; {frames.gaps} never arrived" if frames.gaps else ""))


def _chunks_text(stats: StreamStats) -> str:
    parts = [] if stats.lag_ms is UNSET else [f"lag {ms_text(stats.lag_ms)}"]
    for name in StageTimings.__struct_fields__:
        value = getattr(stats.stages, name)
        if value is not UNSET:
            parts.append(f"{name.removesuffix('_ms')} {ms_text(value)}")
    if stats.load is not UNSET:
        parts.append(f"{stats.load:.0%} of the engine's time")
    if stats.degraded:
        parts.append(f"given up: {', '.join(stats.degraded)}")
    return ", ".join(parts) or "none yet"


def _settings_text(stats: StreamStats) -> str:
    parts = [stats.layout, f"{stats.chunk_frames} a chunk"]
    if stats.last_frames is not UNSET:
        parts.append(f"the last {stats.last_frames} frames at most")
    elif stats.retention is not UNSET:
        parts.append(f"retention {stats.retention}")
    parts += [] if stats.gate is UNSET else [f"gate {stats.gate:g}"]
    parts += [] if stats.drop is UNSET else [f"drop {stats.drop:g}"]
    return ", ".join(parts)


def _size_text(stats: StreamStats) -> str:
    if stats.received_size is UNSET:
        return ""
    received = "{}x{}".format(*stats.received_size)
    return f"  {received}" + ("" if stats.encoded_size is UNSET else " as {}x{}".format(*stats.encoded_size))


def _questions(stats: NodeStats) -> RenderableType:
    questions = stats.questions
    text = f"received {questions.received}, answered {questions.answered}, running {questions.running}, "
    text += f"waiting {questions.waiting}, failed {reasons_text(questions.failed) or 'none'}"
    if questions.mean_first_token_ms is not UNSET:
        text += f"\nfirst token {ms_text(questions.mean_first_token_ms)}"
    if questions.mean_total_ms is not UNSET:
        text += f", whole answer {ms_text(questions.mean_total_ms)} (means)"
    if stats.rejected:
        text += f"\nmessages rejected: {reasons_text(stats.rejected)}"
    body = Text(text)
    body.append(f"\ntraces left: {questions.traces}", style="bold red" if questions.traces else "green")
    return Panel(body, title="questions", title_align="left")


def _events(events: Sequence[Event]) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    for event in reversed(events):
        stream = "" if event.stream is UNSET else event.stream
        clock = time.strftime("%H:%M:%S", time.localtime(event.ts / NS_PER_S))
        table.add_row(clock, stream, Text(event.message))
    return Panel(table, title="events", title_align="left")


def _bar(share: float, style: str) -> Text:
    filled = round(min(1.0, max(0.0, share)) * BAR_WIDTH)
    return Text("█" * filled, style=style).append("░" * (BAR_WIDTH - filled), style="bright_black")
