"""`onlooker replay`: video files published as if they were cameras, or a session of `onlooker record` repeated.

    onlooker replay gate.mp4 yard.mp4 --rate 4 --lossless
    onlooker replay session.mcap --reset

Each file is a stream of its own, named after the file. The times on the frames are the file's, so that a replay
is the same at any rate and on any day.

Of a session the same frames are sent and the same questions asked again: the exit status is 1 if an answer is
another one.
"""

from __future__ import annotations

import itertools
import re
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ..protocol.errors import OnlookerError
from ..protocol.sockets import ASK_ENDPOINT, CONTROL_ENDPOINT, FRAMES_ENDPOINT
from .commands import EXIT_INTERRUPTED
from .connection import (
    AskOption,
    BindOption,
    ClientKeyOption,
    ControlOption,
    FramesOption,
    JsonOption,
    Keys,
    ServerKeyOption,
    TimeoutOption,
    checked_names,
)
from .feed import Clock, Encoding
from .interrupt import ending_on_signal
from .link import LOSSLESS_IN_FLIGHT, Link
from .playback import Arrivals, Playback, PlaybackOptions, Played, Position, open_playbacks
from .quantity import bytes_text, ms_text, reasons_text, seconds_text
from .session import Way, replay_session
from .video import ReaderName, Selection

MAX_SLUG_CHARS = 64
REFRESH_S = 0.1
PROBE_S = 1.0
SESSION_SUFFIX = ".mcap"
# What can be said of a session too.
SESSION_PARAMETERS = frozenset(
    {"videos", "rate", "reset", "is_json", "frames", "ask", "control", "server_key", "client_key", "timeout_s"}
)


class LostFramesError(OnlookerError):
    """A replay lost all its frames, or a lossless one some."""

    def __init__(self, stream: str, lost: dict[str, int]) -> None:
        message = f"stream {stream} lost frames on the way into the memory: {reasons_text(lost)}"
        if "memory_full" in lost:
            message += (
                f"; make room with `onlooker reset {stream}`, or give it a larger memory_bytes if positions are left"
            )
        super().__init__(message)


class UnheardError(OnlookerError):
    """Frames were sent to nobody."""

    def __init__(self, stream: str, position: Position) -> None:
        num, num_sent = position.num_unheard, position.num_sent
        super().__init__(f"stream {stream}: no node listened to {num} of the {num_sent} frames")


@dataclass(frozen=True, slots=True)
class Result:
    """What was played of a file, as far as it was, and why no further."""

    played: Played | None
    error: OnlookerError | None = None


