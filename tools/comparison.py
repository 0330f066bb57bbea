"""Whether a request that is repeated comes to the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from msgspec import UNSET

from ..protocol.messages import Answer, Ask, Choice
from .session_plan import Act

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


def compared(act: Act, recorded: Answer | Choice, now: Answer | Choice) -> Outcome:
    """Whether an answer is the one that was recorded, from a memory of the same size, and left no trace."""
    if not now.memory.unchanged:
        return outcome_of(act, "different", "the memory was not the same after it", now)
    before, after = recorded.memory, now.memory
    if (before.num_frames, before.num_tokens) != (after.num_frames, after.num_tokens):
        sizes = f"{after.num_frames} frames of {after.num_tokens} tokens"
        reason = f"the memory has {sizes} instead of {before.num_frames} of {before.num_tokens}"
        return outcome_of(act, "different", reason, now)
    if isinstance(act.data, Ask) and act.data.temperature > 0 and act.data.seed is UNSET:
        return outcome_of(act, "not compared", "its temperature is above 0 and it has no seed", now)
    if _text(recorded) != _text(now):
        return outcome_of(act, "different", "another answer", now)
    return outcome_of(act, "same", "", now)


def outcome_of(act: Act, status: Status, reason: str, now: Answer | Choice | None = None) -> Outcome:
    """What became of a request, with what it came to before and, where it did, now."""
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
