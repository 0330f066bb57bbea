"""A memory in this process, without sockets: the verbs of `NodeClient`, on an engine of one's own.

with LocalNode() as node:                       # the built-in model; or LocalNode("Qwen/Qwen2.5-VL-3B-Instruct")
    node.add_stream(StreamSpec(stream="desk", chunk_frames=2))
    for pixels in frames:                       # RGB, uint8, (height, width, 3)
        node.process_frame("desk", pixels)
    print(node.ask("desk", "What happened?").text)
"""

import queue
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import msgspec
import numpy as np
from msgspec import UNSET
from numpy.typing import NDArray

from ..protocol.codec import ReceivedFrame
from ..protocol.errors import ErrorCode, NodeError
from ..protocol.interface import RankBy
from ..protocol.messages import (
    Answer,
    Ask,
    AskChoice,
    CacheInfo,
    Choice,
    FrameHeader,
    Mark,
    Marks,
    PartialAnswer,
    StreamAdded,
    StreamSpec,
    StreamStats,
)
from .config import NodeConfig
from .engine import Engine, load_engine
from .feeder import decode_timed
from .question_limits import QuestionLimits
from .stream_intake import StreamIntake

T = TypeVar("T")


@dataclass(slots=True)
class _Session:
    """Pictures given to one stream since it was added, or since its last end."""

    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    num_sent: int = 0


