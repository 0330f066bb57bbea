"""`onlooker qa`: questions with known answers, asked of a node over its sockets.

    onlooker qa --model builtin                        three rounds, on a node that is started for it
    onlooker qa --scenario stories --plot lengths.png  held-out stories, on the node that runs
    onlooker qa --compare chunks --model ./mine        the same stories in chunks of 1, 2, 4, 6 and 8 frames
    onlooker qa --compare retention --streams 90       what a memory still knows that holds a quarter, by how it forgets

Coloured shapes are drawn, shown to the node as a camera would, and asked about. An answer is right if it says what was
asked for and nothing else, case and articles apart: a model that talks more is better judged by its choices.
"""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import msgspec
import typer
from rich.console import Console
from rich.progress import track

from ..protocol.sockets import ASK_ENDPOINT, CONTROL_ENDPOINT, FRAMES_ENDPOINT
from .commands import EXIT_FAILED
from .connection import (
    AskOption,
    ClientKeyOption,
    ControlOption,
    FramesOption,
    JsonOption,
    Keys,
    ServerKeyOption,
    TimeoutOption,
    open_client,
    wait_ready,
)
from .exam import Plan, Report, as_it_comes, examine
from .exam_tables import print_report
from .link import LOSSLESS_IN_FLIGHT, Link
from .machine import machine
from .node import require_node
from .node_process import running_node
from .plot import check_plot, plot_lengths, plot_recall, plot_settings
from .scenario import (
    CHUNK_FRAMES,
    EVERYTHING,
    KEEPINGS,
    LAYOUTS,
    Layout,
    Part,
    Setting,
    comparison,
    recall,
    rounds_scenario,
    stories_scenario,
)
from .showing import Showing

ScenarioName = Literal["rounds", "stories"]
LayoutName = Literal["native", "turns", "both"]
Compared = Literal["chunks", "layouts", "retention"]

ROUNDS_CHUNK_FRAMES = 2
STORIES_CHUNK_FRAMES = 4
STORIES_CHUNKS = "1,2,4,8,16,24"
COMPARED_CHUNKS = "6,12"
RECALL_CHUNK_FRAMES = 2
RECALL_CHUNKS = "48"


class Sockets(NamedTuple):
    """Where a node is reached."""

    frames: str
    ask: str
    control: str


@dataclass(frozen=True, slots=True)
class Extent:
    """How much is shown and asked."""

    seed: int
    num_rounds: int
    num_streams: int
    lengths: list[int]  # chunks
    num_questions: int  # a stream


def qa(
    scenario: Annotated[
        ScenarioName, typer.Option(help="Three rounds of two frames, or stories of many things.")
    ] = "rounds",
    seed: Annotated[int, typer.Option(min=0, help="Another seed is another scenario.")] = 0,
    rounds: Annotated[int, typer.Option(min=1, help="The three rounds so many times, with the seeds after.")] = 1,
    streams: Annotated[int, typer.Option(min=1, help="So many stories, each a stream of its own.")] = 12,
    chunks: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Lengths of the stories, in chunks; they take turns.")
    ] = None,
    questions: Annotated[int, typer.Option(min=1, help="Questions to a story, at any time of it.")] = 8,
    chunk_frames: Annotated[int | None, typer.Option(help="Frames a chunk: 1, 2, 4, 6 or 8.")] = None,
    layout: Annotated[LayoutName | None, typer.Option(help="Of the streams; with both, they take turns.")] = None,
    compare: Annotated[
        Compared | None,
        typer.Option(help="Show each story in every chunk size, in both layouts, or kept in all ways."),
    ] = None,
    storm: Annotated[
        int, typer.Option(min=0, help="Show it all again, with so many more questions after each chunk.")
    ] = 0,
    choice: Annotated[bool, typer.Option("--choice", help="Ask every question as a multiple choice too.")] = False,
    min_accuracy: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Fail below this share of right answers. Default: all of the rounds'."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw accuracy by length, or the comparison, as a PNG.")
    ] = None,
    is_json: JsonOption = False,
    model: Annotated[
        str | None, typer.Option(help="Start a node with this model: a folder, a hub id, or builtin.")
    ] = None,
    device: Annotated[str, typer.Option(help="Of the node that is started.")] = "auto",
    frames: FramesOption = FRAMES_ENDPOINT,
    ask: AskOption = ASK_ENDPOINT,
    control: ControlOption = CONTROL_ENDPOINT,
    server_key: ServerKeyOption = None,
    client_key: ClientKeyOption = None,
    timeout_s: TimeoutOption = 60.0,
) -> None:
    """Ask a node questions with known answers, and score what it says.

    `onlooker report` makes a page of its JSON.
    """
    is_stories = scenario == "stories" or compare is not None
    default_chunks = RECALL_CHUNKS if compare == "retention" else COMPARED_CHUNKS if compare else STORIES_CHUNKS
    extent = Extent(seed, rounds, streams, _lengths(chunks or default_chunks), questions)
    try:
        parts = _parts(is_stories, extent, _settings(is_stories, chunk_frames, layout, compare), compare)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    plan = Plan(
        scenario="stories" if is_stories else "rounds",
        parts=parts,
        with_choices=choice,
        num_storm=storm,
        min_accuracy=(0.0 if is_stories else 1.0) if min_accuracy is None else min_accuracy,
        compares=compare is not None and compare != "retention",
        forgets=compare == "retention",
    )
    if plot:
        check_plot(plot)
    # SIGTERM ends it as Ctrl-C does: the streams are removed, and a node that was started goes along.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    keys = Keys() if model else Keys(server_key, client_key)
    with _sockets(model, device, Sockets(frames, ask, control)) as sockets:
        report = examine_at(sockets, plan, keys, timeout_s, is_quiet=is_json)
    if is_json:
        document = msgspec.to_builtins(report) | {"machine": machine(report.device, is_own_node=model is not None)}
        typer.echo(msgspec.json.encode(document).decode())
    else:
        print_report(report)
    if plot:
        _draw(report, plot)
    if not report.held:
        raise typer.Exit(EXIT_FAILED)


