"""`onlooker ask`: questions about what a stream has shown.

    onlooker ask "What shape is it?" --choice circle --choice square

The answer goes to standard output; what it knew, how long it took and the proof that the memory is unchanged
go to standard error. Without a question, questions are read line by line.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated

import msgspec
import typer

from ..protocol.client import NodeClient
from ..protocol.errors import NodeError, NoReplyError, OnlookerError
from ..protocol.messages import Answer, AnswerTiming, Choice, PartialAnswer, Provenance
from ..protocol.sockets import ASK_ENDPOINT, CONTROL_ENDPOINT
from .commands import EXIT_FAILED, EXIT_NO_REPLY
from .connection import (
    AskOption,
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
    wait_ready,
)
from .quantity import NS_PER_S, ms_text, seconds_text, time_text

ROUNDING_S = 1e-3


@dataclass(frozen=True, slots=True)
class Manner:
    """How questions are to be answered and shown."""

    options: tuple[str, ...]
    as_of: str | None
    max_new_tokens: int
    temperature: float
    seed: int | None
    is_json: bool
    is_streamed: bool


class TraceError(NodeError):
    """The memory was not the same after a question as before it."""


def ask(
    question: Annotated[str | None, typer.Argument(help="The question; without one, a prompt.")] = None,
    stream: StreamOption = None,
    choice: Annotated[
        list[str] | None, typer.Option("--choice", "-c", help="A possible answer; give two or more.")
    ] = None,
    as_of: Annotated[
        str | None,
        typer.Option(
            "--as-of", metavar="MARK", help="Answer from the memory as it was at a mark.", callback=checked_name
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest word each time.")] = 0.0,
    seed: Annotated[int | None, typer.Option(min=0, help="Makes a temperature above 0 repeatable.")] = None,
    is_json: JsonOption = False,
    no_stream: Annotated[bool, typer.Option("--no-stream", help="Show the answer when it is whole.")] = False,
    ask_endpoint: AskOption = ASK_ENDPOINT,
    control: ControlOption = CONTROL_ENDPOINT,
    server_key: ServerKeyOption = None,
    client_key: ClientKeyOption = None,
    timeout_s: TimeoutOption = 60.0,
) -> None:
    """Ask about what a stream has shown."""
    if choice and len(choice) < 2:
        raise typer.BadParameter("give --choice at least twice")
    if question is not None and not question.strip():
        raise typer.BadParameter("a question is more than white space", param_hint="QUESTION")
    if not all(option.strip() for option in choice or ()):
        raise typer.BadParameter("an answer is more than white space", param_hint="--choice")
    manner = Manner(
        options=tuple(choice or ()),
        as_of=as_of,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        is_json=is_json,
        is_streamed=not (no_stream or is_json),
    )
    with open_client(ask_endpoint, control, Keys(server_key, client_key), timeout_s) as client:
        wait_ready(client, timeout_s)
        asker = _Asker(client, stream or only_stream(client), manner)
        if question is not None:
            asker.ask(question)
        else:
            _converse(asker)


class _Asker:
    """Asks a node about one stream, and prints what comes back."""

    def __init__(self, client: NodeClient, stream: str, manner: Manner) -> None:
        self._client = client
        self.stream = stream
        self._manner = manner
        self._shown_notices: set[str] = set()

    def check_stream(self) -> None:
        """Raise UNKNOWN_STREAM before anybody thinks of a question."""
        self._client.cache_info(self.stream)

    def ask(self, question: str) -> None:
        """Print the reply to one question. Raises the client's errors, and TraceError."""
        reply = self._choose(question) if self._manner.options else self._answer(question)
        if self._manner.is_json:
            facts = {"stream": self.stream, "question": question, "reply": msgspec.to_builtins(reply)}
            typer.echo(msgspec.json.encode(facts).decode())
        else:
            _print_facts(reply)
            self._print_notice(reply)
        if not reply.memory.unchanged:
            raise TraceError("INTERNAL", f"the question changed the memory of {self.stream}")

    def _print_notice(self, reply: Answer | Choice) -> None:
        """Print the node's note on its answers, once."""
        if isinstance(reply.notice, str) and reply.notice not in self._shown_notices:
            self._shown_notices.add(reply.notice)
            _print_aside(f"note: {reply.notice}")

    def _answer(self, question: str) -> Answer:
        manner = self._manner
        settings = {
            "max_new_tokens": manner.max_new_tokens,
            "temperature": manner.temperature,
            "seed": manner.seed,
            "as_of": manner.as_of,
        }
        if manner.is_streamed:
            return _print_pieces(self._client.ask_stream(self.stream, question, **settings))
        answer = self._client.ask(self.stream, question, **settings)
        if not manner.is_json:
            typer.echo(visible(answer.text))
        return answer

    def _choose(self, question: str) -> Choice:
        reply = self._client.ask_choice(self.stream, question, self._manner.options, as_of=self._manner.as_of)
        if not self._manner.is_json:
            typer.echo(reply.option)
            for score in sorted(reply.scores, key=lambda score: -score.probability):
                _print_aside(f"  {score.probability:6.1%}  {score.option}")
        return reply