class LocalNode:
    """Implements `protocol.interface.VideoMemory`. Nothing is lost: `process_frame` waits for the engine.

    A picture that completes a chunk returns when the chunk is in the memory. Verbs may be called from several
    threads; pictures of one stream should come from one.
    """

    def __init__(
        self, model: str = "builtin", *, device: str = "auto", dtype: str = "auto", timeout_s: float = 60.0
    ) -> None:
        """Load a model: "builtin", a checkpoint folder, or a hub id. `timeout_s` bounds every call by default."""
        self._timeout_s = _positive(timeout_s)
        self._config = NodeConfig()
        self._engine: Engine = load_engine(model, device=device, dtype=dtype)
        self._limits = QuestionLimits.of(self._config.questions, self._engine.model)
        self._intakes: dict[str, StreamIntake] = {}
        self._sessions: dict[str, _Session] = {}
        self._lock = threading.RLock()

    def __enter__(self) -> "LocalNode":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the engine; running questions fail with NOT_READY."""
        self._engine.close()

    # Streams

    def add_stream(self, spec: StreamSpec) -> StreamAdded:
        options = self._config.spec_options(spec)
        if options.connect is not None:
            raise NodeError(ErrorCode.BAD_REQUEST, "a local node has no sockets: `connect` cannot be followed")
        forecast = self._wait(self._engine.add_stream(options))
        with self._lock:
            self._intakes[options.name] = StreamIntake(options)
            self._sessions[options.name] = _Session()
        return StreamAdded(forecast=forecast)

    def remove_stream(self, stream: str) -> None:
        self._wait(self._engine.remove_stream(stream))
        with self._lock:
            del self._intakes[stream], self._sessions[stream]

    def stream_names(self) -> list[str]:
        return self._engine.streams()

    def streams(self) -> list[StreamStats]:
        return [self._intake(name).stats(self._engine.cache_info(name)) for name in self.stream_names()]

    # Pictures

    def process_frame(self, stream: str, pixels: NDArray[np.uint8], *, ts: int | None = None, **ignored: Any) -> int:
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise ValueError(f"pixels must be uint8 (height, width, 3), got {pixels.dtype} {pixels.shape}")
        height, width, _ = pixels.shape
        header = FrameHeader(
            session=self._session(stream).name,
            stream=stream,
            ts=time.time_ns() if ts is None else ts,
            enc="rgb8",
            w=width,
            h=height,
        )
        return self._send(stream, header, np.ascontiguousarray(pixels).data)

    def process_chunk(
        self,
        stream: str,
        frames: Sequence[NDArray[np.uint8]],
        *,
        ts: Sequence[int] | None = None,
        **ignored: Any,
    ) -> int:
        if not frames:
            raise ValueError("a chunk needs at least one frame")
        times = [None] * len(frames) if ts is None else list(ts)
        return [self.process_frame(stream, f, ts=t) for f, t in zip(frames, times, strict=True)][-1]

    def end_stream(self, stream: str) -> None:
        with self._lock:
            header = FrameHeader(session=self._session(stream).name, stream=stream, ts=time.time_ns(), eos=True)
            self._send(stream, header, b"")
            self._sessions[stream] = _Session()  # pictures that come after an end begin anew

    def wait_encoded(self, stream: str, seq: int, timeout_s: float | None = None) -> bool:
        newest = self.cache_info(stream).newest_seq
        return newest is not UNSET and newest >= seq

    def _send(self, stream: str, header: FrameHeader, payload: Any) -> int:
        with self._lock:
            intake, session = self._intake(stream), self._session(stream)
            seq, session.num_sent = session.num_sent, session.num_sent + 1
            intake.receive(ReceivedFrame(header, seq, payload))
            self._carry(intake)
        return seq

    def _carry(self, intake: StreamIntake) -> None:
        """Take what was received all the way into the memory."""

        def is_full() -> bool:
            return self._engine.cache_info(intake.name).full

        while (batch := intake.take(intake.options.chunk_frames, is_full)) is not None:
            has_gate = intake.options.gate is not None
            intake.give_back(batch, [decode_timed(timed, has_gate=has_gate) for timed in batch.frames])
            while submitted := intake.submit(lambda chunk: self._engine.encode(intake.name, chunk)):
                for chunk, future in submitted:
                    wait([future])  # the engine always ends what it was given, or refuses it when it stops
                    intake.settle(chunk, future, time.time_ns())
            intake.tell_unchanged(partial(self._engine.note_unchanged, intake.name))

    def _intake(self, stream: str) -> StreamIntake:
        with self._lock:
            if stream not in self._intakes:
                details = {"streams": list(self._intakes)}
                raise NodeError(ErrorCode.UNKNOWN_STREAM, f"there is no stream {stream!r}", details=details)
            return self._intakes[stream]

    def _session(self, stream: str) -> "_Session":
        self._intake(stream)
        return self._sessions[stream]

    # Questions

    def ask(self, stream: str, question: str, *, timeout_s: float | None = None, **options: Any) -> Answer:
        timeout_s, arrived = self._timeout(timeout_s), time.monotonic()
        future = self._engine.ask(self._ask(stream, question, options), arrived=arrived, deadline=arrived + timeout_s)
        return self._wait(future, timeout_s)

    def ask_stream(
        self, stream: str, question: str, *, timeout_s: float | None = None, **options: Any
    ) -> Iterator[PartialAnswer | Answer]:
        timeout_s, arrived = self._timeout(timeout_s), time.monotonic()
        deltas: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        future = self._engine.ask(
            self._ask(stream, question, options), arrived=arrived, deadline=arrived + timeout_s, on_delta=deltas.put
        )
        future.add_done_callback(lambda _: deltas.put(None))
        return _partials(future, deltas)

    def ask_choice(
        self,
        stream: str,
        question: str,
        options: Sequence[str],
        *,
        rank_by: RankBy = "normalized",
        as_of: str | None = None,
        timeout_s: float | None = None,
        **ignored: Any,
    ) -> Choice:
        named = {"stream": stream, "question": question, "options": list(options), "rank_by": rank_by, "as_of": as_of}
        request = self._limits.checked_choice(_request(AskChoice, named))
        timeout_s, arrived = self._timeout(timeout_s), time.monotonic()
        return self._wait(self._engine.ask_choice(request, arrived=arrived, deadline=arrived + timeout_s), timeout_s)

    # Memory

    def cache_info(self, stream: str) -> CacheInfo:
        return self._engine.cache_info(stream)

    def reset(self, stream: str) -> CacheInfo:
        return self._wait(self._intake(stream).reset(lambda: self._engine.reset(stream)))

    def mark(self, stream: str, name: str) -> Mark:
        return self._wait(self._engine.mark(stream, name))

    def rollback(self, stream: str, name: str) -> CacheInfo:
        if name not in {mark.name for mark in self.marks(stream).marks}:
            return self._wait(self._engine.rollback(stream, name))  # refuses it, and nothing is dropped
        return self._wait(self._intake(stream).rollback(lambda: self._engine.rollback(stream, name)))

    def delete_mark(self, stream: str, name: str) -> Marks:
        return self._wait(self._engine.delete_mark(stream, name))

    def marks(self, stream: str) -> Marks:
        return self._wait(self._engine.marks(stream))

    def _ask(self, stream: str, question: str, options: dict[str, Any]) -> Ask:
        return self._limits.checked_ask(_request(Ask, {"stream": stream, "question": question, **options}))

    def _timeout(self, timeout_s: float | None) -> float:
        return self._timeout_s if timeout_s is None else _positive(timeout_s)

    def _wait(self, future: Future[T], timeout_s: float | None = None) -> T:
        """The engine's outcome; a question past its time is cancelled."""
        try:
            return future.result(self._timeout(timeout_s))
        except TimeoutError as error:
            future.cancel()
            raise NodeError(ErrorCode.DEADLINE_EXCEEDED, "the engine did not answer in time") from error


def _partials(future: Future[Answer], deltas: "queue.SimpleQueue[str | None]") -> Iterator[PartialAnswer | Answer]:
    """The pieces of an answer while it grows, then the whole; leaving early cancels the question."""
    try:
        for n, delta in enumerate(iter(deltas.get, None)):
            yield PartialAnswer(n=n, delta=delta)
        yield future.result()
    finally:
        future.cancel()


def _request(kind: type[T], named: dict[str, Any]) -> T:
    """A request with the checks of the wire; arguments that it does not know, or that are None, are left out."""
    fields = {field.name for field in msgspec.structs.fields(kind)}  # type: ignore[arg-type]
    known = {name: value for name, value in named.items() if name in fields and value is not None}
    try:
        return msgspec.convert(known, kind)
    except msgspec.ValidationError as error:
        raise NodeError(ErrorCode.BAD_REQUEST, str(error)) from error


def _positive(timeout_s: float) -> float:
    if not timeout_s > 0:
        raise ValueError(f"timeout_s must be above 0, got {timeout_s}")
    return timeout_s
