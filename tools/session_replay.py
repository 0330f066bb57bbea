"""Repeats a recorded session: the same frames to a node, the same questions, and whether it answers as it did.

A question is asked when the node's memory ends with the frame with which it ended when the question was answered
first, and the frames after it wait until it is answered: so the answer depends on nothing but the node.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import zmq
from msgspec import UNSET
from msgspec.structs import replace

from ..protocol.client import NodeClient
from ..protocol.codec import encode_frame
from ..protocol.curve import become_client, load_credentials
from ..protocol.errors import ErrorCode, NodeError, NoReplyError
from ..protocol.messages import Answer, Ask, AskChoice, CacheInfo, Choice, FrameHeader, Hello, Mark
from ..protocol.sockets import FRAMES_HWM, connect, open_socket
from .connection import Keys
from .link import NoSubscriberError, stats_of
from .quantity import reasons_text
from .session_file import Entry, FrameEntry, ReplyEntry, RequestEntry, SessionError, SessionReader, TelemetryEntry

QUESTIONS = frozenset({"ask", "ask_choice"})
POLL_S = 0.005
# Frames of a stream that may be on their way: below the ring of a node with default settings.
MAX_PENDING = 16
LOOK_EVERY = 4
CLOSING_MS = 1000
MAX_SUBSCRIPTION_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Act:
    """A request of the session, and the number of frames that come before it."""

    num_frames: int
    entry: RequestEntry
    reply: ReplyEntry | None

    @property
    def data(self) -> Any:
        return self.entry.request.data

    @property
    def failure(self) -> str | None:
        """Why it had no result; None if it had one."""
        if self.reply is None:
            return "was never answered"
        error = self.reply.reply.error
        return None if error is UNSET else f"ended with {error.code}"


@dataclass(frozen=True, slots=True)
class Plan:
    """What a session consists of, without its pictures."""

    acts: tuple[Act, ...]
    streams: tuple[str, ...]  # in the order of their first frames
    num_frames: int
    hello: Hello | None


def make_plan(reader: SessionReader) -> Plan:
    """Find out when each request is to be repeated. Raises SessionError."""
    entries = list(reader.entries(has_payloads=False))
    frames = [entry for entry in entries if isinstance(entry, FrameEntry)]
    replies = {_name(entry.reply): entry for entry in entries if isinstance(entry, ReplyEntry)}
    hellos = [e.record for e in entries if isinstance(e, TelemetryEntry) and isinstance(e.record, Hello)]
    acts: list[Act] = []
    num_before = 0
    for entry in entries:
        if isinstance(entry, FrameEntry):
            num_before += 1
        elif isinstance(entry, RequestEntry):
            reply = replies.get(_name(entry.request))
            last = _last_known(entry, reply, frames)
            acts.append(Act(num_before if last is None else last + 1, entry, reply))
    return Plan(
        acts=tuple(sorted(acts, key=lambda act: (act.num_frames, act.entry.at_ns))),
        streams=tuple(dict.fromkeys(frame.header.stream for frame in frames)),
        num_frames=len(frames),
        hello=hellos[0] if hellos else None,
    )


def _name(message: Any) -> tuple[str, str]:
    return message.session, message.id


def _last_known(entry: RequestEntry, reply: ReplyEntry | None, frames: list[FrameEntry]) -> int | None:
    """The index of the last frame that the memory held for a question or a mark; None where that does not matter."""
    if reply is None or reply.reply.data is UNSET or getattr(entry.request.data, "as_of", UNSET) is not UNSET:
        return None
    is_newest = _newest_of(reply.reply.data)
    if is_newest is None:
        return None
    stream = entry.request.data.stream
    before = [n for n, frame in enumerate(frames) if frame.at_ns < reply.at_ns and frame.header.stream == stream]
    last = next((place for place in range(len(before) - 1, -1, -1) if is_newest(frames[before[place]])), None)
    if last is None:
        return None
    # The end of a stream adds nothing to its memory, but completes the last chunk.
    if last + 1 < len(before) and frames[before[last + 1]].header.eos:
        last += 1
    return before[last]


def _newest_of(data: Any) -> Callable[[FrameEntry], bool] | None:
    if isinstance(data, Answer | Choice):
        seq = data.memory.until_seq
        return lambda frame: frame.seq == seq and not frame.header.eos
    if isinstance(data, Mark) and isinstance(data.until_ns, int):
        until_ns = data.until_ns
        return lambda frame: frame.header.ts == until_ns and not frame.header.eos
    return None


Status = Literal["same", "different", "not compared"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a request that was repeated."""

    endpoint: str
    stream: str
    question: str
    status: Status
    reason: str
    recorded: str
    now: str


