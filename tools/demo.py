"""`onlooker demo`: everything at once, in one terminal.

A node with the built-in model is started on the CPU. A clip is made and replayed into it over the wire, four
questions are asked, the first of them while pictures are still coming, and the telemetry is watched. Then every figure
is checked.
"""

from __future__ import annotations

import math
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Self

import msgspec
import typer
from msgspec import UNSET
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..protocol.client import NodeClient
from ..protocol.messages import Answer, Choice, Provenance, StreamStats
from ..protocol.telemetry import TelemetrySubscriber
from .ask import seconds_known, visible
from .check import Check, checks_table
from .commands import EXIT_FAILED
from .connection import JsonOption
from .link import LOSSLESS_IN_FLIGHT, Link
from .node import require_node
from .node_process import END_TIMEOUT_S, running_node
from .playback import PlaybackOptions, Played, open_playbacks
from .quantity import bytes_text, ms_text, reasons_text, seconds_text
from .video import Selection, open_video
from .watch import View

STREAM = "demo"
THINGS = ("red circle", "blue square", "green triangle")
SHOW_S = 2.0
CLIP_FPS = 4.0
RATE = 2.0
MAX_VIDEO_S = 20.0
MAX_ANSWER_TOKENS = 24
REPLY_TIMEOUT_S = 60.0
TELEMETRY_TIMEOUT_S = 10.0
POLL_S = 0.02

NODE_ARGUMENTS = (
    *("--model", "builtin", "--device", "cpu", "--stream", STREAM),
    *("--set", "name=demo", "--set", "telemetry.period_s=0.25", "--set", "stream_defaults.memory_bytes=64MiB"),
)


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked; with options, a choice. `truth` gives the right answer, where it is known, for what was seen."""

    text: str
    options: tuple[str, ...] = ()
    truth: Callable[[Sequence[str]], str] | None = None


ABOUT_THE_CLIP = (
    Question("What colour is the shape?", truth=lambda seen: seen[-1].split()[0]),
    Question("Which shapes have you seen so far?", truth=lambda seen: ", ".join(f"a {thing}" for thing in seen)),
    Question("What was the last shape?", tuple(f"a {thing}" for thing in THINGS), truth=lambda seen: f"a {seen[-1]}"),
    Question(
        "When did the blue square appear?", truth=lambda seen: f"at {seen.index('blue square') * SHOW_S:.0f} seconds"
    ),
)
ABOUT_ANYTHING = (
    Question("What can be seen?"),
    Question("What has happened so far?"),
    Question("Is anybody in view?", ("yes", "no")),
)


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """A question and its reply."""

    question: str
    options: tuple[str, ...]
    wanted: str  # "" where the right answer is not known
    answer: str
    while_playing: bool  # whether pictures were still coming when the answer was there
    reply: Answer | Choice


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the demo found out."""

    video: str
    model: str
    device: str
    notice: str | None
    asked: list[Asked]
    played: Played
    stream: StreamStats
    num_records: int
    checks: list[Check]
    seconds: float

    @property
    def held(self) -> bool:
        return all(check.held for check in self.checks)


def demo(
    video: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A video of your own, of which the first 20 s are played.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep the clip, an mp4, with its truth as JSON beside it.")
    ] = None,
    is_json: JsonOption = False,
) -> None:
    """Show it all in one terminal: a node, a clip, four questions, the telemetry."""
    require_node()
    # SIGTERM ends it as Ctrl-C does, and takes the node along.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if video is not None:
        open_video(str(video)).close()
    if save is not None:
        if video is not None:
            raise typer.BadParameter("--save keeps the demo's own clip, which --video replaces")
        if not save.absolute().parent.is_dir():
            raise typer.BadParameter(f"there is no folder {save.absolute().parent}")
        make_clip(save)
    report = run_demo(video, say=lambda text: None if is_json else typer.echo(text))
    if is_json:
        typer.echo(msgspec.json.encode(report).decode())
    else:
        _print(report)
    if not report.held:
        raise typer.Exit(EXIT_FAILED)