def replay(
    context: typer.Context,
    videos: Annotated[
        list[str], typer.Argument(metavar="VIDEO...", help="Files, or addresses of files; or one session.mcap.")
    ],
    stream: Annotated[
        list[str] | None,
        typer.Option("--stream", "-s", help="Name of the stream, once for each file.", callback=checked_names),
    ] = None,
    rate: Annotated[float, typer.Option(help="Times as fast as filmed; 0: as fast as possible.")] = 1.0,
    loop: Annotated[bool, typer.Option("--loop", help="Play again and again.")] = False,
    loops: Annotated[int, typer.Option(min=1, help="Play so many times.")] = 1,
    start_offset: Annotated[float, typer.Option(metavar="SECONDS", help="Begin here.")] = 0.0,
    duration: Annotated[float | None, typer.Option(metavar="SECONDS", help="Play so much of it.")] = None,
    stride: Annotated[int, typer.Option(help="Send every n-th picture.")] = 1,
    fps: Annotated[float | None, typer.Option(help="Send at most so many pictures a second of the file.")] = None,
    reader: Annotated[ReaderName, typer.Option(help="av is exact; cv2 is OpenCV.")] = "auto",
    encoding: Annotated[Encoding, typer.Option(help="How pictures go over the wire.")] = "jpeg",
    jpeg_quality: Annotated[int, typer.Option(min=1, max=100)] = 90,
    clock: Annotated[Clock, typer.Option(help="Times on the frames: the file's, or now.")] = "media",
    wait_subscribers: Annotated[int, typer.Option(min=0, metavar="N", help="Begin when so many nodes listen.")] = 1,
    lossless: Annotated[bool, typer.Option("--lossless", help="Wait for the node; lose no frame.")] = False,
    in_flight: Annotated[
        int, typer.Option(min=9, help="With --lossless: frames on their way at most; below the node's ring_frames.")
    ] = LOSSLESS_IN_FLIGHT,
    reset: Annotated[
        bool, typer.Option("--reset", help="Of a session: forget first what its streams remember.")
    ] = False,
    add: Annotated[bool, typer.Option("--add/--no-add", help="Add streams that the node does not know.")] = True,
    is_json: JsonOption = False,
    frames: FramesOption = FRAMES_ENDPOINT,
    bind: BindOption = None,
    ask: AskOption = ASK_ENDPOINT,
    control: ControlOption = CONTROL_ENDPOINT,
    server_key: ServerKeyOption = None,
    client_key: ClientKeyOption = None,
    timeout_s: TimeoutOption = 10.0,
) -> None:
    """Publish video files to a node, as cameras would, or repeat a recorded session."""
    if any(video.endswith(SESSION_SUFFIX) for video in videos):
        _check_session_flags(context, videos)
        way = Way(frames, ask, control, Keys(server_key, client_key), timeout_s)
        replay_session(Path(videos[0]), way, rate=rate, resets=reset, is_json=is_json)
        return
    if reset:
        raise typer.BadParameter("it is for a session; for a stream: onlooker reset", param_hint="--reset")
    names = stream_names(videos, stream or [])
    if bind and len(videos) > 1:
        raise typer.BadParameter("there can be one video only", param_hint="--bind")
    try:
        options = PlaybackOptions(
            selection=Selection(start_offset, duration, stride, fps),
            reader=reader,
            rate=rate,
            num_loops=0 if loop else loops,
            clock=clock,
            encoding=encoding,
            jpeg_quality=jpeg_quality,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    link = Link(
        frames=bind or frames,
        is_bound=bind is not None,
        control=control,
        keys=Keys(server_key, client_key),
        timeout_s=timeout_s,
        num_subscribers=wait_subscribers,
        max_in_flight=in_flight if lossless else None,
        adds_streams=add,
    )
    stop = threading.Event()
    sources = dict(zip(names, videos, strict=True))
    with open_playbacks(sources, options, link, stop) as playbacks, ending_on_signal(stop):
        results = _play(playbacks, is_quiet=is_json)
    _report(results, is_json)
    errors = _errors(results, is_lossless=lossless)
    for error in errors if stop.is_set() else errors[1:]:
        typer.echo(f"onlooker: {error}", err=True)
    if stop.is_set():
        raise typer.Exit(EXIT_INTERRUPTED)
    if errors:
        raise errors[0]


def _check_session_flags(context: typer.Context, videos: Sequence[str]) -> None:
    """Raise BadParameter for what is said of videos, or of a second session."""
    if len(videos) > 1:
        raise typer.BadParameter("a session is replayed by itself", param_hint="VIDEO...")
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name not in SESSION_PARAMETERS and source is not None and source.name == "COMMANDLINE":
            message = "a session has frames of its own: this is for videos"
            raise typer.BadParameter(message, param_hint=parameter.opts[0])


def stream_names(videos: Sequence[str], given: Sequence[str]) -> list[str]:
    """A stream for each video: as given, or after the file's name. Raises BadParameter."""
    if given and len(given) != len(videos):
        message = f"there are {len(videos)} videos and {len(given)} names"
        raise typer.BadParameter(message, param_hint="--stream")
    if len(set(given)) < len(given):
        raise typer.BadParameter("two videos cannot be one stream", param_hint="--stream")
    return list(given) or _distinct([stream_slug(video) for video in videos])


def stream_slug(video: str) -> str:
    """The name of a file, with what a stream's name cannot hold replaced."""
    stem = PurePath(video.partition("?")[0] if "://" in video else video).stem
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.")[:MAX_SLUG_CHARS] or "video"


def _distinct(names: Sequence[str]) -> list[str]:
    distinct: list[str] = []
    for name in names:
        numbered = (name if n == 1 else f"{name}-{n}" for n in itertools.count(1))
        distinct.append(next(candidate for candidate in numbered if candidate not in distinct))
    return distinct


def _play(playbacks: Sequence[Playback], is_quiet: bool) -> list[Result]:
    """Play all at the same time; one that fails does not end the others."""
    console = Console(stderr=True)
    display = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
        console=console,
        disable=is_quiet or not console.is_terminal,
    )
    with display, ThreadPoolExecutor(len(playbacks)) as threads:
        futures = [threads.submit(playback.run) for playback in playbacks]
        tasks = [display.add_task(playback.stream, total=playback.total_s, state="") for playback in playbacks]
        probed = time.monotonic()
        while wait(futures, timeout=REFRESH_S).not_done:
            _refresh(display, tasks, playbacks)
            if not display.disable and time.monotonic() - probed > PROBE_S:
                for playback in playbacks:
                    playback.probe()
                probed = time.monotonic()
        for task, playback in zip(tasks, playbacks, strict=True):
            played_s = playback.position.played_s if playback.trouble else playback.total_s
            display.update(
                task, completed=played_s, state=_state_text(playback, f"{playback.position.num_sent} frames")
            )
    return [_result(playback, future) for playback, future in zip(playbacks, futures, strict=True)]


