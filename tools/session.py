"""Repeating a recorded session on the command line."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import typer

from ..protocol.client import NodeClient
from ..protocol.errors import OnlookerError
from ..protocol.messages import Hello
from .commands import EXIT_INTERRUPTED
from .connection import Keys, open_client, wait_ready
from .interrupt import ending_on_signal
from .quantity import reasons_text

if TYPE_CHECKING:
    from .comparison import Outcome
    from .session_replay import Repeated

MAX_SHOWN = 100  # characters of a question or an answer

_STYLES = {"same": "green", "different": "red", "not compared": "yellow"}


class DifferenceError(OnlookerError):
    """The node does not answer as it did."""


@dataclass(frozen=True, slots=True)
class Way:
    """How a session reaches the node."""

    frames: str
    ask: str
    control: str
    keys: Keys
    timeout_s: float


def replay_session(path: Path, way: Way, *, rate: float, resets: bool, is_json: bool) -> None:
    """Send a session's frames again, ask its questions again, and say which answers are others.

    Raises DifferenceError if there are any, SessionError for a file that is no session, and the client's errors.
    """
    from .frame_sender import FrameSender
    from .session_file import SessionReader  # needs the extra `record`
    from .session_plan import make_plan
    from .session_replay import Repetition

    if rate < 0:
        raise typer.BadParameter(f"it is 0 or above, got {rate}", param_hint="--rate")
    if not path.is_file():
        raise typer.BadParameter(f"{path}: no such file", param_hint="VIDEO...")
    stop = threading.Event()
    with SessionReader(path) as reader, open_client(way.ask, way.control, way.keys, way.timeout_s) as node:
        plan = make_plan(reader)
        wait_ready(node, way.timeout_s)
        _compare_nodes(plan.hello, node)
        with FrameSender(way.frames, way.keys, way.timeout_s) as sender, ending_on_signal(stop):
            repetition = Repetition(plan, node, sender, rate=rate, timeout_s=way.timeout_s)
            repetition.prepare(resets=resets)
            if plan.streams:
                sender.wait_for_node(plan.streams[0])
            repetition.run(reader.entries(), stop)
    _report(repetition.repeated, is_json)
    if stop.is_set():
        raise typer.Exit(EXIT_INTERRUPTED)
    if num := repetition.repeated.num_different:
        raise DifferenceError(f"{num} of {len(repetition.repeated.outcomes)} are not as they were recorded")


def _compare_nodes(recorded: Hello | None, node: NodeClient) -> None:
    """Say what may be why answers are others."""
    now = node.hello()
    for name in ("model", "dtype", "device", "version"):
        before = None if recorded is None else getattr(recorded, name)
        if before not in (None, getattr(now, name)):
            typer.echo(f"{name}: recorded with {before}, replayed with {getattr(now, name)}", err=True)


def _report(repeated: Repeated, is_json: bool) -> None:
    if is_json:
        facts = {"frames": repeated.num_sent, "outcomes": repeated.outcomes, "different": repeated.num_different}
        typer.echo(msgspec.json.encode(facts).decode())
        return
    for outcome in repeated.outcomes:
        typer.secho(f"{outcome.status:<13}", fg=_STYLES[outcome.status], nl=False)
        typer.echo(_outcome_text(outcome))
    typer.echo(f"frames sent: {reasons_text(repeated.num_sent) or 'none'}; {_sum_text(repeated)}")


def _outcome_text(outcome: Outcome) -> str:
    text = f"{outcome.stream}: {_short(outcome.question) or outcome.endpoint}"
    if outcome.recorded == outcome.now:
        text += f" \N{RIGHTWARDS ARROW} {_short(outcome.now)}"
    elif outcome.now:
        text += f" \N{RIGHTWARDS ARROW} {_short(outcome.now)}, not {_short(outcome.recorded)}"
    return text + (f" ({outcome.reason})" if outcome.reason else "")


def _sum_text(repeated: Repeated) -> str:
    statuses = [outcome.status for outcome in repeated.outcomes]
    counted = [f"{statuses.count(status)} {status}" for status in _STYLES if status in statuses]
    return "asked again: " + (", ".join(counted) or "nothing")


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_SHOWN else f"{line[: MAX_SHOWN - 1]}\N{HORIZONTAL ELLIPSIS}"
