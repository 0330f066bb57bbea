"""What a recorded session consists of, and when each of its requests is to be repeated.

A question is asked when the node's memory ends with the frame with which it ended when the question was answered
first, and the frames after it wait until it is answered: so the answer depends on nothing but the node.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from msgspec import UNSET

from ..protocol.messages import Answer, Choice, Hello, Mark
from .session_file import FrameEntry, ReplyEntry, RequestEntry, SessionReader, TelemetryEntry

# After these, no frame that came before them is the end of the memory, unless a mark held it.
FORGETTING = frozenset({"reset", "rollback", "stream_remove"})


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
    earliest: dict[str, int] = {}  # by stream: nothing moves back across a rollback
    for entry in entries:
        if isinstance(entry, FrameEntry):
            num_before += 1
        elif isinstance(entry, RequestEntry):
            reply = replies.get(_name(entry.request))
            last = _last_known(entry, reply, frames)
            place = num_before if last is None else max(last + 1, earliest.get(entry.request.data.stream, 0))
            act = Act(place, entry, reply)
            acts.append(act)
            if entry.endpoint in FORGETTING and act.failure is None:
                earliest[entry.request.data.stream] = num_before
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
