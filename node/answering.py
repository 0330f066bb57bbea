"""The answering side of the engine: questions from their arrival to their replies."""

import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from msgspec import UNSET

from ..protocol.errors import ErrorCode, NodeError
from ..protocol.messages import Answer, Ask, AskChoice, Choice, QuestionCounters
from .answer import GrowingAnswer, decode
from .branch import Branch, Scratch
from .choice import choose
from .ledger import Snapshot
from .memory import StreamMemory
from .model import VisionLanguageModel
from .outcome import fail, succeed

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Question:
    """A question from its arrival to its reply."""

    request: Ask | AskChoice
    future: Future[Any]
    arrived: float
    deadline: float | None
    on_delta: Callable[[str], None] | None = None
    branch: Branch | None = None
    answer: GrowingAnswer | None = None

    @property
    def is_expired(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline


@dataclass(slots=True)
class _Counts:
    """Questions since the start. Written by the engine thread alone."""

    received: int = 0
    answered: int = 0
    traces: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    first_token_ms: deque[float] = field(default_factory=lambda: deque(maxlen=64))
    total_ms: deque[float] = field(default_factory=lambda: deque(maxlen=64))

    def count(self, reply: Answer | Choice) -> None:
        self.answered += 1
        self.traces += not reply.memory.unchanged
        self.first_token_ms.append(reply.timing.first_token_ms)
        self.total_ms.append(reply.timing.total_ms)

    def fail(self, code: str) -> None:
        self.failed[code] = self.failed.get(code, 0) + 1


class Answering:
    """Questions that wait, and those that are decoded together. For the engine thread alone, but for `counters`.

    `memory_of` gives the memory of a stream, or raises UNKNOWN_STREAM. What is asked about a stream that `is_pinned`
    waits for its next chunk, and is about the memory after that.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        scratch: Scratch,
        memory_of: Callable[[str], StreamMemory],
        is_pinned: Callable[[str], bool],
        *,
        max_waiting: int,
    ) -> None:
        self._model = model
        self._scratch = scratch
        self._memory_of = memory_of
        self._is_pinned = is_pinned
        self._max_waiting = max_waiting
        self._waiting: deque[Question] = deque()
        self._running: list[Question] = []
        self._num_begun = 0  # since the last decode step
        self._counts = _Counts()

    @property
    def can_go_on(self) -> bool:
        """Whether there is something to begin, or to decode."""
        return bool(self._running) or self._next_waiting() is not None

    def _next_waiting(self) -> Question | None:
        """The question to begin next: the first whose stream has not to forget before."""
        if not self._scratch.num_free:
            return None
        return next((question for question in self._waiting if not self._is_pinned(question.request.stream)), None)

    def admit(self, question: Question) -> None:
        """Take a question in, or refuse it at once."""
        self._counts.received += 1
        try:
            if len(self._waiting) >= self._max_waiting:
                raise NodeError(ErrorCode.BUSY, f"{self._max_waiting} questions wait already", retry_after_ms=500)
            memory = self._memory_of(question.request.stream)
            if not self._is_pinned(question.request.stream):  # otherwise it is about the memory after a chunk
                _snapshot(memory, question.request)
        except Exception as error:
            self._finish(question, error)
        else:
            self._waiting.append(question)

    def go_on(self) -> None:
        """Begin a question, or take a step with those that run; new ones can't hold those up for long."""
        question = self._next_waiting()
        if question is not None and not (self._running and self._num_begun >= self._scratch.num_slots):
            self._num_begun += 1
            self._waiting.remove(question)
            self._begin(question)
        else:
            self._num_begun = 0
            self._decode_step()

    def _begin(self, question: Question) -> None:
        """Give a question its branch and prefill it; a choice is answered on the spot."""
        try:
            memory = self._memory_of(question.request.stream)
            snapshot = _snapshot(memory, question.request)
            question.branch = Branch(self._model, memory, snapshot, self._scratch)
            if isinstance(question.request, AskChoice):
                outcome = choose(self._model, question.branch, question.request, arrived=question.arrived)
            else:
                outcome = self._start(question, question.branch, question.request)
        except Exception as error:
            outcome = error
        if outcome is None:
            self._running.append(question)
        else:
            self._finish(question, outcome)

    def _start(self, question: Question, branch: Branch, request: Ask) -> Answer | None:
        """Prefill a free answer; returns it if its first token was its last."""
        question.answer = GrowingAnswer(
            self._model, branch, request, arrived=question.arrived, on_delta=question.on_delta
        )
        question.answer.start()
        return question.answer.result() if question.answer.finish else None

    def _decode_step(self) -> None:
        """One token for every running answer. If the step itself fails, it fails for all of them."""
        questions = list(self._running)
        try:
            answers = [_growing(question) for question in questions]
            logits = decode(self._model, answers)
            likeliest = logits.argmax(-1).tolist()  # the one wait for the device of a step
        except Exception as error:
            for question in questions:
                self._end(question, error)
            return
        for question, answer, row, token in zip(questions, answers, logits, likeliest, strict=True):
            try:
                answer.accept(row, token)
                outcome = answer.result() if answer.finish else None
            except Exception as error:
                outcome = error
            if outcome is not None:
                self._end(question, outcome)

    def drop_ended(self) -> None:
        """End questions whose caller has gone or whose time is up, running or waiting."""
        for questions in (self._running, self._waiting):
            for question in [q for q in questions if q.future.cancelled() or q.is_expired]:
                questions.remove(question)
                self._finish(question, NodeError(ErrorCode.DEADLINE_EXCEEDED, "the deadline passed"))

    def cancel_reading(self, memory: StreamMemory, num_tokens: int, why: str) -> None:
        """End the questions that read a memory beyond a length which is about to be cut."""
        for question in [q for q in self._running if q.branch is not None and q.branch.memory is memory]:
            assert question.branch is not None
            if question.branch.snapshot.num_tokens > num_tokens:
                self._end(question, NodeError(ErrorCode.CANCELLED, why))

    def _end(self, question: Question, outcome: Answer | Choice | Exception) -> None:
        """Finish a running question."""
        self._running.remove(question)
        self._finish(question, outcome)

    def _finish(self, question: Question, outcome: Answer | Choice | Exception) -> None:
        """Drop the branch and hand the outcome over. The memory needs no restoring: see `branch`."""
        if question.branch is not None:
            question.branch.close()
            question.branch = None
        if isinstance(outcome, Exception):
            error = _node_error(outcome)
            code = ErrorCode.CANCELLED if question.future.cancelled() else error.code
            self._counts.fail(str(code))
            fail(question.future, error)
            return
        if not outcome.memory.unchanged:
            logger.error("an answer about %s left a trace in the memory", question.request.stream)
        self._counts.count(outcome)
        succeed(question.future, outcome)

    def end_all(self, error: NodeError) -> None:
        """End every question, waiting or running."""
        for questions in (self._waiting, self._running):
            while questions:
                self._finish(questions.pop(), error)

    def counters(self) -> QuestionCounters:
        """For any thread."""
        counters = self._counts
        answered, failed, waiting = counters.answered, dict(counters.failed), len(self._waiting)
        received = counters.received  # last, so that what has moved on meanwhile is missing nowhere
        return QuestionCounters(
            received=received,
            answered=answered,
            failed=failed,
            waiting=waiting,
            running=received - answered - sum(failed.values()) - waiting,
            traces=counters.traces,
            mean_first_token_ms=_mean(counters.first_token_ms),
            mean_total_ms=_mean(counters.total_ms),
        )


def _growing(question: Question) -> GrowingAnswer:
    """The answer of a running question."""
    assert question.answer is not None
    return question.answer


def _snapshot(memory: StreamMemory, request: Ask | AskChoice) -> Snapshot:
    """The point of the memory that a question is about. Raises NodeError UNKNOWN_MARK or NO_FRAMES."""
    stream, as_of = request.stream, request.as_of
    snapshot = memory.now if as_of is UNSET else mark_of(memory, stream, as_of)
    if snapshot.num_frames == 0 and as_of is not UNSET and snapshot.forgotten.num_frames:
        raise NodeError(ErrorCode.NO_FRAMES, f"all of {stream!r} up to {as_of!r} was forgotten to make room")
    if snapshot.num_frames == 0:
        raise NodeError(ErrorCode.NO_FRAMES, f"nothing of {stream!r} is in the memory yet", retry_after_ms=500)
    return snapshot


def mark_of(memory: StreamMemory, stream: str, name: str) -> Snapshot:
    """A mark of the memory of a stream. Raises NodeError UNKNOWN_MARK."""
    marks = memory.ledger.marks
    if name not in marks:
        raise NodeError(ErrorCode.UNKNOWN_MARK, f"{stream!r} has no mark {name!r}", details={"marks": sorted(marks)})
    return marks[name]


def _node_error(error: Exception) -> NodeError:
    """What a caller is told of an exception; the traceback stays in the log."""
    if isinstance(error, NodeError):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        error.__traceback__ = None  # its frames hold the activations that must go
        torch.cuda.empty_cache()
        return NodeError(ErrorCode.OUT_OF_MEMORY, "not enough device memory for this question")
    logger.error("a question failed", exc_info=error)
    return NodeError(ErrorCode.INTERNAL, f"{type(error).__name__} while answering")


def _mean(values: deque[float]) -> Any:
    recent = list(values)
    return sum(recent) / len(recent) if recent else UNSET