def examine_at(
    sockets: Sockets, plan: Plan, keys: Keys | None = None, timeout_s: float = 60.0, *, is_quiet: bool = True
) -> Report:
    """Run an exam on the node at these sockets. Raises as `examine` does, and NoNodeError."""
    keys = keys or Keys()
    link = Link(
        frames=sockets.frames,
        control=sockets.control,
        keys=keys,
        timeout_s=timeout_s,
        max_in_flight=LOSSLESS_IN_FLIGHT,
        adds_streams=False,
    )
    with open_client(sockets.ask, sockets.control, keys, timeout_s) as node:
        wait_ready(node, timeout_s)
        return examine(plan, node, link, as_it_comes if is_quiet else _told)


def _told(showings: Iterator[Showing], num: int) -> Iterable[Showing]:
    """Say on a terminal how far it is."""
    console = Console(stderr=True)
    return track(showings, "asking", total=num, console=console, disable=not console.is_terminal, transient=True)


@contextmanager
def _sockets(model: str | None, device: str, given: Sockets) -> Iterator[Sockets]:
    """Those of a node with this model, started for as long as it is needed; without a model, those given."""
    if model is None:
        yield given
        return
    require_node()
    with tempfile.TemporaryDirectory(prefix="onlooker-qa-") as folder:
        arguments = ("--model", model, "--device", device, "--set", "name=qa")
        with running_node(arguments, Path(folder) / "node.log") as node:
            yield Sockets(*(node.endpoints[name] for name in Sockets._fields))


def _settings(
    is_stories: bool, chunk_frames: int | None, layout: LayoutName | None, compare: Compared | None
) -> list[Setting]:
    """The settings of the streams. Raises ValueError for a chunk size that no node has, and for one too many."""
    if compare == "chunks" and chunk_frames is not None:
        raise ValueError("a comparison of chunk sizes has all of them: leave out --chunk-frames")
    if compare == "layouts" and layout is not None:
        raise ValueError("a comparison of layouts has both: leave out --layout")
    if chunk_frames is not None and chunk_frames not in CHUNK_FRAMES:
        raise ValueError(f"chunk frames are one of {', '.join(map(str, CHUNK_FRAMES))}, got {chunk_frames}")
    default_frames = STORIES_CHUNK_FRAMES if is_stories else ROUNDS_CHUNK_FRAMES
    if compare == "retention":
        default_frames = RECALL_CHUNK_FRAMES
    sizes = CHUNK_FRAMES if compare == "chunks" else (chunk_frames or default_frames,)
    if layout is None:
        layout = "both" if compare == "layouts" or (is_stories and not compare) else "native"
    layouts: tuple[Layout, ...] = LAYOUTS if layout == "both" else (layout,)
    keepings = KEEPINGS if compare == "retention" else (EVERYTHING,)
    return [Setting(each, size, keeping) for each in layouts for size in sizes for keeping in keepings]


def _parts(is_stories: bool, extent: Extent, settings: list[Setting], compare: Compared | None) -> list[Part]:
    """What is shown. Raises ValueError for what does not fit together."""
    if compare == "retention":
        return recall(extent.seed, extent.num_streams, extent.lengths, extent.num_questions, settings)
    if compare:
        # A story is as long in every setting as its chunks would be of the usual size.
        size = settings[0].chunk_frames if compare == "layouts" else STORIES_CHUNK_FRAMES
        num_frames = [size * length for length in extent.lengths]
        return comparison(extent.seed, extent.num_streams, num_frames, extent.num_questions, settings)
    if is_stories:
        return stories_scenario(extent.seed, extent.num_streams, extent.lengths, extent.num_questions, settings)
    return [part for setting in settings for part in rounds_scenario(extent.seed, extent.num_rounds, setting)]


def _lengths(text: str) -> list[int]:
    lengths = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if min(lengths) < 1:
        raise typer.BadParameter(f"lengths are numbers of chunks, as in 1,8,24; got {text}", param_hint="--chunks")
    return lengths


def _draw(report: Report, path: Path) -> None:
    title = f"{report.model}: {report.score.all} answers are right"
    if report.recall:
        plot_recall(report.recall, path, f"{report.model}: what is still known, by how it is kept")
    elif report.comparison:
        plot_settings(report.comparison, path, title)
    else:
        plot_lengths(report.score, path, title)
    typer.echo(f"{path}: drawn", err=True)
