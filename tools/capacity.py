"""`onlooker capacity`: how much of a video a node can remember, predicted and then measured.

    onlooker capacity yard.mp4 --model Qwen/Qwen2.5-VL-3B-Instruct --plot capacity.png
    onlooker capacity yard.mp4                  # with the node that is running here

A few chunks say what a chunk takes. Then the video is sent at its own resolution, some chunks more each round, to the
end of the memory or of the file.
"""

from __future__ import annotations

import itertools
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from msgspec import UNSET, UnsetType
from rich.console import Console
from rich.table import Table

from ..protocol.camera import FramePublisher
from ..protocol.client import NodeClient
from ..protocol.errors import ErrorCode, NodeError, OnlookerError
from ..protocol.forecast import room_of
from ..protocol.messages import CacheInfo, NodeStats, StreamAdded, StreamSpec, StreamStats, or_unset
from ..protocol.sockets import ASK_ENDPOINT, CONTROL_ENDPOINT, FRAMES_ENDPOINT
from .capacity_plot import plot_capacity
from .capacity_report import Aftermath, CapacityReport, End, Round, comparisons, findings, recommendations
from .commands import EXIT_INTERRUPTED
from .connection import (
    AskOption,
    ClientKeyOption,
    ControlOption,
    FramesOption,
    JsonOption,
    Keys,
    ServerKeyOption,
    TimeoutOption,
    check_keys,
    checked_name,
    open_client,
    parsed_bytes,
    wait_ready,
)
from .feed import Feed, Stamp
from .interrupt import ending_on_signal
from .link import LOSSLESS_IN_FLIGHT, NoSubscriberError, stats_of
from .machine import machine
from .node import require_node
from .node_process import NODE_MODULE, running_node
from .playback import POLL_S, STALLED_AFTER_S, StalledError
from .plot import check_plot
from .prediction import MeasuredFootprint, Prediction, predict
from .quantity import bytes_text, seconds_text
from .replay import stream_slug
from .video import ReaderName, Selection, Video, VideoFrame, open_video

PUBLISHED_MODULE = "onlooker.node.published_node"
NUM_PROBE_CHUNKS = 3
PROBE_SHARE = 8  # of the free memory, one part in so many is for the probe
MIN_PROBE_BYTES = 256 << 20
DEFAULT_MEMORY_BYTES = 1 << 30  # where the device does not say what is free
QUESTION = "What can be seen?"
MAX_ANSWER_TOKENS = 8
MAX_TRIES = 6
SHRINK = 0.9  # from one try to the next
VRAM_PERIOD_S = 1.5  # a node reads its device's memory more often than this


class NothingFitsError(OnlookerError):
    """Not one chunk of a video fits."""


def _checked_size(text: str | None) -> str | None:
    if text is not None and not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}", text):
        raise typer.BadParameter(f"a size is WIDTHxHEIGHT, got {text}")
    return text


@dataclass(frozen=True, slots=True)
class CapacityOptions:
    """What of a video is sent, and into what kind of memory."""

    stream: str
    stride: int = 1
    chunk_frames: int = 4
    round_chunks: int = 10
    memory_bytes: int | None = None  # None: all that fits
    encode_size: tuple[int, int] | None = None
    max_frames: int | None = None

    def spec(self, name: str, memory_bytes: int) -> StreamSpec:
        width, height = self.encode_size or (None, None)
        return StreamSpec(
            stream=name,
            stride=1,
            chunk_frames=self.chunk_frames,
            memory_bytes=memory_bytes,
            # How much fits is the question.
            gate=0,
            drop=1,
            last_frames=0,
            retention="stop",
            encode_width=or_unset(width),
            encode_height=or_unset(height),
        )


@dataclass(frozen=True, slots=True)
class Route:
    """Where a node is."""

    frames: str
    ask: str
    control: str
    keys: Keys
    timeout_s: float


