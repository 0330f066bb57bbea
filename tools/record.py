"""`onlooker record`: a session with a node, written into a file that Foxglove opens and `onlooker replay` repeats.

    onlooker record session.mcap
    onlooker camera 0 --stream desk --frames tcp://127.0.0.1:6556
    onlooker ask "What is on the desk?" --ask tcp://127.0.0.1:6560
    onlooker replay session.mcap --reset

It sits between the node and those who use it, because nobody else sees both their frames and their questions:
cameras, clients and tools connect to it as they would to the node. What is in the file is what the node was given.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from ..protocol.client import NodeClient
from ..protocol.codec import ReceivedFrame, reply_data, request_data
from ..protocol.endpoints import ENDPOINTS
from ..protocol.errors import DecodeError, OnlookerError
from ..protocol.messages import UNSET, Reply, Request
from ..protocol.sockets import ASK_ENDPOINT, CONTROL_ENDPOINT, FRAMES_ENDPOINT, TELEMETRY_ENDPOINT, is_loopback
from ..protocol.telemetry import TelemetrySubscriber
from .connection import (
    AskOption,
    ClientKeyOption,
    ControlOption,
    FramesOption,
    JsonOption,
    Keys,
    ServerKeyOption,
    TelemetryOption,
    TimeoutOption,
    endpoint_option,
    open_client,
    wait_ready,
)
from .interrupt import ending_on_signal
from .quantity import bytes_text, reasons_text, seconds_text
from .session_file import RecordedReply, RecordedRequest, SessionWriter
from .tap import Endpoints, Passage, Passed, Replied, Requested, Tap

LISTEN = Endpoints("tcp://127.0.0.1:6556", "tcp://127.0.0.1:6560", "tcp://127.0.0.1:6561")
PASS_S = 0.05
# What decides over what a memory holds, and over answers; all else only looks.
RECORDED = frozenset(
    {
        *("ask", "ask_choice", "reset", "mark", "rollback", "mark_delete"),
        *("stream_add", "stream_remove", "stream_pause", "stream_resume"),
    }
)


class RecordError(OnlookerError):
    """The recording cannot be written, or lacks something that went through."""


@dataclass(eq=False)
class Recorded:
    """What a recording holds."""

    frames: Counter[str] = field(default_factory=Counter)  # by stream
    requests: Counter[str] = field(default_factory=Counter)  # by endpoint
    num_records: int = 0
    unreadable: Counter[str] = field(default_factory=Counter)


class Recorder:
    """Writes down what a tap passed on, and the telemetry beside it."""

    def __init__(self, writer: SessionWriter) -> None:
        self._writer = writer
        self.recorded = Recorded()

    def note(self, passed: Passed) -> None:
        match passed:
            case ReceivedFrame(header, seq, payload):
                self._writer.write_frame(header, seq, payload)
                self.recorded.frames[header.stream] += not header.eos
            case Requested(request) if request.endpoint in RECORDED:
                self._note_request(request)
            case Replied(request, reply) if request.endpoint in RECORDED:
                self._note_reply(request, reply)

    def _note_request(self, request: Request) -> None:
        try:
            data = request_data(request, ENDPOINTS[request.endpoint].request)
        except DecodeError:
            return  # the node refuses it, and it has no part in the session
        noted = RecordedRequest(id=request.id, session=request.session, data=data)
        self._writer.write_request(request.endpoint, noted)
        self.recorded.requests[request.endpoint] += 1

    def _note_reply(self, request: Request, reply: Reply) -> None:
        data: Any = UNSET
        try:
            if reply.status == "ok":
                data = reply_data(reply, ENDPOINTS[request.endpoint].reply)
        except DecodeError:
            self.recorded.unreadable["replies"] += 1
            return
        noted = RecordedReply(
            id=request.id,
            session=request.session,
            status="ok" if reply.status == "ok" else "error",
            data=data,
            error=reply.error,
        )
        self._writer.write_reply(request.endpoint, noted)

    def follow(self, telemetry: TelemetrySubscriber) -> None:
        """Write down the telemetry that has come."""
        while (message := telemetry.receive(0)) is not None:
            self._writer.write_telemetry(message)
            self.recorded.num_records += 1


def record(
    path: Annotated[Path, typer.Argument(metavar="SESSION.mcap", help="The file to write.")],
    listen_frames: Annotated[
        str, endpoint_option("--listen-frames", help="Where cameras connect instead.", default=LISTEN.frames)
    ] = LISTEN.frames,
    listen_ask: Annotated[
        str, endpoint_option("--listen-ask", help="Where questions go instead.", default=LISTEN.ask)
    ] = LISTEN.ask,
    listen_control: Annotated[
        str, endpoint_option("--listen-control", help="Where resets and marks go instead.", default=LISTEN.control)
    ] = LISTEN.control,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    is_json: JsonOption = False,
    frames: FramesOption = FRAMES_ENDPOINT,
    ask: AskOption = ASK_ENDPOINT,
    control: ControlOption = CONTROL_ENDPOINT,
    telemetry: TelemetryOption = TELEMETRY_ENDPOINT,
    server_key: ServerKeyOption = None,
    client_key: ClientKeyOption = None,
    timeout_s: TimeoutOption = 10.0,
) -> None:
    """Record frames, questions, answers and telemetry into an MCAP file, until Ctrl-C."""
    listen = Endpoints(listen_frames, listen_ask, listen_control)
    _check(path, listen, force)
    keys = Keys(server_key, client_key)
    with open_client(ask, control, keys, timeout_s) as client:
        wait_ready(client, timeout_s)
        _warn_of_memory(client)
    started = time.monotonic()
    with (
        TelemetrySubscriber(telemetry, server_key=keys.server, client_key=keys.client) as subscriber,
        Tap(listen, Endpoints(frames, ask, control), keys) as tap,
    ):
        recorded = _record(path, tap, subscriber)
    _report(path, recorded, time.monotonic() - started, is_json)
    _check_complete(recorded, tap.passage)


def _record(path: Path, tap: Tap, telemetry: TelemetrySubscriber) -> Recorded:
    """Record until a signal. Raises RecordError if the file cannot be written."""
    stop = threading.Event()
    try:
        with closing(SessionWriter(path)) as writer, ending_on_signal(stop):
            _say_where(tap.endpoints)
            recorder = Recorder(writer)
            while not stop.is_set():
                for passed in tap.pass_on(PASS_S):
                    recorder.note(passed)
                recorder.follow(telemetry)
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror}; the recording ends here") from error
    return recorder.recorded


def _check(path: Path, listen: Endpoints, force: bool) -> None:
    if path.exists() and not force:
        raise typer.BadParameter(f"{path} is there; --force writes over it", param_hint="SESSION.mcap")
    for option, endpoint in listen._asdict().items():
        if not is_loopback(endpoint):
            message = f"a recorder has no keys of its own and listens on this machine alone, got {endpoint}"
            raise typer.BadParameter(message, param_hint=f"--listen-{option}")


def _warn_of_memory(client: NodeClient) -> None:
    """Answers from what was seen before can be read later, but not repeated."""
    for stats in client.streams():
        if stats.cache.num_frames:
            typer.echo(
                f"stream {stats.stream} holds {stats.cache.num_frames} frames that are not recorded: a replay "
                f"will answer otherwise. To begin with nothing: onlooker reset {stats.stream}",
                err=True,
            )


def _say_where(listening: Endpoints) -> None:
    flags = " ".join(f"--{name} {endpoint}" for name, endpoint in listening._asdict().items())
    typer.echo(f"recording what comes with: {flags}", err=True)


def _report(path: Path, recorded: Recorded, seconds: float, is_json: bool) -> None:
    if is_json:
        facts = {
            "path": str(path),
            "bytes": path.stat().st_size,
            "seconds": seconds,
            "frames": recorded.frames,
            "requests": recorded.requests,
            "telemetry": recorded.num_records,
        }
        typer.echo(msgspec.json.encode(facts).decode())
        return
    typer.echo(
        f"{path}: {bytes_text(path.stat().st_size)} in {seconds_text(seconds)}; "
        f"frames: {reasons_text(recorded.frames) or 'none'}; requests: {reasons_text(recorded.requests) or 'none'}; "
        f"{recorded.num_records} records of telemetry"
    )


def _check_complete(recorded: Recorded, passage: Passage) -> None:
    """Raise RecordError if something is missing from the recording, or from what the node got."""
    if passage.undelivered:
        raise RecordError(f"{passage.undelivered} frames came faster than the node took them, and are lost")
    if unreadable := reasons_text(passage.unreadable + recorded.unreadable):
        raise RecordError(f"what was no message of the protocol was passed on, but not recorded: {unreadable}")
