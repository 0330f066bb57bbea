"""`onlooker camera`: a webcam or a network camera, published to a node.

    onlooker camera 0 --stream desk
    onlooker camera rtsp://192.168.1.20/stream1 --stream gate --fps 5

A source that drops is opened again, after a pause that grows. The time on a frame is when its picture was grabbed.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import msgspec
import typer
from rich.console import Console

from ..protocol.sockets import CONTROL_ENDPOINT, FRAMES_ENDPOINT
from .connection import (
    BindOption,
    ClientKeyOption,
    ControlOption,
    FramesOption,
    JsonOption,
    Keys,
    ServerKeyOption,
    TimeoutOption,
    checked_name,
)
from .feed import Encoding, Feed, Stamp
from .interrupt import ending_on_signal
from .link import Link
from .quantity import bytes_text, seconds_text
from .video import NS_PER_S, Cv2Video, ReaderName, Video, VideoError, open_video

if TYPE_CHECKING:
    import numpy as np

FIRST_PAUSE_S = 0.5
MAX_PAUSE_S = 10.0
REPORT_S = 1.0


class Shot(NamedTuple):
    """A picture, and when it was grabbed."""

    pixels: np.ndarray  # uint8, RGB, (height, width, 3)
    captured_ns: int


@dataclass(eq=False)
class Camera:
    """A live source that is opened again whenever it drops, until `stop` is set."""

    open: Callable[[], Video]
    stop: threading.Event
    say: Callable[[str], None]
    fps: float | None = None  # pictures a second to take at most
    first_pause_s: float = FIRST_PAUSE_S
    max_pause_s: float = MAX_PAUSE_S
    now_ns: Callable[[], int] = time.time_ns
    num_opened: int = 0
    num_broken: int = 0

    def shots(self) -> Iterator[Shot]:
        """Yield pictures as they come. Raises VideoError only if the source never gave one."""
        has_seen, pause_s = False, self.first_pause_s
        while not self.stop.is_set():
            try:
                with self.open() as video:
                    self.num_opened += 1
                    for shot in self._shots_of(video):
                        has_seen, pause_s = True, self.first_pause_s
                        yield shot
                    self.num_broken += video.num_broken
                reason = "it gives no more pictures"
            except VideoError as error:
                if not has_seen:
                    raise
                reason = error.reason
            if not self.stop.is_set():
                self.say(f"{reason}; trying again in {seconds_text(pause_s)}")
                self.stop.wait(pause_s)
                pause_s = min(self.max_pause_s, 2 * pause_s)

    def _shots_of(self, video: Video) -> Iterator[Shot]:
        period_ns = round(NS_PER_S / self.fps) if self.fps else 0
        due_ns: int | None = None
        for _, pixels in video.decode(0):
            captured_ns = self.now_ns()
            if self.stop.is_set():
                return
            due_ns = captured_ns if due_ns is None else due_ns
            if captured_ns >= due_ns:
                # Counted from the time it was due: a camera's own rhythm must not lower the rate.
                due_ns = max(due_ns + period_ns, captured_ns + period_ns // 2)
                yield Shot(pixels(), captured_ns)


class Filmed(msgspec.Struct, frozen=True, kw_only=True):
    """What was published of a camera."""

    stream: str
    source: str
    sent: int
    sent_bytes: int
    seconds: float
    opened: int  # how often the source was opened
    broken: int  # pieces that could not be decoded


def camera(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Number of a webcam, a device, or an address.")],
    stream: Annotated[
        str, typer.Option("--stream", "-s", metavar="NAME", help="Name of the stream.", callback=checked_name)
    ] = "camera",
    fps: Annotated[float | None, typer.Option(min=0.001, help="Send at most so many pictures a second.")] = None,
    duration: Annotated[float | None, typer.Option(metavar="SECONDS", min=0.001, help="End after so long.")] = None,
    reader: Annotated[ReaderName, typer.Option(help="av or cv2 (OpenCV); webcams are read by OpenCV.")] = "auto",
    encoding: Annotated[Encoding, typer.Option(help="How pictures go over the wire.")] = "jpeg",
    jpeg_quality: Annotated[int, typer.Option(min=1, max=100)] = 90,
    add: Annotated[bool, typer.Option("--add/--no-add", help="Add the stream if the node does not know it.")] = True,
    is_json: JsonOption = False,
    frames: FramesOption = FRAMES_ENDPOINT,
    bind: BindOption = None,
    control: ControlOption = CONTROL_ENDPOINT,
    server_key: ServerKeyOption = None,
    client_key: ClientKeyOption = None,
    timeout_s: TimeoutOption = 10.0,
) -> None:
    """Publish a webcam or a network camera to a node.

    Ctrl-C or SIGTERM ends it, and tells the node that the stream has ended.
    """
    link = Link(
        frames=bind or frames,
        is_bound=bind is not None,
        control=control,
        keys=Keys(server_key, client_key),
        timeout_s=timeout_s,
        adds_streams=add,
    )
    stop = threading.Event()
    console = Console(stderr=True)
    reopen = video_opener(source, reader)
    # Open before anything is asked of the node: a camera that is not there leaves no stream behind.
    with reopen() as first, link.open([stream]) as (_, (publisher,)), ending_on_signal(stop):
        openings = itertools.chain([first], iter(reopen, None))
        source_of = Camera(openings.__next__, stop, say=lambda text: console.print(f"{source}: {text}"), fps=fps)
        feed = Feed(publisher, encoding, jpeg_quality=jpeg_quality, fps=fps)
        started = time.monotonic()
        _film(source_of, feed, duration, console)
        publisher.end()
    _report(
        Filmed(
            stream=stream,
            source=source,
            sent=feed.num_sent,
            sent_bytes=feed.num_bytes,
            seconds=time.monotonic() - started,
            opened=source_of.num_opened,
            broken=source_of.num_broken,
        ),
        is_json,
    )


def video_opener(source: str, reader: ReaderName) -> Callable[[], Video]:
    """How to open a live source, again and again. Raises BadParameter for a plain file."""
    if source.isdecimal():
        return lambda: Cv2Video(int(source))
    if Path(source).is_file():
        raise typer.BadParameter("it is a file: use `onlooker replay`", param_hint="SOURCE")
    if "://" not in source:
        return lambda: Cv2Video(source)
    return lambda: open_video(source, reader=reader, is_live=True)


def _film(source: Camera, feed: Feed, duration_s: float | None, console: Console) -> None:
    """Publish what the camera shows until it is stopped, or for so long."""
    started = reported = time.monotonic()
    with console.status("waiting for the first picture") as status:
        for shot in source.shots():
            feed.send(shot.pixels, Stamp(shot.captured_ns, "capture"))
            now = time.monotonic()
            if duration_s is not None and now - started >= duration_s:
                return
            if now - reported >= REPORT_S:
                reported = now
                fps = feed.num_sent / (now - started)
                status.update(f"{feed.num_sent} frames, {fps:.1f} fps, {bytes_text(feed.num_bytes)}")


def _report(filmed: Filmed, is_json: bool) -> None:
    if is_json:
        typer.echo(msgspec.json.encode(filmed).decode())
        return
    again = f"; opened {filmed.opened} times" if filmed.opened > 1 else ""
    typer.echo(
        f"{filmed.stream}: {filmed.sent} frames ({bytes_text(filmed.sent_bytes)}) in {seconds_text(filmed.seconds)}"
        + again
    )