def _refresh(display: Progress, tasks: Sequence[TaskID], playbacks: Sequence[Playback]) -> None:
    for task, playback in zip(tasks, playbacks, strict=True):
        position = playback.position
        figures = f"{position.num_sent} frames, {position.fps:.1f} fps, lag {ms_text(position.lag_s * 1000)}"
        display.update(task, completed=position.played_s, state=_state_text(playback, figures))


def _state_text(playback: Playback, figures: str) -> str:
    return f"{figures}, {playback.trouble}" if playback.trouble else figures


def _result(playback: Playback, future: Future[Played]) -> Result:
    position = playback.position
    try:
        played = future.result()
    except OnlookerError as error:
        seconds = time.monotonic() - position.started
        return Result(playback.played(seconds) if position.num_sent else None, error)
    return Result(played, UnheardError(playback.stream, position) if position.num_unheard else None)


def _report(results: Sequence[Result], is_json: bool) -> None:
    if is_json:
        whole = [result.played for result in results if not _has_failed(result)]
        sys.stdout.write(msgspec.json.encode({"streams": whole}).decode() + "\n")
        return
    for result in results:
        if result.played:
            typer.echo(_played_text(result.played))


def _has_failed(result: Result) -> bool:
    return result.error is not None and not isinstance(result.error, UnheardError)


def _played_text(played: Played) -> str:
    parts = [
        f"{played.stream}: {played.sent} frames ({bytes_text(played.sent_bytes)}) in {seconds_text(played.seconds)}",
        f"{played.fps:.1f} fps",
    ]
    if played.max_lag_ms:
        parts.append(f"largest lag {ms_text(played.max_lag_ms)}")
    if played.broken:
        parts.append(f"{played.broken} broken pieces of the file left out")
    if played.node:
        parts.append(_arrivals_text(played.node, played.sent))
    return "; ".join(parts)


def _arrivals_text(node: Arrivals, num_sent: int) -> str:
    num_under_way = num_sent - node.received - node.gaps
    parts = [f"received {node.received}", f"encoded {node.encoded}"]
    parts += [f"pending {node.pending}"] if node.pending else []
    parts.append(f"dropped {reasons_text(node.dropped) or 'none'}")
    parts += [f"{node.gaps} never arrived"] if node.gaps else []
    parts += [f"{num_under_way} still on their way"] if num_under_way > 0 else []
    is_over = node.pending == 0 and num_under_way <= 0
    return ("node: " if is_over else "node so far: ") + ", ".join(parts)


def _errors(results: Sequence[Result], is_lossless: bool) -> list[OnlookerError]:
    """What went wrong; frames that a lossless replay lost are that too, and any replay of which nothing is left."""
    errors = [result.error for result in results if result.error]
    nodes = [(each.stream, each.node) for each in (result.played for result in results) if each and each.node]
    lost = [(stream, node.lost) for stream, node in nodes if node.is_all_lost or (is_lossless and node.lost)]
    return errors + [LostFramesError(stream, reasons) for stream, reasons in lost]
