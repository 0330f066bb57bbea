"""The engine: the one thread that computes on the device. It encodes chunks and answers questions, by turns.

A turn is one layer of a chunk, or one decode step of all running answers together; a question's prefill is a turn
of the answering side. Between two layers of a chunk questions are taken in, begun, answered and ended, while every
verb waits until the chunk is in the memory or refused. Whatever fails ends the work it failed for, never the thread.
"""

import dataclasses
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
from msgspec import UNSET
from msgspec.structs import replace

from ..protocol.errors import ErrorCode, NodeError
from ..protocol.forecast import Room, room_of
from ..protocol.messages import (
    Answer,
    Ask,
    AskChoice,
    CacheInfo,
    Choice,
    Forecast,
    Mark,
    Marks,
    QuestionCounters,
    Vram,
    or_unset,
)
from .answering import Answering, Question, mark_of
from .branch import Scratch
from .chunk import Chunk, ChunkRefused, Encoded, Unchanged
from .compilation import CompileSetting
from .engine_protocol import ModelInfo, Relieve
from .fairness import FairShare, Side
from .forecast import forecast, within_room
from .ledger import Snapshot
from .memory import Addition, Plan, StreamMemory, append_together
from .model import VisionLanguageModel, load_model
from .options import StreamOptions
from .outcome import fail, succeed
from .pieces import MAX_TOKENS
from .rehearsal import warm_up
from .upload import Upload, Uploader
from .vram import VramMeter

logger = logging.getLogger(__name__)

T = TypeVar("T")

_IDLE_S = 0.25  # how often an idle engine comes round: for deadlines, and to show that it lives
_VRAM_PERIOD_S = 1.0
_MAX_QUESTION_CHARS = 8192
_MAX_OPTIONS = 32
MAX_MARKS = 256
_MAX_TOGETHER = 4  # streams; more of them make their chunks wait for longer than they gain
_STOPPED = "the engine has stopped"


class _Command(NamedTuple):
    """Something to be done on the engine thread."""

    run: Callable[[], None]
    is_verb: bool = True  # not for the middle of a chunk: it may change what the chunk follows


class _Due(NamedTuple):
    """A stream's chunk that is to be encoded now."""

    stream: str
    chunk: Chunk
    plan: Plan | None
    upload: Upload | None
    future: Future[Encoded]