def capacity(
    video: Annotated[str, typer.Argument(metavar="VIDEO", help="A file.", envvar="VIDEO_PATH")],
    model: Annotated[
        str | None, typer.Option(help="Start a node with this model; without it, the one running here is used.")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Start a node with published sizes and random weights, such as qwen2.5-vl-3b."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Of a node that is started: auto, cpu, cuda, cuda:N.")] = "auto",
    stride: Annotated[int, typer.Option(min=1, help="Send every n-th picture.", envvar="FRAME_STRIDE")] = 1,
    chunk_frames: Annotated[int, typer.Option(help="Frames encoded together: 1, 2, 4, 6 or 8.")] = 4,
    round_chunks: Annotated[int, typer.Option(min=1, help="Chunks a round.")] = 10,
    memory: Annotated[
        int | None,
        typer.Option(
            metavar="SIZE", help="For keys and values, such as 2GiB; without it, all that is free.", parser=parsed_bytes
        ),
    ] = None,
    encode_size: Annotated[
        str | None, typer.Option(metavar="WxH", help="Encode at this size.", callback=_checked_size)
    ] = None,
    max_frames: Annotated[int | None, typer.Option(min=1, help="Send no more than so many.")] = None,
    stream: Annotated[
        str | None, typer.Option("--stream", "-s", help="Name of the stream, which is added.", callback=checked_name)
    ] = None,
    reader: Annotated[ReaderName, typer.Option(help="av is exact; cv2 is OpenCV.")] = "auto",
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Memory and rate over frames, a PNG.")] = None,
    is_json: JsonOption = False,
    frames: FramesOption = FRAMES_ENDPOINT,
    ask: AskOption = ASK_ENDPOINT,
    control: ControlOption = CONTROL_ENDPOINT,
    server_key: ServerKeyOption = None,
    client_key: ClientKeyOption = None,
    timeout_s: TimeoutOption = 60.0,
) -> None:
    """Find out how much of a video a node can remember.

    `onlooker report` makes a page of its JSON.
    """
    if model is not None and config is not None:
        raise typer.BadParameter("a model has its own sizes: give one of the two", param_hint="--config")
    if plot is not None:
        check_plot(plot)
    options = CapacityOptions(
        stream=stream or f"capacity-{stream_slug(video)}"[:64],
        stride=stride,
        chunk_frames=chunk_frames,
        round_chunks=round_chunks,
        memory_bytes=memory,
        encode_size=None if encode_size is None else _size(encode_size),
        max_frames=max_frames,
    )
    route = Route(frames, ask, control, Keys(server_key, client_key), timeout_s)
    stop = threading.Event()

    def say(text: str) -> None:
        typer.echo(text, err=True)

    with ExitStack() as stack:
        source = stack.enter_context(open_video(video, reader=reader))
        if model is not None or config is not None:
            route = stack.enter_context(_own_node(model, config, device, route, say))
        stack.enter_context(ending_on_signal(stop))
        report = measure_capacity(source, route, options, say, stop)
    if is_json:
        is_own_node = model is not None or config is not None
        sys.stdout.write(_document(report, machine(report.device, is_own_node=is_own_node)).decode() + "\n")
    else:
        _print(report)
    if plot is not None:
        plot_capacity(report, plot)
    if report.end == "interrupted":
        raise typer.Exit(EXIT_INTERRUPTED)


def measure_capacity(
    video: Video, route: Route, options: CapacityOptions, say: Callable[[str], None], stop: threading.Event
) -> CapacityReport:
    """Predict, then send the video to the end of the memory or of the file. Takes its streams away again.

    Raises NothingFitsError, VideoError, StalledError, and the errors of the client and the publisher.
    """
    began = time.monotonic()
    check_keys(route.keys)
    with open_client(route.ask, route.control, route.keys, route.timeout_s) as client:
        wait_ready(client, route.timeout_s)
        frames = video.read(Selection(stride=options.stride))
        first = list(itertools.islice(frames, NUM_PROBE_CHUNKS * options.chunk_frames))
        footprint = _probe(client, route, options, first)
        room_bytes = footprint.room.num_bytes if footprint.room else DEFAULT_MEMORY_BYTES
        memory_bytes = options.memory_bytes or room_bytes
        spec = options.spec(options.stream, memory_bytes)
        with _stream(client, spec, num_tries=MAX_TRIES if options.memory_bytes is None else 1):
            fps = video.fps / options.stride if video.fps else None
            cache = client.cache_info(options.stream)
            prediction = predict(
                footprint, capacity_tokens=cache.capacity_tokens, fps=fps, file_frames=_file_frames(video, options)
            )
            say(_prediction_text(footprint, prediction))
            if prediction.num_chunks == 0:
                raise NothingFitsError(
                    f"{bytes_text(prediction.memory_bytes)} hold no chunk of {footprint.tokens_per_chunk} tokens"
                )
            shown = itertools.islice(itertools.chain(first, frames), options.max_frames)
            rounds, end = _replay(client, route, options, shown, say, stop)
            if rounds[-1].num_frames == 0:
                raise NothingFitsError(f"the node took no frame of {video.source}: it is {end.replace('_', ' ')}")
            after = _aftermath(client, options.stream)
            rounds[-1] = msgspec.structs.replace(rounds[-1], vram=_fresh_stats(client).vram)
        hello = client.hello()
    return CapacityReport(
        video=Path(video.source).name,
        video_fps=fps,
        stride=options.stride,
        node=hello.node,
        model=hello.model,
        dtype=hello.dtype,
        device=rounds[-1].vram.device,
        footprint=footprint,
        prediction=prediction,
        rounds=rounds,
        end=end,
        after=after,
        seconds=time.monotonic() - began,
    )