def run_demo(video: Path | None, say: Callable[[str], None]) -> Report:
    """Start a node, play the clip or a video into it, ask, watch, check, and end the node."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="onlooker-demo-") as folder:
        clip = video or make_clip(Path(folder) / "shapes.mp4")
        say("Starting a node with the built-in model on the CPU ...")
        with running_node(NODE_ARGUMENTS, Path(folder) / "node.log") as node:
            say(f"Replaying {clip.name} into it, without loss, and asking ...")
            report = play_and_ask(clip, ABOUT_ANYTHING if video else ABOUT_THE_CLIP, node.endpoints)
    checks = [*report.checks, check_end(node.end_s, node.status)]
    return msgspec.structs.replace(report, checks=checks, seconds=time.monotonic() - started)


def make_clip(path: Path) -> Path:
    """Film a red circle, then a blue square, then a green triangle."""
    from .scenes import make_plain_story, write_clip

    write_clip(make_plain_story(1, THINGS, show_s=SHOW_S, split="test"), path, fps=CLIP_FPS)
    return path


def things_seen(num_frames: int) -> Sequence[str]:
    """What so many frames of the clip show, in order."""
    return THINGS[: math.ceil(num_frames / (SHOW_S * CLIP_FPS))]


def play_and_ask(video: Path, questions: Sequence[Question], endpoints: dict[str, str]) -> Report:
    """Play a video into a node, ask the first question meanwhile and the others after it, and check the figures."""
    link = Link(endpoints["frames"], control=endpoints["control"], max_in_flight=LOSSLESS_IN_FLIGHT)
    options = PlaybackOptions(selection=Selection(duration_s=MAX_VIDEO_S), rate=RATE)
    stop = threading.Event()
    with (
        NodeClient(endpoints["ask"], endpoints["control"], timeout_s=REPLY_TIMEOUT_S) as client,
        Watcher(endpoints["telemetry"]) as watcher,
        open_playbacks({STREAM: str(video)}, options, link, stop) as (playback,),
        ThreadPoolExecutor(1) as thread,
    ):
        playing = thread.submit(playback.run)
        try:
            asked = _ask_all(client, questions, playing)
        finally:
            stop.set()
        hello, stream = client.hello(), client.streams()[0]
        watcher.wait_for(stream)
    return Report(
        video=video.name,
        model=hello.model,
        device=hello.device,
        notice=None if hello.notice is UNSET else hello.notice,
        asked=asked,
        played=playing.result(),
        stream=stream,
        num_records=watcher.num_records,
        checks=[
            *([check_answers(asked)] if all(each.wanted for each in asked) else []),
            check_frames(playing.result(), stream),
            check_bytes(stream),
            check_traces(asked, watcher.view),
            check_telemetry(stream, watcher.view),
        ],
        seconds=0.0,
    )


def _ask_all(client: NodeClient, questions: Sequence[Question], playing: Future[Played]) -> list[Asked]:
    """Ask the first question as soon as something is remembered, the others once everything is."""
    while not (client.cache_info(STREAM).num_frames or playing.done()):
        time.sleep(POLL_S)
    first = _ask(client, questions[0], playing)
    playing.result()
    return [first, *(_ask(client, question, playing) for question in questions[1:])]


def _ask(client: NodeClient, question: Question, playing: Future[Played]) -> Asked:
    if question.options:
        reply = client.ask_choice(STREAM, question.text, question.options)
        answer = reply.option
    else:
        reply = client.ask(STREAM, question.text, max_new_tokens=MAX_ANSWER_TOKENS)
        answer = reply.text
    return Asked(
        question=question.text,
        options=question.options,
        wanted=question.truth(things_seen(reply.memory.num_frames)) if question.truth else "",
        answer=answer,
        while_playing=not playing.done(),
        reply=reply,
    )


class Watcher:
    """Follows a node's telemetry on a thread of its own, while others talk to the node."""

    def __init__(self, endpoint: str) -> None:
        self.view = View(endpoint)
        self.num_records = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with TelemetrySubscriber(self.view.endpoint) as subscriber:
            while not self._stop.is_set():
                message = subscriber.receive(POLL_S)
                if message is not None:
                    self.view.take(message.record, time.monotonic())
                    self.num_records += 1

    def wait_for(self, stream: StreamStats) -> None:
        """Wait until the telemetry is as new as `stream`, or for some seconds."""
        deadline = time.monotonic() + TELEMETRY_TIMEOUT_S
        while not self._is_as_new_as(stream) and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def _is_as_new_as(self, stream: StreamStats) -> bool:
        seen, stats = self.view.streams.get(stream.stream), self.view.stats
        return seen is not None and stats is not None and min(seen.ts, stats.ts) > stream.ts


# The checks