class Engine:
    """Implements `EngineProtocol` on a real model: see there for what each verb promises."""

    def __init__(
        self,
        model: VisionLanguageModel,
        *,
        max_concurrent_questions: int = 8,
        max_waiting_questions: int = 32,
        scratch_tokens: int = 2048,
        max_together: int | None = None,
    ) -> None:
        """Reserve the scratch; the thread starts with `start`.

        Of at most `max_together` streams small chunks are encoded at once; None: of some where the weights are read
        for longer than a chunk is computed. With 1 no bit of a memory depends on what else waits.
        """
        self._model = model
        self._max_together = max_together
        self._scratch = Scratch(model.kv_shape, max_concurrent_questions, scratch_tokens)
        self._meter = VramMeter(model.device)
        self._memories: dict[str, StreamMemory] = {}
        self._chunks: dict[str, deque[tuple[Chunk, Future[Encoded]]]] = {}
        # Streams whose questions wait for their next chunk: it must wait for those who read, or they hold nothing yet.
        self._pinned: set[str] = set()
        self._uploader = Uploader(model.device) if model.device.type == "cuda" else None
        self._ahead: Upload | None = None  # the next chunk's pictures
        self._answering = Answering(
            model, self._scratch, self._memory, self._pinned.__contains__, max_waiting=max_waiting_questions
        )
        self._fairness = FairShare()
        self._booked = 0.0  # until when the time of turns is
        self._inbox: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._held: _Command | None = None  # taken out of the inbox in the middle of a chunk
        self._infos: dict[str, CacheInfo] = {}  # replaced, never changed: other threads read it
        self._weights_bytes = model.weights_bytes
        self._progress = time.monotonic()
        self._is_closing = threading.Event()
        self._closing_lock = threading.Lock()  # nothing enters the inbox once the thread has drained it
        self._is_closed = False
        self._vram = self._read_vram()
        self._vram_due = 0.0
        self.relieve: Relieve = lambda stream: None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.model = ModelInfo(
            name=model.name,
            model_type=model.config.model_type,
            dtype=str(model.dtype).removeprefix("torch."),
            device=str(model.device),
            max_new_tokens=scratch_tokens // 2,
            max_question_chars=_MAX_QUESTION_CHARS,
            max_options=_MAX_OPTIONS,
            notice=model.notice,
        )

    def warm_up(self, compile: CompileSetting = "auto") -> None:
        """Do now, before `start`, what would otherwise be done on the first frame; see `rehearsal`."""
        _use_device(self._model.device)
        warm_up(self._model, self._scratch, compile)

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout_s: float = 2.0) -> bool:
        """End the thread after its present turn; open work fails with NOT_READY. False if it did not end in time."""
        self._is_closing.set()
        if self._thread.ident is None:  # it was never started: nobody else ends what is open
            self._end_all()
            return True
        self._inbox.put(_Command(lambda: None))
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def is_ready(self) -> bool:
        return self._thread.is_alive() and not self._is_closing.is_set()

    @property
    def progress_age_ms(self) -> float:
        return (time.monotonic() - self._progress) * 1e3

    # ------------------------------------------------------------------------ verbs, from any thread

    def add_stream(self, options: StreamOptions) -> Future[Forecast]:
        return self._call(lambda: self._add_stream(options))

    def foretell(self, options: StreamOptions) -> Future[Forecast]:
        return self._call(lambda: forecast(self._model, options))

    def remove_stream(self, stream: str) -> Future[None]:
        return self._call(lambda: self._remove_stream(stream))

    def adjust(self, stream: str, options: StreamOptions) -> Future[None]:
        return self._call(lambda: self._adjust(stream, options))

    def resize(self, stream: str, memory_bytes: int) -> Future[Forecast]:
        return self._call(lambda: self._resize(stream, memory_bytes))

    def encode(self, stream: str, chunk: Chunk) -> Future[Encoded]:
        future: Future[Encoded] = Future()
        stopped = ChunkRefused("removed", _STOPPED)
        command = _Command(lambda: self._queue_chunk(stream, chunk, future), is_verb=False)
        self._enter(command, future, stopped)
        return future

    def note_unchanged(self, stream: str, unchanged: Unchanged) -> None:
        self._inbox.put(_Command(lambda: self._note_unchanged(stream, unchanged), is_verb=False))

    def ask(
        self,
        request: Ask,
        *,
        arrived: float,
        deadline: float | None = None,
        on_delta: Callable[[str], None] | None = None,
    ) -> Future[Answer]:
        return self._ask(Question(request, Future(), arrived, deadline, on_delta))

    def ask_choice(self, request: AskChoice, *, arrived: float, deadline: float | None = None) -> Future[Choice]:
        return self._ask(Question(request, Future(), arrived, deadline))

    def reset(self, stream: str) -> Future[CacheInfo]:
        return self._call(lambda: self._reset(stream))

    def mark(self, stream: str, name: str) -> Future[Mark]:
        return self._call(lambda: self._mark(stream, name))

    def rollback(self, stream: str, name: str) -> Future[CacheInfo]:
        return self._call(lambda: self._rollback(stream, name))

    def delete_mark(self, stream: str, name: str) -> Future[Marks]:
        return self._call(lambda: self._delete_mark(stream, name))

    def marks(self, stream: str) -> Future[Marks]:
        return self._call(lambda: self._marks(stream))

    def cache_info(self, stream: str) -> CacheInfo:
        info = self._infos.get(stream)
        if info is None:
            raise _unknown_stream(stream, self.streams())
        return info

    def streams(self) -> list[str]:
        return list(self._infos)

    def vram(self) -> Vram:
        return self._vram

    def question_counters(self) -> QuestionCounters:
        return self._answering.counters()

    def _call(self, verb: Callable[[], T]) -> Future[T]:
        """Run a verb on the engine thread."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                result = verb()
            except Exception as error:
                fail(future, error)
            else:
                succeed(future, result)

        self._enter(_Command(run), future, NodeError(ErrorCode.NOT_READY, _STOPPED))
        return future

    def _ask(self, question: Question) -> Future[Any]:
        command = _Command(lambda: self._answering.admit(question), is_verb=False)
        self._enter(command, question.future, NodeError(ErrorCode.NOT_READY, _STOPPED))
        return question.future

    def _enter(self, command: _Command, future: Future[Any], stopped: Exception) -> None:
        """Hand a command to the engine thread; if that has ended, the future fails with `stopped`."""
        with self._closing_lock:
            if not self._is_closed:
                self._inbox.put(command)
                return
        fail(future, stopped)

    # ----------------------------------------------------------------------------- the engine thread

    def _run(self) -> None:
        try:
            _use_device(self._model.device)
            while not self._is_closing.is_set():
                self._progress = time.monotonic()
                self._measure()
                if not self._turn():
                    self._wait()
        except Exception:  # the device is gone, most likely: nobody may wait for an engine that is
            logger.critical("the engine has failed", exc_info=True)
        finally:
            self._end_all()

    def _turn(self) -> bool:
        """Take in what has come, then do one thing. False if there was nothing to do."""
        self._take_in()
        self._answering.drop_ended()
        side = self._choose(can_encode=self._can_encode)
        if side is None:
            return False
        self._booked = time.monotonic()
        if side == "encode":
            self._encode_next()
        else:
            self._answering.go_on()
        self._book(side)
        return True

    def _between(self, streams: Sequence[str]) -> float:
        """Between two layers of chunks of some streams: take the turns that are the answers'; returns their seconds.

        No row below the memory's length moves meanwhile, and the chunk's own count only when all layers have them.
        """
        if self._is_closing.is_set():
            return 0.0
        self._progress = time.monotonic()
        # What is asked about what has seen nothing can be answered after the chunk.
        self._pinned.update(stream for stream in streams if self._memories[stream].now.num_frames == 0)
        self._take_in(in_chunk=True)
        self._answering.drop_ended()
        self._look_ahead()
        self._book("encode")
        if self._choose(can_encode=True) == "encode":
            return 0.0
        self._model.wait()  # what is left to do of the layers before is encoding
        self._book("encode")
        began = self._booked
        while self._choose(can_encode=True) == "decode":
            self._answering.go_on()
            self._book("decode")
        return self._booked - began

    def _take_in(self, *, in_chunk: bool = False) -> None:
        """Run the commands that have come, in their order; in the middle of a chunk those before the first verb."""
        while self._held is not None or not self._inbox.empty():
            command = self._held or self._inbox.get()
            if in_chunk and command.is_verb:
                self._held = command
                return
            self._held = None
            command.run()

    def _choose(self, *, can_encode: bool) -> Side | None:
        return self._fairness.choose(can_encode=can_encode, can_decode=self._answering.can_go_on)

    def _book(self, side: Side) -> None:
        """Book the time since the last booking."""
        now = time.monotonic()
        self._fairness.spent(side, now - self._booked)
        self._booked = now

    def _wait(self) -> None:
        try:
            self._inbox.get(timeout=_IDLE_S).run()
        except queue.Empty:
            return

    def _end_all(self) -> None:
        with self._closing_lock:
            self._is_closed = True
        self._take_in()
        self._answering.end_all(NodeError(ErrorCode.NOT_READY, _STOPPED))
        for stream in self._chunks:
            self._refuse_queued(stream, "removed", _STOPPED)
        if self._uploader is not None:
            self._uploader.close()

    # ------------------------------------------------------------------------------------- streams

    def _add_stream(self, options: StreamOptions) -> Forecast:
        if options.name in self._memories:
            raise NodeError(ErrorCode.STREAM_EXISTS, f"there is a stream {options.name!r} already")
        options = within_room(options, self._room())
        foretold = forecast(self._model, options)
        try:
            memory = StreamMemory(self._model, options)
        except ValueError as error:
            raise NodeError(ErrorCode.BAD_REQUEST, str(error)) from error
        except MemoryError as error:
            raise NodeError(ErrorCode.OUT_OF_MEMORY, str(error)) from error
        self._memories[options.name] = memory
        self._chunks[options.name] = deque()
        self._note(options.name)
        return foretold

    def _room(self) -> Room | None:
        """What memories may still take of the device; None if it is not known, as of a model over several."""
        return room_of(self._read_vram()) if len(set(self._model.kv_shape.layer_devices)) == 1 else None

    def _remove_stream(self, stream: str) -> None:
        memory = self._memory(stream)
        self._answering.cancel_reading(memory, 0, "the stream was removed")
        self._refuse_queued(stream, "removed", "the stream was removed")
        self._pinned.discard(stream)
        del self._memories[stream], self._chunks[stream]
        memory.release()
        self._infos = {name: info for name, info in self._infos.items() if name != stream}

    def _reset(self, stream: str) -> CacheInfo:
        memory = self._memory(stream)
        self._answering.cancel_reading(memory, 0, "the memory was reset")
        self._refuse_queued(stream, "reset", "the memory was reset")
        self._pinned.discard(stream)
        memory.reset()
        return self._note(stream)

    def _adjust(self, stream: str, options: StreamOptions) -> None:
        self._memory(stream).adjust(options)
        self._note(stream)

    def _resize(self, stream: str, memory_bytes: int) -> Forecast:
        memory = self._memory(stream)
        options = dataclasses.replace(memory.options, memory_bytes=memory_bytes, min_memory_bytes=None)
        foretold = forecast(self._model, within_room(options, self._room()))
        try:
            memory.resize(memory_bytes)
        except (MemoryError, ValueError) as error:
            raise NodeError(ErrorCode.OUT_OF_MEMORY, str(error)) from error
        self._note(stream)
        return foretold

    def _rollback(self, stream: str, name: str) -> CacheInfo:
        memory = self._memory(stream)
        mark = mark_of(memory, stream, name)
        self._answering.cancel_reading(memory, mark.num_tokens, f"the memory was rolled back to {name!r}")
        self._refuse_queued(stream, "reset", f"the memory was rolled back to {name!r}")
        self._pinned.discard(stream)
        memory.rollback(name)
        return self._note(stream)

    def _mark(self, stream: str, name: str) -> Mark:
        memory = self._memory(stream)
        marks = memory.ledger.marks
        if name not in marks and len(marks) >= MAX_MARKS:
            raise NodeError(ErrorCode.TOO_LARGE, f"{stream!r} has {MAX_MARKS} marks already, delete one")
        return _wire_mark(name, memory.mark(name))

    def _delete_mark(self, stream: str, name: str) -> Marks:
        memory = self._memory(stream)
        mark_of(memory, stream, name)
        memory.ledger.delete_mark(name)
        return self._marks(stream)

    def _marks(self, stream: str) -> Marks:
        marks = self._memory(stream).ledger.marks
        return Marks(marks=[_wire_mark(name, snapshot) for name, snapshot in marks.items()])

    def _memory(self, stream: str) -> StreamMemory:
        memory = self._memories.get(stream)
        if memory is None:
            raise _unknown_stream(stream, list(self._memories))
        return memory

    def _note(self, stream: str) -> CacheInfo:
        """Show other threads the stream's memory as it is now."""
        info = self._memories[stream].info()
        self._infos = {**self._infos, stream: info}
        return info

    # -------------------------------------------------------------------------------------- chunks

    def _queue_chunk(self, stream: str, chunk: Chunk, future: Future[Encoded]) -> None:
        if stream in self._chunks:
            self._chunks[stream].append((chunk, future))
        else:
            fail(future, ChunkRefused("removed", f"there is no stream {stream!r}"))

    def _note_unchanged(self, stream: str, unchanged: Unchanged) -> None:
        if stream in self._memories:
            ledger = self._memories[stream].ledger
            ledger.note_unchanged(unchanged)
            info = replace(self._infos[stream], seen_until_ns=or_unset(ledger.now.seen_until_ns))
            self._infos = {**self._infos, stream: info}

    @property
    def _can_encode(self) -> bool:
        return self._next_stream() is not None

    def _next_stream(self) -> str | None:
        """Whose chunk is next: not that of one whose memory must not move yet."""
        return next((name for name, chunks in self._chunks.items() if chunks and not self._waits(name)), None)

    def _waits(self, stream: str) -> bool:
        return stream in self._pinned and self._memories[stream].is_read

    def _encode_next(self) -> None:
        """Encode the next chunk; streams take turns."""
        stream = self._next_stream()
        assert stream is not None, "no chunk can be encoded"
        plan = self._plan(stream)
        if plan is not None and plan.must_wait:
            # The answers that run are done soon, and none begins before the chunk is encoded.
            self._pinned.add(stream)
            return
        due = [self._due(stream, plan), *(self._due(*each) for each in self._companions(stream, plan))]
        running = [each for each in due if each.future.set_running_or_notify_cancel()]
        for each in self._encode_together(running):
            self._encode(each)
        self._pinned.difference_update(each.stream for each in due)

    def _plan(self, stream: str) -> Plan | None:
        return _plan(self._memories[stream], self._chunks[stream][0][0])

    def _due(self, stream: str, plan: Plan | None) -> _Due:
        """Take a stream's next chunk; the stream goes to the end of the line."""
        chunk, future = self._chunks[stream].popleft()
        self._chunks[stream] = self._chunks.pop(stream)
        return _Due(stream, chunk, plan, self._uploaded(chunk), future)

    def _companions(self, stream: str, plan: Plan | None) -> list[tuple[str, Plan]]:
        """Further streams whose next chunks are encoded with that of this one: of few sizes, each is a graph."""
        most = self._max_together
        if most is None:
            most = _MAX_TOGETHER if self._model.pieces is not None else 1
        if plan is None:
            return []
        most = min(most, MAX_TOKENS // len(plan.span))
        fitting = (
            (name, its)
            for name, chunks in self._chunks.items()
            if name != stream and chunks and not self._waits(name)
            if (its := self._plan(name)) is not None and its.goes_with(plan)
        )
        others = list(islice(fitting, max(0, most - 1)))  # a plan takes its time: no more are made than are wanted
        return others[: (1 << (1 + len(others)).bit_length() - 1) - 1]  # 1, 2, 4 chunks in all

    def _encode_together(self, due: Sequence[_Due]) -> Sequence[_Due]:
        """Encode chunks of several streams at once; returns what is left for one by one, all if that fails."""
        if len(due) < 2:
            return due
        self._look_ahead()
        additions = [Addition(self._memories[each.stream], each.plan, each.upload) for each in due if each.plan]
        try:
            encoded = append_together(additions, partial(self._between, [each.stream for each in due]))
        except Exception:
            logger.info("chunks of %d streams are encoded one by one", len(due), exc_info=True)
            self._pinned.update(each.stream for each in due)  # nobody begins to read what the next ones may move
            return [each._replace(plan=None) for each in due]  # one may have made room before it failed
        for each, outcome in zip(due, encoded, strict=True):
            self._note(each.stream)
            each.future.set_result(outcome)
        return []

    def _encode(self, due: _Due) -> None:
        outcome: Encoded | ChunkRefused
        try:
            outcome = self._append(due)
        except ChunkRefused as error:
            outcome = error
        except Exception as error:
            logger.exception("a chunk of %s could not be encoded", due.stream)
            outcome = ChunkRefused("encode_error", f"{type(error).__name__}: {error}")
            outcome.__cause__ = error.with_traceback(None)  # its frames hold the activations that must go
        self._note(due.stream)  # others may have been forgotten for it
        if isinstance(outcome, ChunkRefused):
            due.future.set_exception(outcome)
        else:
            due.future.set_result(outcome)

    def _append(self, due: _Due) -> Encoded:
        """Encode a chunk; one that the device has no memory for is tried once more if its stream can do with less."""
        self._look_ahead()
        memory, between = self._memories[due.stream], partial(self._between, (due.stream,))
        try:
            return memory.append(due.chunk, due.upload, between, due.plan)
        except ChunkRefused as error:
            options = self.relieve(due.stream) if error.reason == "out_of_memory" else None
            if options is None:
                raise
            memory.adjust(options)
            plan = _plan(memory, due.chunk)
            if plan is not None and plan.must_wait:  # for new questions: with less room it may have to forget
                raise
        return memory.append(due.chunk, None, between, plan)

    def _look_ahead(self) -> None:
        """Have the next chunk's pictures uploaded while another one is encoded."""
        if self._uploader is None or self._ahead is not None:
            return
        stream = self._next_stream()
        if stream is not None:
            self._ahead = self._uploader.start(self._chunks[stream][0][0])

    def _uploaded(self, chunk: Chunk) -> Upload | None:
        """The upload of a chunk, if it was begun."""
        if self._ahead is None or self._ahead.chunk is not chunk:
            return None
        upload, self._ahead = self._ahead, None
        return upload

    def _refuse_queued(self, stream: str, reason: str, message: str) -> None:
        chunks = self._chunks[stream]
        while chunks:
            chunk, future = chunks.popleft()
            self._uploaded(chunk)  # it is let go
            fail(future, ChunkRefused(reason, message))

    # ----------------------------------------------------------------------------------- telemetry

    def _measure(self) -> None:
        now = time.monotonic()
        if now >= self._vram_due:
            self._vram, self._vram_due = self._read_vram(), now + _VRAM_PERIOD_S

    def _read_vram(self) -> Vram:
        kv_bytes = sum(info.resident_bytes for info in self._infos.values()) + self._scratch.resident_bytes
        return self._meter.read(weights_bytes=self._weights_bytes, kv_bytes=kv_bytes)


def load_engine(
    model: str = "builtin",
    *,
    dtype: str = "auto",
    device: str = "auto",
    compile: CompileSetting = "auto",
    max_concurrent_questions: int = 8,
    max_waiting_questions: int = 32,
    scratch_tokens: int = 2048,
    max_together: int | None = None,
    prepare: Callable[[VisionLanguageModel], None] = lambda model: None,
) -> Engine:
    """Load a model, `prepare` the process for it, and start an engine on it, warm. Raises what `load_model` raises."""
    loaded = load_model(model, dtype=dtype, device=device)
    prepare(loaded)
    engine = Engine(
        loaded,
        max_concurrent_questions=max_concurrent_questions,
        max_waiting_questions=max_waiting_questions,
        scratch_tokens=scratch_tokens,
        max_together=max_together,
    )
    engine.warm_up(compile)
    engine.start()
    return engine


def _use_device(device: torch.device) -> None:
    """Make a GPU the current one of this thread, for the calls that name none."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _plan(memory: StreamMemory, chunk: Chunk) -> Plan | None:
    """What a memory will do for a chunk; None where that fails, as it will again when the chunk is appended."""
    try:
        return memory.plan(chunk)
    except Exception:
        return None


def _wire_mark(name: str, snapshot: Snapshot) -> Mark:
    return Mark(
        name=name,
        num_tokens=snapshot.num_tokens,
        num_frames=snapshot.num_frames,
        until_ns=UNSET if snapshot.newest_ns is None else snapshot.newest_ns,
    )


def _unknown_stream(stream: str, known: list[str]) -> NodeError:
    return NodeError(ErrorCode.UNKNOWN_STREAM, f"there is no stream {stream!r}", details={"streams": known})