def _print_pieces(pieces: Iterator[PartialAnswer | Answer]) -> Answer:
    """Print an answer while it grows. Leaving early, as by Ctrl-C, cancels the question."""
    shown = ""
    try:
        with closing(pieces):  # pyright: ignore[reportArgumentType]
            for piece in pieces:
                if isinstance(piece, Answer):
                    # Pieces can be missing after a lost connection, never from the whole answer.
                    rest = piece.text.removeprefix(shown)
                    typer.echo(visible(rest if piece.text.startswith(shown) else f"\n{piece.text}"))
                    return piece
                typer.echo(visible(piece.delta), nl=False)
                sys.stdout.flush()
                shown += piece.delta
    except OnlookerError:
        if shown:
            typer.echo()  # what is said about it begins on a line of its own
        raise
    raise AssertionError("the pieces of an answer end with the whole of it")


def _converse(asker: _Asker) -> None:
    """Ask every line of standard input; an error ends a question, not the conversation."""
    status = 0
    if sys.stdin.isatty():
        asker.check_stream()
    for question in _questions(asker.stream):
        try:
            asker.ask(question)
        except KeyboardInterrupt:
            _print_aside("\n(cancelled)")
        except (NodeError, NoReplyError) as error:
            _print_aside(f"onlooker: {error}")
            status = EXIT_NO_REPLY if isinstance(error, NoReplyError) else EXIT_FAILED
    if status:
        raise typer.Exit(status)


def _questions(stream: str) -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from filter(None, map(str.strip, sys.stdin))
        return
    if importlib.util.find_spec("readline"):
        importlib.import_module("readline")  # line editing and history, where Python has them
    _print_aside(f"Ask about {stream}; an empty line or Ctrl-D ends.")
    while True:
        try:
            question = input("? ").strip()
        except EOFError:
            _print_aside("")
            return
        if not question:
            return
        yield question


def _print_facts(reply: Answer | Choice) -> None:
    _print_aside(knowledge_text(reply.memory))
    _print_aside(timing_text(reply.timing))
    _print_aside(proof_text(reply.memory))


def seconds_known(memory: Provenance) -> float:
    """How long the stretch is that an answer knew, in stream time where the node tells it."""
    if isinstance(memory.seconds, float):
        return memory.seconds
    return (memory.until_ns - memory.from_ns) / NS_PER_S


def knowledge_text(memory: Provenance) -> str:
    """What an answer knew."""
    span = seconds_text(seconds_known(memory))
    newest = time_text(memory.until_ns, memory.ts_kind)
    same = ""
    if isinstance(memory.seen_until_ns, int):
        same = f", and nothing new until {time_text(memory.seen_until_ns, memory.ts_kind)}"
    gone = f", {memory.num_forgotten_frames} forgotten{_gaps_text(memory)}" if memory.num_forgotten_frames else ""
    return f"knew {memory.num_frames} frames of {span}, the newest of {newest}{same} ({memory.num_tokens} tokens){gone}"


def _gaps_text(memory: Provenance) -> str:
    """Until when the memory is not whole; no time of a file that has started over tells that."""
    if _has_started_over(memory):
        return f": {seconds_text(memory.seconds_forgotten)} of a file that has started over"
    ends = [list(alike)[-1] for _, alike in groupby(memory.ranges, lambda r: r.known)]
    texts = [f"{r.known} until {time_text(r.until_ns, memory.ts_kind)}" for r in ends if r.known != "whole"]
    return f": {', '.join(texts)}" if texts else ""


def _has_started_over(memory: Provenance) -> bool:
    """Whether more went by of a file than its times have room for."""
    span_s, until_s = (memory.until_ns - memory.from_ns) / NS_PER_S, memory.until_ns / NS_PER_S
    is_longer = seconds_known(memory) > span_s + ROUNDING_S or memory.seconds_forgotten > until_s + ROUNDING_S
    return memory.ts_kind == "media" and is_longer


def timing_text(timing: AnswerTiming) -> str:
    """How long an answer took."""
    return (
        f"first token {ms_text(timing.first_token_ms)}, all {ms_text(timing.total_ms)} "
        f"(queue {ms_text(timing.queue_ms)}, prefill {ms_text(timing.prefill_ms)}, "
        f"decode {ms_text(timing.decode_ms)})"
    )


def proof_text(memory: Provenance) -> str:
    """Whether asking left a trace."""
    if memory.unchanged:
        return f"memory unchanged ({memory.fingerprint_after})"
    return f"MEMORY CHANGED from {memory.fingerprint_before} to {memory.fingerprint_after}"


def visible(text: str) -> str:
    """An answer as a terminal may show it: what would steer the terminal is made visible instead."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)


def _print_aside(text: str) -> None:
    typer.secho(text, err=True, dim=sys.stderr.isatty())