def check_answers(asked: Sequence[Asked]) -> Check:
    """Whether the built-in model has seen what the clip shows."""
    wrong = [each for each in asked if each.answer != each.wanted]
    figures = f"{len(asked) - len(wrong)} of {len(asked)} are what the clip shows"
    figures += "".join(f"; not {each.answer!r} but {each.wanted!r}" for each in wrong)
    return Check(promise="the answers are right", held=not wrong, figures=figures)


def check_frames(played: Played, stream: StreamStats) -> Check:
    """Whether everything that was sent has arrived, and is in the memory or dropped for a reason."""
    frames = stream.frames
    num_dropped = sum(frames.dropped.values())
    is_whole = frames.received == frames.encoded + num_dropped + frames.pending
    figures = f"{played.sent} sent; {frames.received} received = {frames.encoded} encoded + {num_dropped} dropped"
    if num_dropped:
        figures += f" ({reasons_text(frames.dropped)})"
    if frames.pending:
        figures += f" + {frames.pending} pending"
    held = is_whole and played.sent == frames.received > 0 and frames.pending == 0
    return Check(promise="every frame is accounted for", held=held, figures=figures)


def check_bytes(stream: StreamStats) -> Check:
    """Whether the measured bytes are those that the tokens take."""
    cache = stream.cache
    held = cache.logical_bytes == cache.num_tokens * cache.bytes_per_token > 0
    figures = f"{cache.num_tokens} tokens x {cache.bytes_per_token} bytes = {cache.logical_bytes} bytes"
    return Check(promise="the bytes are those of the tokens", held=held, figures=figures)


def check_traces(asked: Sequence[Asked], view: View) -> Check:
    """Whether the memory was the same after each question as before it, by the replies and by the telemetry."""
    num_unchanged = sum(each.reply.memory.unchanged for each in asked)
    num_traces = view.stats.questions.traces if view.stats else None
    figures = f"memory unchanged by {num_unchanged} of {len(asked)} questions, telemetry counts {num_traces} traces"
    return Check(
        promise="no question left a trace", held=num_unchanged == len(asked) and num_traces == 0, figures=figures
    )


def check_telemetry(stream: StreamStats, view: View) -> Check:
    """Whether those who watch are told what those who ask are told."""
    seen = view.streams.get(stream.stream)
    if seen is None:
        return Check(promise="telemetry says the same", held=False, figures="none came")
    held = (seen.cache, seen.frames) == (stream.cache, stream.frames)
    figures = f"{seen.cache.num_tokens} tokens, {seen.cache.logical_bytes} bytes, {seen.frames.encoded} frames"
    return Check(promise="telemetry says the same", held=held, figures=figures)


def check_end(end_s: float | None, status: int | None) -> Check:
    """Whether a node that was asked to end did so after `end_s`, in time, with exit status 0."""
    if end_s is None:
        return Check(promise="the node ends when asked", held=False, figures=f"not within {END_TIMEOUT_S:g} s")
    figures = f"after {seconds_text(end_s)}, with status {status}"
    return Check(promise="the node ends when asked", held=status == 0, figures=figures)


# What is shown


def _print(report: Report) -> None:
    console = Console()
    console.print()
    console.print(_questions_table(report))
    stream = report.stream
    console.print(
        f"{report.model} on {report.device}: {stream.cache.num_frames} frames in "
        f"{bytes_text(stream.cache.logical_bytes)} of memory; {report.num_records} records of telemetry"
    )
    console.print(checks_table(report.checks))
    if report.notice:
        console.print(Text(report.notice, style="yellow"))
    console.print(f"{'All of it held' if report.held else 'NOT all of it held'}, in {seconds_text(report.seconds)}.")


def _questions_table(report: Report) -> Table:
    table = Table(title="Questions and answers", title_justify="left")
    for column in ("question", "answer", "knew", "first token", "memory"):
        table.add_column(column, overflow="fold")
    for each in report.asked:
        reply = each.reply
        question = each.question + (f" ({', '.join(each.options)}?)" if each.options else "")
        table.add_row(
            Text(question),
            Text(visible(" ".join(each.answer.split())) or "(blank)"),
            _knowledge_text(reply.memory) + (", and more came meanwhile" if each.while_playing else ""),
            ms_text(reply.timing.first_token_ms),
            "unchanged" if reply.memory.unchanged else Text("CHANGED", style="bold red"),
        )
    return table


def _knowledge_text(memory: Provenance) -> str:
    span = seconds_text(seconds_known(memory))
    return f"{memory.num_frames} frames of {span}"
