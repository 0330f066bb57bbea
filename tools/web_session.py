"""What a browser page knows of a node: who it is, how it does, what it remembers, what it was asked."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, NamedTuple, Self

from ..protocol.client import NodeClient
from ..protocol.errors import AuthError, ClosedError, ErrorCode, NodeError, NoReplyError, OnlookerError
from ..protocol.messages import Answer, Choice, Event, Hello, Mark, NodeStats, StreamStats, Vram
from ..protocol.telemetry import TelemetrySubscriber
from .timeline import Timeline, thinned
from .watch import View

MAX_SAMPLES = 600
MAX_QUESTIONS = 50
MAX_AT_ONCE = 8
ANSWER_TIMEOUT_S = 120.0
MARKS_PERIOD_S = 1.0
CONTROL_TIMEOUT_S = 5.0
POLL_S = 0.1

QuestionState = Literal["running", "answered", "failed"]


class Sample(NamedTuple):
    """Device memory at one moment, in seconds since the Unix epoch."""

    time_s: float
    vram: Vram


class Presence(NamedTuple):
    """Whether the node is there, as those who look at the page should know it."""

    is_online: bool
    has_been_seen: bool
    silent_s: float
    num_restarts: int
    restarted_s: float | None  # when a node of another session was first heard, since the Unix epoch
    refusal: str | None  # why the node lets nobody in


@dataclass(eq=False, slots=True)
class Question:
    """A question, and its answer as far as it has come. Written by its own thread alone."""

    stream: str
    text: str
    options: tuple[str, ...] = ()
    as_of: str | None = None
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    asked_s: float = field(default_factory=time.time)  # since the Unix epoch
    answer: str = ""
    reply: Answer | Choice | None = None
    error: OnlookerError | None = None

    @property
    def state(self) -> QuestionState:
        if self.error is not None:
            return "failed"
        return "running" if self.reply is None else "answered"


class Knowledge:
    """What telemetry has said so far. `take` from one thread, under `lock`; readers hold `lock` too."""

    def __init__(self, endpoint: str) -> None:
        self.lock = threading.Lock()
        self.view = View(endpoint)
        self.samples: list[Sample] = []
        self.timelines: dict[str, Timeline] = {}
        self.num_restarts = 0
        self.restarted_s: float | None = None
        self.refusal: str | None = None

    def take(self, record: Hello | NodeStats | StreamStats | Event | None, now: float) -> None:
        """Note a record that came at `now`, in `time.monotonic()` seconds."""
        if isinstance(record, Hello):
            self._note_session(record)
        self.view.take(record, now)
        match record:
            case NodeStats():
                self.samples = thinned([*self.samples, Sample(record.ts / 1e9, record.vram)], MAX_SAMPLES)
            case StreamStats():
                self.timelines.setdefault(record.stream, Timeline()).take(record)
            case Event(kind="stream_removed", stream=str(stream)) if stream in self.timelines:
                self.timelines[stream].forget()

    def _note_session(self, hello: Hello) -> None:
        known = self.view.hello
        if known is None or known.session == hello.session:
            return
        self.num_restarts += 1
        self.restarted_s = time.time()
        for timeline in self.timelines.values():
            timeline.forget()

    def presence(self, now: float) -> Presence:
        return Presence(
            is_online=self.view.is_online(now) and self.refusal is None,
            has_been_seen=self.view.hello is not None,
            silent_s=self.view.silent_s(now),
            num_restarts=self.num_restarts,
            restarted_s=self.restarted_s,
            refusal=self.refusal,
        )


class Session:
    """One client of one node for as long as a page is served: it listens, asks and steers, from any thread.

    `open_subscriber` is called again whenever the node refused the keys.
    """

    def __init__(self, client: NodeClient, open_subscriber: Callable[[], TelemetrySubscriber], endpoint: str) -> None:
        self.client = client
        self.knowledge = Knowledge(endpoint)
        self.questions: list[Question] = []
        self.marks: dict[str, list[Mark]] = {}
        self._open_subscriber = open_subscriber
        self._stop = threading.Event()
        self._askers = ThreadPoolExecutor(MAX_AT_ONCE, thread_name_prefix="asker")
        self._threads = [
            threading.Thread(target=self._listen, name="telemetry", daemon=True),
            threading.Thread(target=self._follow_marks, name="marks", daemon=True),
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self.client.close()  # ends the questions that are still open
        self._askers.shutdown()
        for thread in self._threads:
            thread.join()

    @property
    def presence(self) -> Presence:
        with self.knowledge.lock:
            return self.knowledge.presence(time.monotonic())

    def stream(self, name: str | None) -> StreamStats | None:
        """What is known of a stream."""
        with self.knowledge.lock:
            return None if name is None else self.knowledge.view.streams.get(name)

    @property
    def stream_names(self) -> list[str]:
        with self.knowledge.lock:
            return sorted(self.knowledge.view.streams)

    def _listen(self) -> None:
        while not self._stop.is_set():
            try:
                with self._open_subscriber() as subscriber:
                    self._take_all(subscriber)
            except AuthError as error:
                self.knowledge.refusal = error.reason
                self._stop.wait(1.0)

    def _take_all(self, subscriber: TelemetrySubscriber) -> None:
        while not self._stop.is_set():
            message = subscriber.receive(POLL_S)
            if message is not None:
                with self.knowledge.lock:
                    self.knowledge.refusal = None
                    self.knowledge.take(message.record, time.monotonic())

    def _follow_marks(self) -> None:
        """Ask for the marks now and then: telemetry does not tell them."""
        while not self._stop.wait(MARKS_PERIOD_S):
            for name in self.stream_names if self.presence.is_online else ():
                self.refresh_marks(name)

    def refresh_marks(self, stream: str) -> None:
        """Ask the node for the marks of a stream; where it cannot say, none are known."""
        try:
            self.marks[stream] = self.client.marks(stream).marks
        except ClosedError:
            return
        except (NodeError, NoReplyError, AuthError):
            self.marks.pop(stream, None)

    def ask(self, question: Question) -> None:
        """Ask without waiting; the answer grows in the question, which is kept among `questions`."""
        self.questions = [*self.questions, question][-MAX_QUESTIONS:]
        self._askers.submit(self._ask, question)

    def _ask(self, question: Question) -> None:
        try:
            if question.options:
                self._choose(question)
            else:
                self._answer(question)
        except OnlookerError as error:
            question.error = error

    def _choose(self, question: Question) -> None:
        choice = self.client.ask_choice(
            question.stream,
            question.text,
            question.options,
            as_of=question.as_of,
            timeout_s=ANSWER_TIMEOUT_S,
            request_id=question.id,
        )
        question.answer, question.reply = choice.option, choice

    def _answer(self, question: Question) -> None:
        pieces = self.client.ask_stream(
            question.stream,
            question.text,
            as_of=question.as_of,
            timeout_s=ANSWER_TIMEOUT_S,
            request_id=question.id,
        )
        with closing(pieces):  # pyright: ignore[reportArgumentType]
            for piece in pieces:
                if isinstance(piece, Answer):
                    # Pieces can be missing after a lost connection, never from the whole answer.
                    question.answer, question.reply = piece.text, piece
                else:
                    question.answer += piece.delta

    @property
    def running(self) -> Sequence[Question]:
        return [question for question in self.questions if question.state == "running"]

    def cancel_all(self) -> None:
        """End every question that is running. Raises the client's errors."""
        for question in self.running:
            self.client.cancel(question.id)

    def clear_questions(self) -> None:
        """Forget the questions that are over."""
        self.questions = [question for question in self.questions if question.state == "running"]


