"""Repeats a recorded session: the same frames to a node, the same questions, and whether it answers as it did."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from msgspec import UNSET

from ..protocol.client import NodeClient
from ..protocol.errors import ErrorCode, NodeError
from ..protocol.messages import Answer, Ask, AskChoice, CacheInfo, Choice, FrameHeader
from .comparison import Outcome, compared, outcome_of
from .frame_sender import FrameSender
from .link import stats_of
from .quantity import reasons_text
from .session_file import Entry, FrameEntry, SessionError
from .session_plan import FORGETTING, Act, Plan

QUESTIONS = frozenset({"ask", "ask_choice"})
POLL_S = 0.005
# Frames of a stream that may be on their way: below the ring of a node with default settings.
MAX_PENDING = 16
LOOK_EVERY = 4


@dataclass(eq=False)
class Repeated:
    """What was repeated so far."""

    num_sent: Counter[str] = field(default_factory=Counter)  # by stream
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def num_different(self) -> int:
        return sum(outcome.status == "different" for outcome in self.outcomes)


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
            self.repeated.outcomes.append(outcome_of(act, "different", trouble))

    def _asked_again(self, act: Act) -> Outcome:
        if act.failure is not None:
            return outcome_of(act, "not compared", act.failure)
        if act.data.as_of is UNSET:
            self._settle(act.data.stream)
        try:
            now = self._ask(act.data)
        except NodeError as error:
            return outcome_of(act, "different", f"now ends with {error.code}")
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
        elif stream in self._newest:
            self._keep_up(stream)  # a frame still on its way would come after it
        if act.entry.endpoint in FORGETTING:
            self._newest.pop(stream, None)
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
        """Wait until the memory ends with the last picture that was sent, or with one that looked like it.

        Where that does not happen in time, the memory will be another one, as the comparison then says.
        """
        if stream not in self._newest:
            return
        header, seq = self._newest[stream]

        def is_settled() -> bool:
            cache: CacheInfo = self._node.cache_info(stream)
            return (cache.newest_seq == seq and cache.newest_ns == header.ts) or cache.seen_until_ns == header.ts

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

    @contextmanager
    def held(self) -> Iterator[None]:
        """For the time of a `with`, no time passes for the frames."""
        began = time.monotonic()
        yield
        self._started += time.monotonic() - began


def _until(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True