@dataclass(eq=False)
class Repeated:
    """What was repeated so far."""

    num_sent: Counter[str] = field(default_factory=Counter)  # by stream
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def num_different(self) -> int:
        return sum(outcome.status == "different" for outcome in self.outcomes)


class FrameSender:
    """Sends frames with the numbers they had, to a node that listens; sessions are new, as they must be."""

    def __init__(self, endpoint: str, keys: Keys, timeout_s: float) -> None:
        """Raises OSError or ValueError for unusable keys."""
        credentials = load_credentials(keys.server, keys.client)
        self._endpoint, self._timeout_s = endpoint, timeout_s
        self._sessions: defaultdict[str, str] = defaultdict(lambda: uuid.uuid4().hex)
        self._open: dict[str, tuple[FrameHeader, int]] = {}  # the last frame of a session that has not ended
        self._context = zmq.Context()
        self._socket = open_socket(
            self._context, zmq.XPUB, max_message_bytes=MAX_SUBSCRIPTION_BYTES, linger_ms=CLOSING_MS, hwm=FRAMES_HWM
        )
        self._socket.set(zmq.XPUB_NODROP, 1)
        self._socket.set(zmq.SNDTIMEO, int(timeout_s * 1000))
        if credentials is not None:
            become_client(self._socket, credentials.server_public, credentials.pair)
        connect(self._socket, endpoint)

    def wait_for_node(self, stream: str) -> None:
        """Wait until the node asks for frames. Raises NoSubscriberError."""
        if not self._socket.poll(int(self._timeout_s * 1000)):
            raise NoSubscriberError(stream, self._endpoint, self._timeout_s)
        self._socket.recv()

    def send(self, frame: FrameEntry) -> FrameHeader:
        """Send a frame and return the header it got. Raises NoReplyError if the node takes none for long."""
        header = replace(frame.header, session=self._sessions[frame.header.session])
        try:
            self._socket.send_multipart(encode_frame(header, frame.seq, frame.payload))
        except zmq.Again as error:
            raise NoReplyError(self._endpoint, self._timeout_s) from error
        self._open[header.session] = header, frame.seq
        if header.eos:
            del self._open[header.session]
        return header

    def close(self) -> None:
        """Say that the sessions have ended which the recording left open, so that the next may begin."""
        try:
            for header, seq in self._open.values():
                end = FrameHeader(session=header.session, stream=header.stream, ts=header.ts, eos=True)
                self._socket.send_multipart(encode_frame(end, seq + 1))
        except zmq.Again as error:
            raise NoReplyError(self._endpoint, self._timeout_s) from error
        finally:
            self._socket.close()
            self._context.term()

    def __enter__(self) -> FrameSender:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Repetition:
    """Plays a session to a node and asks again; `run` may be called once."""

    def __init__(self, plan: Plan, node: NodeClient, sender: FrameSender, *, rate: float, timeout_s: float) -> None:
        """`rate` is times as fast as recorded, 0 as fast as the node takes it."""
        self._plan, self._node, self._sender = plan, node, sender
        self._rate, self._timeout_s = rate, timeout_s
        self.repeated = Repeated()
        self._newest: dict[str, tuple[FrameHeader, int]] = {}  # the last picture that was sent, by stream

    def prepare(self, *, resets: bool) -> None:
        """See to it that the streams are there and remember nothing. Raises SessionError, and the client's errors."""
        known = self._node.stream_names()
        added_later = {act.data.stream for act in self._plan.acts if act.entry.endpoint == "stream_add"}
        for stream in self._plan.streams:
            if stream in known:
                self._wait_for_silence(stream)
                self._empty(stream, resets)
            elif stream not in added_later:
                message = f"the node has no stream {stream}; add it with the settings it had: onlooker add {stream}"
                raise NodeError(ErrorCode.UNKNOWN_STREAM, message)

    def _wait_for_silence(self, stream: str) -> None:
        """Wait until no camera has the stream. One that was cut off keeps it for some seconds."""
        if not _until(lambda: stats_of(self._node, stream).state != "online", self._timeout_s):
            raise SessionError(f"another camera publishes stream {stream}")

    def _empty(self, stream: str, resets: bool) -> None:
        if resets:
            self._node.reset(stream)
        elif num := self._node.cache_info(stream).num_frames:
            raise SessionError(f"stream {stream} remembers {num} frames of something else; --reset forgets them")

    def run(self, entries: Iterator[Entry], stop: threading.Event) -> None:
        """Repeat everything in its order, until `stop` is set. Raises the errors of the client, and SessionError."""
        acts = list(self._plan.acts)
        pace = _Pace(self._rate)
        num_frames = 0
        for entry in entries:
            if not isinstance(entry, FrameEntry):
                continue
            while acts and acts[0].num_frames <= num_frames and not stop.is_set():
                with pace.held():
                    self._repeat(acts.pop(0))
            if not pace.wait(entry.at_ns, stop):
                return
            self._send(entry)
            num_frames += 1
        for act in acts:
            if not stop.is_set():
                self._repeat(act)

    def _send(self, entry: FrameEntry) -> None:
        stream = entry.header.stream
        header = self._sender.send(entry)
        if not header.eos:
            self._newest[stream] = header, entry.seq
            self.repeated.num_sent[stream] += 1
            if self.repeated.num_sent[stream] % LOOK_EVERY == 0:
                self._keep_up(stream)

    def _keep_up(self, stream: str) -> None:
        """Wait until the node has what was sent, and few of them pending. Raises SessionError."""
        header, seq = self._newest[stream]

        def has_kept_up() -> bool:
            frames = stats_of(self._node, stream).frames
            is_there = frames.last_session == header.session and frames.last_seq is not UNSET and frames.last_seq >= seq
            return is_there and frames.pending <= MAX_PENDING

        if not _until(has_kept_up, self._timeout_s):
            frames = stats_of(self._node, stream).frames
            dropped = reasons_text(frames.dropped) or "none"
            raise SessionError(f"stream {stream}: the node does not take the frames (dropped {dropped})")

    # Requests

    def _repeat(self, act: Act) -> None:
        if act.entry.endpoint in QUESTIONS:
            self.repeated.outcomes.append(self._asked_again(act))
        elif act.failure is None and (trouble := self._done_again(act)):
            self.repeated.outcomes.append(_outcome(act, "different", trouble))

    def _asked_again(self, act: Act) -> Outcome:
        if act.failure is not None:
            return _outcome(act, "not compared", act.failure)
        if act.data.as_of is UNSET:
            self._settle(act.data.stream)
        try:
            now = self._ask(act.data)
        except NodeError as error:
            return _outcome(act, "different", f"now ends with {error.code}")
        recorded = act.reply.reply.data if act.reply else None
        assert isinstance(recorded, Answer | Choice)  # there was no failure
        return compared(act, recorded, now)

    def _ask(self, data: Ask | AskChoice) -> Answer | Choice:
        given = {name: getattr(data, name) for name in data.__struct_fields__}
        settings = {name: value for name, value in given.items() if value is not UNSET}
        return self._node.ask(**settings) if isinstance(data, Ask) else self._node.ask_choice(**settings)

    def _done_again(self, act: Act) -> str | None:
        """Repeat what is no question, and say what went wrong."""
        stream = act.data.stream
        if act.entry.endpoint == "mark":
            self._settle(stream)
        do: dict[str, Callable[[], object]] = {
            "reset": lambda: self._node.reset(stream),
            "mark": lambda: self._node.mark(stream, act.data.name),
            "rollback": lambda: self._node.rollback(stream, act.data.name),
            "mark_delete": lambda: self._node.delete_mark(stream, act.data.name),
            "stream_add": lambda: self._node.add_stream(act.data),
            "stream_remove": lambda: self._node.remove_stream(stream),
            "stream_pause": lambda: self._node.pause_stream(stream),
            "stream_resume": lambda: self._node.resume_stream(stream),
        }
        try:
            do[act.entry.endpoint]()
        except NodeError as error:
            if act.entry.endpoint == "stream_add" and error.code == ErrorCode.STREAM_EXISTS:
                return None  # as configured there, which the one who repeats the session answers for
            return f"now ends with {error.code}"
        return None

    def _settle(self, stream: str) -> None:
        """Wait until the memory ends with the last picture that was sent.

        Where that does not happen in time, the memory will be another one, as the comparison then says.
        """
        if stream not in self._newest:
            return
        header, seq = self._newest[stream]

        def is_settled() -> bool:
            cache: CacheInfo = self._node.cache_info(stream)
            return cache.newest_seq == seq and cache.newest_ns == header.ts

        _until(is_settled, self._timeout_s)