_IN_WORDS = {
    ErrorCode.NO_FRAMES: "Nothing is remembered yet: this stream has shown no frame so far.",
    ErrorCode.BUSY: "The node has too many questions open. Try again in a moment.",
    ErrorCode.DEADLINE_EXCEEDED: "The answer took too long, so the node gave it up.",
    ErrorCode.CANCELLED: "Cancelled.",
    ErrorCode.NOT_READY: "The node is still loading its model. Try again in a moment.",
    ErrorCode.OUT_OF_MEMORY: "The device has no memory left for this.",
    ErrorCode.UNKNOWN_STREAM: "The node does not know this stream; it may have been restarted.",
    ErrorCode.UNKNOWN_MARK: "The stream has no mark of that name any more.",
    ErrorCode.UNAUTHORIZED: "Your key does not allow this.",
}


def in_words(error: OnlookerError) -> str:
    """An error as those at the page should read it, with what the node itself says where that tells more."""
    if isinstance(error, NodeError):
        known = _IN_WORDS.get(ErrorCode(error.code)) if error.code in ErrorCode.__members__ else None
        return known or f"The node says: {error.message} ({error.code})"
    if isinstance(error, NoReplyError):
        return "The node did not answer in time."
    if isinstance(error, AuthError):
        return f"The node refuses this page's key: {error.reason}"
    if isinstance(error, ClosedError):
        return "The page's server is closing."
    return str(error)
