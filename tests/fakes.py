"""A FakeEngine: what a server asks of an engine, without torch or a device.

It remembers the chunks it is given and answers a question with its own words, one word a token:

    with FakeEngine() as engine:
        engine.add_stream(StreamOptions(name="front")).result(1)
        engine.encode("front", chunk).result(1)
        engine.ask(Ask(stream="front", question="a b"), arrived=time.monotonic()).result(1).text  # "a b"

All work runs on one thread, a step at a time; questions take turns, a word each, and encoding goes on between
them. Knobs, all of which may be turned while it runs:

- `hold()` stops the thread before its next step and `let_go()` lets it go on: slowness without a clock.
- `encode_s`, `word_s`: seconds spent on each chunk and each word of an answer.
- `capacity_tokens`: a chunk beyond it is refused as `memory_full`.
- `num_forgotten_frames`: every chunk makes the memory say that it forgot so many, which it does not.
- `fail_encode`, `fail_ask`: an exception that every chunk or question then ends with.
- `max_waiting`: a question beyond it ends with BUSY.
- `on_encode`: is called with the stream of each chunk that is handed over.
- `is_ready`.
"""

import math
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from msgspec import UNSET

from onlooker.node.chunk import Chunk, ChunkRefused, Encoded, Picture, Unchanged
from onlooker.node.engine_protocol import ModelInfo, Relieve
from onlooker.node.options import StreamOptions
from onlooker.protocol.errors import ErrorCode, NodeError
from onlooker.protocol.messages import (
    Answer,
    AnswerTiming,
    Ask,
    AskChoice,
    CacheInfo,
    Choice,
    Footprint,
    Forecast,
    Mark,
    Marks,
    OptionScore,
    Provenance,
    QuestionCounters,
    Vram,
    or_unset,
)

TOKENS_PER_FRAME = 4
BYTES_PER_TOKEN = 64

FAKE_MODEL = ModelInfo(
    name="fake",
    model_type="fake",
    dtype="float32",
    device="cpu",
    max_new_tokens=64,
    max_question_chars=2000,
    max_options=8,
)


@dataclass(eq=False)
class _Memory:
    options: StreamOptions
    chunks: list[Chunk] = field(default_factory=list)
    marks: dict[str, int] = field(default_factory=dict)  # name -> number of chunks


@dataclass(eq=False)
class _Work:
    """Steps of one task; the value its generator returns becomes the future's result."""

    stream: str
    steps: Iterator[None]
    future: Future[Any] = field(default_factory=Future)
    is_encode: bool = False
    is_question: bool = False
    has_started: bool = False