class Sender:
    """Sends frames into a stream of a node, never more ahead of it than its ring holds."""

    def __init__(self, client: NodeClient, publisher: FramePublisher, chunk_frames: int, stop: threading.Event) -> None:
        self._client = client
        self._publisher = publisher
        self._feed = Feed(publisher, "jpeg")
        self._chunk_frames = chunk_frames
        self._stop = stop
        self._num_done = 0

    def send(self, frames: Iterable[VideoFrame]) -> int:
        """Send them and wait until all but those of an incomplete chunk are done with; returns how many there were."""
        num = 0
        for frame in frames:
            self._wait_done(self._feed.num_sent + 1 - LOSSLESS_IN_FLIGHT)
            if self._stop.is_set():
                break
            self._feed.send(frame.pixels, Stamp(frame.media_ns, "media"))
            num += 1
        self._wait_done(self._feed.num_sent - (self._chunk_frames - 1))
        return num

    def end(self) -> None:
        """Say that no more frames come, and wait until the last chunk, padded, is done with."""
        self._publisher.end()
        self._wait_done(self._feed.num_sent + 1)

    def _wait_done(self, num_wanted: int) -> None:
        """Wait until the node is done with so many messages. Raises StalledError."""
        progressed = time.monotonic()
        while self._num_done < num_wanted and not self._stop.is_set():
            stats = stats_of(self._client, self._publisher.stream)
            frames, num_before = stats.frames, self._num_done
            if frames.last_session == self._publisher.session and isinstance(frames.last_seq, int):
                self._num_done = frames.last_seq + 1 - frames.pending
            if self._num_done > num_before:
                progressed = time.monotonic()
            elif time.monotonic() - progressed > STALLED_AFTER_S:
                raise StalledError(stats)
            else:
                time.sleep(POLL_S)