class _Pace:
    """When each frame is due."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._started = time.monotonic()
        self._first_ns: int | None = None

    def wait(self, at_ns: int, stop: threading.Event) -> bool:
        """Wait until a frame is due; False if that is not to be any more."""
        if self._first_ns is None:
            self._first_ns, self._started = at_ns, time.monotonic()
        if self._rate == 0:
            return not stop.is_set()
        due = self._started + (at_ns - self._first_ns) / 1e9 / self._rate
        return not stop.wait(max(0.0, due - time.monotonic()))

    def held(self) -> _Hold:
        """For the time of a `with`, no time passes for the frames."""
        return _Hold(self)

    def shift(self, seconds: float) -> None:
        self._started += seconds


class _Hold:
    def __init__(self, pace: _Pace) -> None:
        self._pace = pace

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *exc: object) -> None:
        self._pace.shift(time.monotonic() - self._began)


def _until(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def compared(act: Act, recorded: Answer | Choice, now: Answer | Choice) -> Outcome:
    """Whether an answer is the one that was recorded, from a memory of the same size, and left no trace."""
    if not now.memory.unchanged:
        return _outcome(act, "different", "the memory was not the same after it", now)
    before, after = recorded.memory, now.memory
    if (before.num_frames, before.num_tokens) != (after.num_frames, after.num_tokens):
        sizes = f"{after.num_frames} frames of {after.num_tokens} tokens"
        reason = f"the memory has {sizes} instead of {before.num_frames} of {before.num_tokens}"
        return _outcome(act, "different", reason, now)
    if isinstance(act.data, Ask) and act.data.temperature > 0 and act.data.seed is UNSET:
        return _outcome(act, "not compared", "its temperature is above 0 and it has no seed", now)
    if _text(recorded) != _text(now):
        return _outcome(act, "different", "another answer", now)
    return _outcome(act, "same", "", now)


def _outcome(act: Act, status: Status, reason: str, now: Answer | Choice | None = None) -> Outcome:
    recorded = None if act.reply is None else act.reply.reply.data
    return Outcome(
        endpoint=act.entry.endpoint,
        stream=act.data.stream,
        question=getattr(act.data, "question", ""),
        status=status,
        reason=reason,
        recorded=_text(recorded),
        now=_text(now),
    )


def _text(reply: object) -> str:
    return reply.text if isinstance(reply, Answer) else reply.option if isinstance(reply, Choice) else ""