class FakeEngine:
    """Implements `EngineProtocol` on one small thread; `with` starts and closes it."""

    def __init__(
        self,
        *,
        model: ModelInfo = FAKE_MODEL,
        capacity_tokens: int = 100_000,
        encode_s: float = 0.0,
        word_s: float = 0.0,
        max_waiting: int = 32,
    ) -> None:
        self.model = model
        self.relieve: Relieve = lambda stream: None
        self.adjusted: dict[str, StreamOptions] = {}
        self.resized: list[tuple[str, int]] = []
        self.capacity_tokens = capacity_tokens
        self.encode_s = encode_s
        self.word_s = word_s
        self.max_waiting = max_waiting
        self.num_forgotten_frames = 0
        self.unchanged: dict[str, Unchanged] = {}  # by stream, the last that was noted
        self.fail_encode: Exception | None = None
        self.fail_ask: Exception | None = None
        self.on_encode: Callable[[str], object] = str
        self.is_ready = True
        self._memories: dict[str, _Memory] = {}
        self._work: deque[_Work] = deque()
        self._wake = threading.Condition()
        self._held = False
        self._closed = threading.Event()
        self._progress = time.monotonic()
        self._received = self._answered = 0
        self._failed: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._run, name="fake-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> "FakeEngine":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread; work that is left is cancelled."""
        self._closed.set()
        with self._wake:
            self._wake.notify()
        self._thread.join(timeout=5)
        with self._wake:
            left = list(self._work)
        for work in left:
            work.future.cancel()

    def hold(self) -> None:
        """Do no further step until `let_go`."""
        with self._wake:
            self._held = True

    def let_go(self) -> None:
        with self._wake:
            self._held = False
            self._wake.notify()

    def chunks(self, stream: str) -> list[Chunk]:
        """The chunks in a stream's memory, oldest first."""
        with self._wake:
            return list(self._memories[stream].chunks)

    def pictures(self, stream: str) -> list[Picture]:
        """The real pictures in a stream's memory, oldest first."""
        return [picture for chunk in self.chunks(stream) for picture in chunk.pictures[: chunk.num_frames]]

    def options(self, stream: str) -> StreamOptions:
        """Of a stream, with the memory that it has now."""
        with self._wake:
            return self._memories[stream].options

    @property
    def num_waiting(self) -> int:
        """Pieces of work that have not ended."""
        with self._wake:
            return len(self._work)

    @property
    def progress_age_ms(self) -> float:
        return (time.monotonic() - self._progress) * 1e3

    # EngineProtocol: streams and chunks

    def add_stream(self, options: StreamOptions) -> Future[Forecast]:
        def steps() -> Generator[None, None, Forecast]:
            if options.name in self._memories:
                raise NodeError(ErrorCode.STREAM_EXISTS, f"stream {options.name} exists")
            self._memories[options.name] = _Memory(options)
            yield from ()
            return self._forecast(options)

        return self._submit(options.name, steps())

    def foretell(self, options: StreamOptions) -> Future[Forecast]:
        done: Future[Forecast] = Future()
        done.set_result(self._forecast(options))
        return done

    def adjust(self, stream: str, options: StreamOptions) -> Future[None]:
        self.adjusted[stream] = options
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def resize(self, stream: str, memory_bytes: int) -> Future[Forecast]:
        def steps() -> Generator[None, None, Forecast]:
            memory = self._memory(stream)
            memory.options = replace(memory.options, memory_bytes=memory_bytes)
            self.resized.append((stream, memory_bytes))
            yield from ()
            return self._forecast(memory.options)

        return self._submit(stream, steps())

    def remove_stream(self, stream: str) -> Future[None]:
        def steps() -> Iterator[None]:
            self._memory(stream)
            del self._memories[stream]
            yield from ()

        self._take_back(stream, "removed")
        return self._submit(stream, steps())

    def encode(self, stream: str, chunk: Chunk) -> Future[Encoded]:
        def steps() -> Iterator[None]:
            self._closed.wait(self.encode_s)
            if self.fail_encode is not None:
                raise self.fail_encode
            if stream not in self._memories:
                raise ChunkRefused("removed", f"no stream {stream}")
            num_tokens = len(chunk.pictures) * TOKENS_PER_FRAME
            if self._num_tokens(stream) + num_tokens > self.capacity_tokens:
                raise ChunkRefused("memory_full", f"stream {stream} holds {self.capacity_tokens} tokens")
            self._memories[stream].chunks.append(chunk)
            yield from ()
            return Encoded(num_tokens, chunk.size, 1.0, 2.0, 3.0, self.num_forgotten_frames)

        self.on_encode(stream)
        return self._submit(stream, steps(), is_encode=True)

    def note_unchanged(self, stream: str, unchanged: Unchanged) -> None:
        self.unchanged[stream] = unchanged

    def reset(self, stream: str) -> Future[CacheInfo]:
        def steps() -> Iterator[None]:
            memory = self._memory(stream)
            memory.chunks.clear()
            memory.marks.clear()
            yield from ()
            return self.cache_info(stream)

        self._take_back(stream, "reset")
        return self._submit(stream, steps())

    def mark(self, stream: str, name: str) -> Future[Mark]:
        def steps() -> Iterator[None]:
            memory = self._memory(stream)
            memory.marks[name] = len(memory.chunks)
            yield from ()
            return self._mark(memory, name)

        return self._submit(stream, steps())

    def rollback(self, stream: str, name: str) -> Future[CacheInfo]:
        def steps() -> Iterator[None]:
            memory = self._memory(stream)
            kept = self._num_marked(memory, name)
            del memory.chunks[kept:]
            memory.marks = {mark: num for mark, num in memory.marks.items() if num <= kept}
            yield from ()
            return self.cache_info(stream)

        return self._submit(stream, steps())

    def delete_mark(self, stream: str, name: str) -> Future[Marks]:
        def steps() -> Iterator[None]:
            memory = self._memory(stream)
            self._num_marked(memory, name)
            del memory.marks[name]
            yield from ()
            return Marks(marks=[self._mark(memory, mark) for mark in memory.marks])

        return self._submit(stream, steps())

    def marks(self, stream: str) -> Future[Marks]:
        def steps() -> Iterator[None]:
            memory = self._memory(stream)
            yield from ()
            return Marks(marks=[self._mark(memory, mark) for mark in memory.marks])

        return self._submit(stream, steps())

    # EngineProtocol: questions

    def ask(
        self,
        request: Ask,
        *,
        arrived: float,
        deadline: float | None = None,
        on_delta: Callable[[str], None] | None = None,
    ) -> Future[Answer]:
        def steps() -> Iterator[None]:
            chunks = self._asked(request.stream, request.as_of)
            before = _fingerprint(chunks)
            started = time.monotonic()
            words = request.question.split()
            said = [word if n == 0 else f" {word}" for n, word in enumerate(words)][: request.max_new_tokens]
            for word in said:
                self._check_deadline(deadline)
                self._closed.wait(self.word_s)
                if on_delta is not None:
                    on_delta(word)
                yield
            return Answer(
                text="".join(said),
                finish="stop" if len(said) == len(words) else "length",
                num_prompt_tokens=len(words) + 4,
                num_answer_tokens=len(said),
                memory=_provenance(chunks, before),
                timing=_timing(arrived, started),
            )

        return self._submit_question(request.stream, deadline, steps())

    def ask_choice(self, request: AskChoice, *, arrived: float, deadline: float | None = None) -> Future[Choice]:
        """The shortest option is the likeliest."""

        def steps() -> Iterator[None]:
            chunks = self._asked(request.stream, request.as_of)
            started = time.monotonic()
            self._check_deadline(deadline)
            yield
            ranked = [-float(len(option)) for option in request.options]
            total = sum(math.exp(score) for score in ranked)
            best, second = sorted(ranked, reverse=True)[:2]
            index = ranked.index(best)
            return Choice(
                index=index,
                option=request.options[index],
                margin=best - second,
                rank_by=request.rank_by,
                scores=[
                    OptionScore(
                        option=option,
                        num_tokens=1,
                        raw=score,
                        normalized=score,
                        calibrated=score,
                        probability=math.exp(score) / total,
                    )
                    for option, score in zip(request.options, ranked, strict=True)
                ],
                memory=_provenance(chunks, _fingerprint(chunks)),
                timing=_timing(arrived, started),
            )

        return self._submit_question(request.stream, deadline, steps())

    # EngineProtocol: facts

    def cache_info(self, stream: str) -> CacheInfo:
        memory = self._memory(stream)
        chunks = list(memory.chunks)
        num_tokens = sum(len(chunk.pictures) for chunk in chunks) * TOKENS_PER_FRAME
        newest = chunks[-1].pictures[chunks[-1].num_frames - 1] if chunks else None
        is_full = num_tokens + TOKENS_PER_FRAME * memory.options.chunk_frames > self.capacity_tokens
        return CacheInfo(
            num_tokens=num_tokens,
            capacity_tokens=self.capacity_tokens,
            logical_bytes=num_tokens * BYTES_PER_TOKEN,
            resident_bytes=self.capacity_tokens * BYTES_PER_TOKEN,
            bytes_per_token=BYTES_PER_TOKEN,
            num_chunks=len(chunks),
            num_frames=sum(chunk.num_frames for chunk in chunks),
            num_padded_frames=sum(chunk.num_padded for chunk in chunks),
            positions_used=num_tokens,
            oldest_ns=chunks[0].pictures[0].ts if chunks else UNSET,
            newest_ns=newest.ts if newest else UNSET,
            newest_seq=newest.seq if newest else UNSET,
            full=is_full,
            limit="memory" if is_full else UNSET,
        )

    def _forecast(self, options: StreamOptions) -> Forecast:
        per_chunk = options.chunk_frames * TOKENS_PER_FRAME
        footprint = Footprint(
            bytes_per_token=BYTES_PER_TOKEN,
            chunk_frames=options.chunk_frames,
            opening_tokens=0,
            tokens_per_chunk=per_chunk,
            opening_positions=0,
            picture_positions=0,
            positions_per_chunk=per_chunk,
            positions_per_second=0.0,
        )
        return Forecast(
            memory_bytes=options.memory_bytes,
            capacity_tokens=self.capacity_tokens,
            footprint=footprint,
            num_chunks=self.capacity_tokens // per_chunk,
            limit="memory",
            encode_size=or_unset(options.encode_size),
        )

    def streams(self) -> list[str]:
        return list(self._memories)

    def vram(self) -> Vram:
        resident = len(self._memories) * self.capacity_tokens * BYTES_PER_TOKEN
        return Vram(device="cpu", weights_bytes=1000, kv_bytes=resident)

    def question_counters(self) -> QuestionCounters:
        with self._wake:
            questions = [work for work in self._work if work.is_question]
            running = sum(work.has_started for work in questions)
            return QuestionCounters(
                received=self._received,
                answered=self._answered,
                failed=dict(self._failed),
                waiting=len(questions) - running,
                running=running,
            )

    # The thread

    def _submit(
        self, stream: str, steps: Iterator[None], *, is_encode: bool = False, is_question: bool = False
    ) -> Future[Any]:
        work = _Work(stream, steps, is_encode=is_encode, is_question=is_question)
        with self._wake:
            if self._closed.is_set():
                work.future.cancel()
                return work.future
            self._work.append(work)
            self._wake.notify()
        return work.future

    def _submit_question(self, stream: str, deadline: float | None, steps: Iterator[None]) -> Future[Any]:
        error = self._refusal(stream, deadline)
        with self._wake:
            self._received += 1
        if error is None:
            return self._submit(stream, steps, is_question=True)
        work = _Work(stream, steps, is_question=True)
        self._finish(work, error=error)
        return work.future

    def _refusal(self, stream: str, deadline: float | None) -> NodeError | None:
        if stream not in self._memories:
            details = {"streams": self.streams()}
            return NodeError(ErrorCode.UNKNOWN_STREAM, f"no stream {stream}", details=details)
        if self.question_counters().waiting >= self.max_waiting:
            return NodeError(ErrorCode.BUSY, "too many questions", retry_after_ms=100)
        if deadline is not None and time.monotonic() > deadline:
            return NodeError(ErrorCode.DEADLINE_EXCEEDED, "the deadline has passed")
        return None

    def _take_back(self, stream: str, reason: str) -> None:
        """Refuse the chunks and cancel the questions of a stream that wait or run."""
        with self._wake:
            taken = [work for work in self._work if work.stream == stream and (work.is_encode or work.is_question)]
            for work in taken:
                self._work.remove(work)
        for work in taken:
            cancelled = NodeError(ErrorCode.CANCELLED, f"the stream was {reason}")
            refused = ChunkRefused(reason, f"stream {stream}: {reason}")
            self._finish(work, error=refused if work.is_encode else cancelled)

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closed.is_set() or (self._work and not self._held))
                if self._closed.is_set():
                    return
                work = self._work.popleft()
            self._progress = time.monotonic()
            if not work.future.cancelled():
                self._step(work)
            elif work.is_question:
                with self._wake:
                    self._failed["CANCELLED"] += 1

    def _step(self, work: _Work) -> None:
        work.has_started = True
        try:
            next(work.steps)
        except StopIteration as end:
            self._finish(work, result=end.value)
        except Exception as error:
            self._finish(work, error=error)
        else:
            with self._wake:
                self._work.append(work)

    def _finish(self, work: _Work, *, result: object = None, error: Exception | None = None) -> None:
        if work.is_question:
            with self._wake:
                if error is None:
                    self._answered += 1
                else:
                    self._failed[getattr(error, "code", "INTERNAL")] += 1
        if not work.future.set_running_or_notify_cancel():
            return
        if error is None:
            work.future.set_result(result)
        else:
            work.future.set_exception(error)

    def _memory(self, stream: str) -> _Memory:
        if stream not in self._memories:
            details = {"streams": self.streams()}
            raise NodeError(ErrorCode.UNKNOWN_STREAM, f"no stream {stream}", details=details)
        return self._memories[stream]

    def _num_tokens(self, stream: str) -> int:
        return sum(len(chunk.pictures) for chunk in self._memories[stream].chunks) * TOKENS_PER_FRAME

    def _num_marked(self, memory: _Memory, name: str) -> int:
        if name not in memory.marks:
            raise NodeError(ErrorCode.UNKNOWN_MARK, f"no mark {name}", details={"marks": list(memory.marks)})
        return memory.marks[name]

    def _mark(self, memory: _Memory, name: str) -> Mark:
        chunks = memory.chunks[: self._num_marked(memory, name)]
        return Mark(
            name=name,
            num_tokens=sum(len(chunk.pictures) for chunk in chunks) * TOKENS_PER_FRAME,
            num_frames=sum(chunk.num_frames for chunk in chunks),
            until_ns=chunks[-1].pictures[-1].ts if chunks else UNSET,
        )

    def _asked(self, stream: str, as_of: Any) -> list[Chunk]:
        if self.fail_ask is not None:
            raise self.fail_ask
        memory = self._memory(stream)
        chunks = list(memory.chunks if as_of is UNSET else memory.chunks[: self._num_marked(memory, as_of)])
        if not chunks:
            raise NodeError(ErrorCode.NO_FRAMES, f"stream {stream} has no frames yet")
        return chunks

    def _check_deadline(self, deadline: float | None) -> None:
        if deadline is not None and time.monotonic() > deadline:
            raise NodeError(ErrorCode.DEADLINE_EXCEEDED, "the deadline has passed")


def _fingerprint(chunks: list[Chunk]) -> str:
    digest = 0
    for chunk in chunks:
        for picture in chunk.pictures:
            digest = zlib.crc32(picture.pixels.tobytes(), digest)
    return f"{digest:08x}"


def _provenance(chunks: list[Chunk], before: str) -> Provenance:
    after = _fingerprint(chunks)
    newest = chunks[-1].pictures[chunks[-1].num_frames - 1]
    return Provenance(
        num_tokens=sum(len(chunk.pictures) for chunk in chunks) * TOKENS_PER_FRAME,
        num_frames=sum(chunk.num_frames for chunk in chunks),
        from_ns=chunks[0].pictures[0].ts,
        until_ns=newest.ts,
        until_seq=newest.seq,
        ts_kind=newest.ts_kind,
        fingerprint_before=before,
        fingerprint_after=after,
        unchanged=before == after,
    )


def _timing(arrived: float, started: float) -> AnswerTiming:
    now = time.monotonic()
    return AnswerTiming(
        queue_ms=(started - arrived) * 1e3,
        prefill_ms=0.0,
        first_token_ms=(started - arrived) * 1e3,
        decode_ms=(now - started) * 1e3,
        total_ms=(now - arrived) * 1e3,
    )
