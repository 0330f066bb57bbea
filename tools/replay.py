"""`onlooker replay`: video files published as if they were cameras.

    onlooker replay gate.mp4 yard.mp4 --rate 4 --lossless

Each file is a stream of its own, named after the file. The times on the frames are the file's, so that a replay
is the same at any rate and on any day.
"""

from __future__ import annotations

import itertools
import re
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import PurePath
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ..protocol.errors import OnlookerError
from ..protocol.sockets import CONTROL_ENDPOINT, FRAMES_ENDPOINT
from .commands import EXIT_INTERRUPTED
from .connection import (
    BindOption,
    ClientKeyOption,
    ControlOption,
    FramesOption,
    JsonOption,
    Keys,
    ServerKeyOption,
    TimeoutOption,
)
from .feed import Clock, Encoding
from .interrupt import ending_on_signal
from .link import LOSSLESS_IN_FLIGHT, Link
from .playback import Playback, PlaybackOptions, Played, open_playbacks
from .quantity import bytes_text, ms_text, reasons_text, seconds_text
from .video import ReaderName, Selection

MAX_SLUG_CHARS = 64
REFRESH_S = 0.1


class LostFramesError(OnlookerError):
    """A lossless replay lost frames."""

    def __init__(self, played: Played) -> None:
        reasons = reasons_text(played.node.dropped if played.node else {})
        super().__init__(f"stream {played.stream} lost frames on the way into the memory: {reasons}")


def replay(
    videos: Annotated[list[str], typer.Argument(metavar="VIDEO...", help="Files, or addresses of files.")],
    stream: Annotated[
        list[str] | None, typer.Option("--stream", "-s", help="Name of the stream, once for each file.")
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
    add: Annotated[bool, typer.Option("--add/--no-add", help="Add streams that the node does not know.")] = True,
    is_json: JsonOption = False,
    frames: FramesOption = FRAMES_ENDPOINT,
    bind: BindOption = None,
    control: ControlOption = CONTROL_ENDPOINT,
    server_key: ServerKeyOption = None,
    client_key: ClientKeyOption = None,
    timeout_s: TimeoutOption = 10.0,
) -> None:
    """Publish video files to a node, as cameras would."""
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
    if stop.is_set():
        raise typer.Exit(EXIT_INTERRUPTED)
    _check(results, is_lossless=lossless)


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


def _play(playbacks: Sequence[Playback], is_quiet: bool) -> list[Played | OnlookerError]:
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
        while wait(futures, timeout=REFRESH_S).not_done:
            _refresh(display, tasks, playbacks)
        for task, playback in zip(tasks, playbacks, strict=True):
            display.update(task, completed=playback.total_s, state=f"{playback.position.num_sent} frames")
    return [_outcome(future) for future in futures]


def _refresh(display: Progress, tasks: Sequence[TaskID], playbacks: Sequence[Playback]) -> None:
    for task, position in zip(tasks, (playback.position for playback in playbacks), strict=True):
        state = f"{position.num_sent} frames, {position.fps:.1f} fps, lag {ms_text(position.lag_s * 1000)}"
        display.update(task, completed=position.played_s, state=state)


def _outcome(future: Future[Played]) -> Played | OnlookerError:
    try:
        return future.result()
    except OnlookerError as error:
        return error


def _report(results: Sequence[Played | OnlookerError], is_json: bool) -> None:
    played = [result for result in results if isinstance(result, Played)]
    if is_json:
        sys.stdout.write(msgspec.json.encode({"streams": played}).decode() + "\n")
        return
    for each in played:
        typer.echo(_played_text(each))


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
        dropped = reasons_text(played.node.dropped) or "none"
        parts.append(f"node: received {played.node.received}, encoded {played.node.encoded}, dropped {dropped}")
    return "; ".join(parts)


def _check(results: Sequence[Played | OnlookerError], is_lossless: bool) -> None:
    """Raise the first error there was, after printing the others; frames that a lossless replay lost are one."""
    errors = [result for result in results if isinstance(result, OnlookerError)]
    played = [result for result in results if isinstance(result, Played)]
    errors += [LostFramesError(each) for each in played if is_lossless and each.node and each.node.num_lost]
    for error in errors[1:]:
        typer.echo(f"onlooker: {error}", err=True)
    if errors:
        raise errors[0]