def _probe(client: NodeClient, route: Route, options: CapacityOptions, frames: list[VideoFrame]) -> MeasuredFootprint:
    """Send the first chunks one by one into a memory of their own, and see what they take."""
    free = _known(client.status().vram.free_bytes)
    memory_bytes = max(MIN_PROBE_BYTES, free // PROBE_SHARE if free else 0)
    name = f"{options.stream[:58]}-probe"
    with (
        _stream(client, options.spec(name, memory_bytes)) as added,
        _publisher(route, name) as publisher,
    ):
        sender = Sender(client, publisher, options.chunk_frames, threading.Event())
        steps = [client.cache_info(name)]
        chunk_s = 0.0
        for chunk in _batched(frames, options.chunk_frames):
            began = time.monotonic()
            sender.send(chunk)
            if len(chunk) < options.chunk_frames:
                sender.end()
            chunk_s = time.monotonic() - began
            steps.append(client.cache_info(name))
        stats = stats_of(client, name)
    vram = _fresh_stats(client).vram  # without the memory of the probe
    taken = [after.num_tokens - before.num_tokens for before, after in itertools.pairwise(steps)]
    if not taken or taken[-1] <= 0 or not isinstance(stats.encoded_size, tuple):
        raise NothingFitsError(
            f"the node did not take the first chunks of the video: {stats.frames.dropped or 'it does not say why'}"
        )
    assert isinstance(stats.received_size, tuple)
    info = steps[-1]
    return MeasuredFootprint(
        received_size=stats.received_size,
        encoded_size=stats.encoded_size,
        chunk_frames=options.chunk_frames,
        bytes_per_token=info.bytes_per_token,
        opening_tokens=taken[0] - taken[-1],
        tokens_per_chunk=taken[-1],
        **_positions(steps, added),
        chunk_s=chunk_s,
        room=room_of(vram),
    )


def _positions(steps: list[CacheInfo], added: StreamAdded) -> dict[str, Any]:
    """What chunks take of the model's positions, as far as that shows.

    In a video that stays open a chunk takes none at first, as long as its clock is behind the size of one picture: how
    fast that clock goes the node says.
    """
    used = [each.positions_used for each in steps]
    per_chunk = used[-1] - used[-2]
    left = steps[-1].positions_left
    known = {
        "opening_positions": used[1] - used[0] - per_chunk,
        "picture_positions": 0,
        "positions_per_chunk": per_chunk,
        "positions_per_second": 0.0,
        "max_positions": UNSET if left is UNSET else used[-1] + left,
    }
    if added.forecast is UNSET or added.forecast.footprint.picture_positions == 0:
        return known
    told = added.forecast.footprint
    return known | {
        "opening_positions": told.opening_positions,
        "picture_positions": used[1] - told.opening_positions,
        "positions_per_chunk": told.positions_per_chunk,
        "positions_per_second": told.positions_per_second,
    }


def _replay(
    client: NodeClient,
    route: Route,
    options: CapacityOptions,
    frames: Iterator[VideoFrame],
    say: Callable[[str], None],
    stop: threading.Event,
) -> tuple[list[Round], End]:
    """Send some chunks more each round until the memory is full, the frames are over, or `stop` is set."""
    rounds: list[Round] = []
    num_round, began = options.round_chunks * options.chunk_frames, time.monotonic()
    with _publisher(route, options.stream) as publisher:
        sender = Sender(client, publisher, options.chunk_frames, stop)
        while True:
            round_began = time.monotonic()
            num_sent = sender.send(itertools.islice(frames, num_round))
            is_over = num_sent < num_round
            if is_over:
                sender.end()
            ended = time.monotonic()
            stats = stats_of(client, options.stream)
            num_before = rounds[-1].num_frames if rounds else 0
            if stats.cache.num_frames > num_before or not rounds:
                rounds.append(_round(client, stats, num_before, ended - round_began, ended - began))
                say(_round_text(rounds[-1]))
            if stop.is_set():
                return rounds, "interrupted"
            if stats.cache.full or stats.frames.dropped.get("memory_full"):
                return rounds, "positions" if stats.cache.limit == "positions" else "memory_full"
            if stats.frames.dropped.get("out_of_memory"):
                return rounds, "out_of_memory"
            if is_over:
                num_all = sum(stats.frames.dropped.values()) + stats.frames.encoded
                return rounds, "frames" if num_all == options.max_frames else "end_of_file"


def _round(client: NodeClient, stats: StreamStats, num_before: int, seconds: float, total_s: float) -> Round:
    cache, node = stats.cache, client.status()
    return Round(
        num_chunks=cache.num_chunks,
        num_frames=cache.num_frames,
        num_padded=cache.num_padded_frames,
        num_tokens=cache.num_tokens,
        logical_bytes=cache.logical_bytes,
        resident_bytes=cache.resident_bytes,
        seconds=seconds,
        total_s=total_s,
        fps=(cache.num_frames - num_before) / seconds,
        stages=stats.stages,
        vram=node.vram,
        host_rss_bytes=_known(node.host_rss_bytes),
    )


def _aftermath(client: NodeClient, stream: str) -> Aftermath:
    """Ask, whatever has become of the stream: the node is to go on."""
    stats = stats_of(client, stream)
    try:
        answer = client.ask(stream, QUESTION, max_new_tokens=MAX_ANSWER_TOKENS)
    except OnlookerError:
        return Aftermath(
            state=stats.state, dropped=stats.frames.dropped, answered=False, unchanged=False, first_token_ms=None
        )
    return Aftermath(
        state=stats.state,
        dropped=stats.frames.dropped,
        answered=True,
        unchanged=answer.memory.unchanged,
        first_token_ms=answer.timing.first_token_ms,
    )


# The node


@contextmanager
def _own_node(
    model: str | None, config: str | None, device: str, route: Route, say: Callable[[str], None]
) -> Iterator[Route]:
    """A node for this run alone: of a model, or of a published one's sizes. Raises NodeProcessError."""
    require_node()
    say(f"Starting a node with {model or config} ...")
    module = NODE_MODULE if config is None else PUBLISHED_MODULE
    which = ("--model", str(model)) if config is None else ("--sizes", config)
    with (
        tempfile.TemporaryDirectory(prefix="onlooker-capacity-") as folder,
        running_node((*which, "--device", device), Path(folder) / "node.log", module) as node,
    ):
        ends = node.endpoints
        yield Route(ends["frames"], ends["ask"], ends["control"], Keys(), route.timeout_s)


@contextmanager
def _stream(client: NodeClient, spec: StreamSpec, *, num_tries: int = 1) -> Iterator[StreamAdded]:
    """A stream of the node for a while; with several tries, one with less memory if there is not that much."""
    added = _add(client, spec, num_tries)
    try:
        yield added
    finally:
        client.remove_stream(spec.stream)


def _add(client: NodeClient, spec: StreamSpec, num_tries: int) -> StreamAdded:
    assert isinstance(spec.memory_bytes, int)
    try:
        return client.add_stream(spec)
    except NodeError as error:
        if error.code != ErrorCode.OUT_OF_MEMORY or num_tries == 1:
            raise
        # What is free lies in pieces: a part of it cannot be had as whole layers.
        less = msgspec.structs.replace(spec, memory_bytes=round(spec.memory_bytes * SHRINK))
        return _add(client, less, num_tries - 1)


@contextmanager
def _publisher(route: Route, stream: str) -> Iterator[FramePublisher]:
    keys = route.keys
    with FramePublisher(
        stream,
        connect=route.frames,
        server_key=keys.server,
        client_key=keys.client,
        lossless=True,
        send_timeout_s=route.timeout_s,
    ) as publisher:
        if not publisher.wait_for_subscriber(route.timeout_s):
            raise NoSubscriberError(stream, publisher.endpoint, route.timeout_s)
        yield publisher


def _fresh_stats(client: NodeClient) -> NodeStats:
    """The node's figures, once its device's memory was read anew; on the CPU there is nothing to wait for."""
    stats = client.status()
    if stats.vram.free_bytes is UNSET:
        return stats
    time.sleep(VRAM_PERIOD_S)
    return client.status()


def _known(value: int | UnsetType) -> int | None:
    return None if value is UNSET else value


def _file_frames(video: Video, options: CapacityOptions) -> int | None:
    """Frames that there are to send, as far as the file says."""
    counts = [options.max_frames]
    if video.fps and video.duration_s:
        counts.append(max(1, round(video.fps * video.duration_s / options.stride)))
    return min((count for count in counts if count is not None), default=None)


def _batched(frames: list[VideoFrame], num: int) -> Iterator[list[VideoFrame]]:
    return (frames[i : i + num] for i in range(0, len(frames), num))


def _size(text: str) -> tuple[int, int]:
    width, height = text.split("x")
    return int(width), int(height)


# What is shown


def _document(report: CapacityReport, facts: dict[str, str]) -> bytes:
    """The report with what follows from it and what it holds for, as JSON."""
    document = msgspec.to_builtins(report) | {
        "compared": comparisons(report),
        "findings": findings(report),
        "recommendations": recommendations(report),
        "machine": facts,
    }
    return msgspec.json.encode(document)


def _prediction_text(footprint: MeasuredFootprint, prediction: Prediction) -> str:
    """How the prediction comes about, in one line of arithmetic."""
    room = footprint.room
    free = (
        ""
        if room is None
        else (
            f"free {bytes_text(room.free_bytes)} - workspace {bytes_text(room.workspace_bytes)} "
            f"- safety {bytes_text(room.safety_bytes)} = {bytes_text(room.num_bytes)}; "
        )
    )
    seconds = "" if prediction.seconds is None else f", {seconds_text(prediction.seconds)} of the video"
    return (
        f"predicted: {free}{bytes_text(prediction.memory_bytes)} / {footprint.bytes_per_token} bytes a token / "
        f"{footprint.tokens_per_chunk} tokens a chunk: {prediction.num_chunks} chunks, {prediction.num_frames} frames"
        f"{seconds}, ended by {'the end of the file' if prediction.limit == 'file' else prediction.limit}"
    )


def _round_text(each: Round) -> str:
    peak = each.vram.torch_peak_bytes
    vram = f", allocated at the peak {bytes_text(peak)}" if isinstance(peak, int) else ""
    return (
        f"{each.num_chunks} chunks, {each.num_frames} frames: {each.num_tokens} tokens, "
        f"{bytes_text(each.logical_bytes)}, {each.fps:.3g} frames a second{vram}"
    )


def _print(report: CapacityReport) -> None:
    console = Console()
    table = Table(title=f"{report.video}: {report.model} on {report.device}", title_justify="left")
    for column in ("", "predicted", "measured"):
        table.add_column(column)
    for each in comparisons(report):
        table.add_row(each.figure, each.predicted, each.measured)
    console.print(table)
    for title, lines in (("Findings", findings(report)), ("Recommendations", recommendations(report))):
        if lines:
            console.print(f"[bold]{title}[/bold]")
            for line in lines:
                console.print(f"- {line}", markup=False, highlight=False, soft_wrap=True)
