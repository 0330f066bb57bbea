"""The engine against the clock: chunks over histories of any length, questions, and both at the same time."""

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from msgspec import UNSET, UnsetType

from ..protocol.errors import NodeError
from ..protocol.messages import Answer, Ask, Vram
from .bench_profile import prepare_profiler, top_kernels
from .bench_report import ONLOOKER, Case, Kernel, Room, Row
from .ceilings import Ceilings
from .chunk import Chunk, Encoded, Picture
from .compilation import CompileSetting
from .engine import Engine
from .layout import LayoutState
from .memory import StreamMemory
from .model import VisionLanguageModel
from .options import StreamOptions
from .preprocess import encode_size
from .workload import Grid, TextSizes, VisionSizes, Work, decode_work, history_work, prefill_work, vision_work

STREAM = "bench"
WHILE_ANSWERED = "chunks while 8 are asked"
FRAME_NS = 125_000_000  # eight frames a second
NUM_TOGETHER = 8
SPARE_TOKENS = 64  # for the words around a chunk
QUESTION = "What do you see now?"
LONG_QUESTION = "Describe everything that can be seen, in detail."

_FILLED = "filled"
_NUM_DISTINCT_FRAMES = 8
_FRAMES_PER_POSITION = 32  # tokens that share a temporal position in a long memory, roughly
_NUM_SNAPSHOTS = 200
_AHEAD = 2  # chunks on their way while one is encoded
_VRAM_AGE_S = 2.0  # the engine reads its memory more often than this


@dataclass(frozen=True, slots=True)
class Setting:
    """Frames as they come, the size at which they are encoded (None: the model's own rule), and how many a chunk."""

    received: tuple[int, int]
    encode_size: tuple[int, int] | None
    chunk_frames: int


class BenchEngine(Engine):
    """An engine whose memories can be filled at once."""

    def fill(self, stream: str, num_tokens: int) -> Future[None]:
        """Have a memory hold so many tokens of noise, and mark that point; `rewind` goes back to it."""
        return self._call(lambda: self._fill(stream, num_tokens))

    def rewind(self, stream: str) -> None:
        self.rollback(stream, _FILLED).result()

    def time_snapshot(self, stream: str) -> Future[float]:
        """Milliseconds of one snapshot and its restoration, on the thread that takes them."""
        return self._call(lambda: _snapshot_ms(self._memory(stream)))

    @property
    def scratch_bytes(self) -> int:
        return self._scratch.resident_bytes

    def profile(self, submit: Callable[[], Future[Any]], *, model: str, of: str) -> list[Kernel]:
        """What runs on the device until submitted work is done. Call it from the main thread.

        A GPU tells of all threads; on the CPU the profiler sees its own alone, so that it must run on the engine's.
        """
        device = self._model.device
        if device.type == "cuda":
            return top_kernels(device, lambda: submit().result(), model=model, of=of)
        prepare_profiler()
        return self._call(lambda: top_kernels(device, lambda: self._run_at_once(submit), model=model, of=of)).result()

    def _run_at_once(self, submit: Callable[[], Future[Any]]) -> None:
        """On the engine thread: submit work and do it, with all else that waits."""
        future = submit()
        while not future.done():
            self._turn()

    def _fill(self, stream: str, num_tokens: int) -> None:
        memory = self._memory(stream)
        memory.reset()
        fill(memory, num_tokens)
        memory.mark(_FILLED)
        self._note(stream)


def fill(memory: StreamMemory, num_tokens: int) -> None:
    """Put noise into the first rows of an empty memory, as if frames had been encoded into them."""
    if num_tokens == 0:
        return
    pixels = np.zeros((1, 1, 3), np.uint8)
    layout = LayoutState(next_position=1 + num_tokens // _FRAMES_PER_POSITION, is_empty=False)
    memory.ledger.append(Chunk((Picture(pixels, 0, 0, "media", 0),)), num_tokens, layout)
    extent = memory.extent(memory.now)
    for layer in range(extent.arena.shape.num_layers):
        for rows in extent.rows(layer):
            rows.normal_()


class Frames:
    """Chunks of noise without end, each later than the one before."""

    def __init__(self, setting: Setting, seed: int = 0) -> None:
        self._num = setting.chunk_frames
        width, height = setting.received
        rng = np.random.default_rng(seed)
        shape = (_NUM_DISTINCT_FRAMES, height, width, 3)
        self._pixels = rng.integers(0, 256, shape, dtype=np.uint8)
        self._next = 1

    def chunk(self) -> Chunk:
        seqs = range(self._next, self._next + self._num)
        self._next += self._num
        return Chunk(tuple(self._picture(seq) for seq in seqs))

    def _picture(self, seq: int) -> Picture:
        time_ns = seq * FRAME_NS
        return Picture(self._pixels[seq % _NUM_DISTINCT_FRAMES], seq, time_ns, "media", time_ns)


class EngineBench:
    """Measures one model's engine; every verb returns rows, and raises what the engine raises."""

    def __init__(
        self, model: VisionLanguageModel, ceilings: Ceilings, name: str, compile: CompileSetting = "auto"
    ) -> None:
        """Start an engine on the model, warm; `warm_up_s` says how long that took."""
        self.name = name
        self.model = model
        self.ceilings = ceilings
        self.text = TextSizes.of(model.config.text_config)
        self.vision = VisionSizes.of(model.config.vision_config)
        self.engine = BenchEngine(model, max_concurrent_questions=NUM_TOGETHER)
        began = time.monotonic()
        self.engine.warm_up(compile)
        self.warm_up_s = time.monotonic() - began
        self.engine.start()

    def close(self) -> None:
        self.engine.close()

    @contextmanager
    def stream(self, setting: Setting, num_tokens: int) -> Iterator["StreamBench"]:
        """A stream with room for so many tokens. Raises NodeError OUT_OF_MEMORY."""
        options = StreamOptions(
            STREAM,
            chunk_frames=setting.chunk_frames,
            encode_size=setting.encode_size,
            memory_bytes=num_tokens * self.model.kv_shape.bytes_per_token,
        )
        self.engine.add_stream(options).result()
        try:
            yield StreamBench(self, setting)
        finally:
            self.engine.remove_stream(STREAM).result()

    def room(self, after: str, *, is_fresh: bool = True) -> Room:
        """Device memory, with peaks since the start: as it is now, or as the engine saw it last."""
        vram = _fresh_vram(self.engine) if is_fresh else self.engine.vram()
        arena = sum(self.engine.cache_info(name).resident_bytes for name in self.engine.streams())
        return Room(
            model=self.name,
            after=after,
            weights_bytes=vram.weights_bytes,
            arena_bytes=arena,
            scratch_bytes=self.engine.scratch_bytes,
            workspace_peak_bytes=_known(vram.activations_peak_bytes),
            torch_reserved_bytes=_known(vram.torch_reserved_bytes),
            torch_peak_bytes=_known(vram.torch_peak_bytes),
        )

    def num_chunk_tokens(self, setting: Setting) -> int:
        """Tokens of a chunk's pictures; the words around them come on top."""
        size = encode_size(setting.received, self.model.geometry, explicit=setting.encode_size)
        return self.grid(size, setting.chunk_frames).num_tokens

    def grid(self, size: tuple[int, int], chunk_frames: int) -> Grid:
        return Grid(-(-chunk_frames // self.model.geometry.temporal_patch), *self.model.geometry.grid(size))


class StreamBench:
    """Measures one stream of an engine."""

    def __init__(self, bench: EngineBench, setting: Setting) -> None:
        self._bench = bench
        self._engine = bench.engine
        self._setting = setting
        self._frames = Frames(setting)
        self._has_seen = False  # what does not depend on the history is reported once

    def encode(self, history: int, *, num_chunks: int = 5, max_s: float = 5.0) -> list[Row]:
        """Chunks one by one over a history of exactly so many tokens, then some in a row."""
        self._engine.fill(STREAM, history).result()
        first_ms = self._timed_chunk()[0]
        timed = [self._timed_chunk()]
        began = time.perf_counter()
        while len(timed) < num_chunks and time.perf_counter() - began < max_s:
            timed.append(self._timed_chunk())
        *stages, whole = self._chunk_rows(history, [ms for ms, _ in timed], [encoded for _, encoded in timed])
        assert whole.ms is not None
        return [*stages, replace(whole, note=_first_text(first_ms, whole.ms))]

    def throughput(self, history: int, *, num_chunks: int) -> list[Row]:
        """Chunks that are always waiting, while nobody asks."""
        self._engine.fill(STREAM, history).result()
        self._encode_in_a_row(1)
        self._engine.rewind(STREAM)
        fps, encoded = self._encode_in_a_row(num_chunks)
        self._engine.rewind(STREAM)
        return [self._rate_row("chunks in a row", history, fps, encoded, num_chunks)]

    def throughput_while_asked(self, alone: Row, *, num_chunks: int, max_chunks: int) -> list[Row]:
        """The same while 8 questions are always being answered; more chunks until one of them is."""
        history = alone.case.history
        self._engine.fill(STREAM, history).result()
        with Askers(self._engine, NUM_TOGETHER) as askers:
            askers.wait_until_each_was_answered()
            askers.forget()
            fps, encoded = self._encode_in_a_row(num_chunks)
            while (tokens_per_s := askers.tokens_per_s) is None and num_chunks < max_chunks:
                self._encode_in_a_row(1)
                num_chunks += 1
        row = self._rate_row(WHILE_ANSWERED, history, fps, encoded, num_chunks)
        kept = f"{fps / alone.rate:.0%} of the rate kept" if alone.rate else ""
        case = Case(self._bench.name, "tokens while encoding", history=history, num_answers=NUM_TOGETHER)
        none = "" if tokens_per_s else "no answer was complete meanwhile"
        return [replace(row, note=kept), Row(case, rate=tokens_per_s, unit="tokens/s", note=none)]

    def questions(self, history: int, *, num_tokens: int = 32) -> list[Row]:
        """The first token, and each further one, of one question and of 8 at once."""
        self._engine.fill(STREAM, history).result()
        self._ask(4).result()
        firsts = [self._ask(1).result() for _ in range(3)]
        one = self._ask(num_tokens).result()
        together = [future.result() for future in [self._ask(num_tokens) for _ in range(NUM_TOGETHER)]]
        return [
            self._first_token_row(history, firsts),
            self._token_row(history, [one], num_tokens),
            self._token_row(history, together, num_tokens),
        ]

    def snapshot(self, history: int) -> list[Row]:
        """A snapshot and its restoration: what it costs to ask without a trace."""
        self._engine.fill(STREAM, history).result()
        ms = self._engine.time_snapshot(STREAM).result()
        return [Row(Case(self._bench.name, "snapshot + restore", history=history), ms=ms, note="copies 0 bytes")]

    def kernels(self, history: int, *, num_tokens: int = 17) -> list[Kernel]:
        """Of one chunk, and of one answer of several tokens."""
        self._engine.fill(STREAM, history).result()
        self._timed_chunk()
        chunk, name, over = self._frames.chunk(), self._bench.name, f"over {history} tokens"
        kernels = self._engine.profile(lambda: self._engine.encode(STREAM, chunk), model=name, of=f"a chunk {over}")
        self._engine.rewind(STREAM)
        answer = f"a question and {num_tokens} tokens of its answer {over}"
        return kernels + self._engine.profile(lambda: self._ask(num_tokens), model=name, of=answer)

    def _timed_chunk(self) -> tuple[float, Encoded]:
        """A chunk from its submission until it is in the memory, which is then cut back."""
        chunk = self._frames.chunk()
        began = time.perf_counter()
        encoded = self._engine.encode(STREAM, chunk).result()
        ms = (time.perf_counter() - began) * 1e3
        self._engine.rewind(STREAM)
        return ms, encoded

    def _encode_in_a_row(self, num_chunks: int) -> tuple[float, Encoded]:
        """Frames a second, with the next chunks always waiting."""
        waiting: deque[Future[Encoded]] = deque()
        encoded: Encoded | None = None
        began = time.perf_counter()
        for _ in range(num_chunks):
            waiting.append(self._engine.encode(STREAM, self._frames.chunk()))
            if len(waiting) > _AHEAD:
                encoded = waiting.popleft().result()
        while waiting:
            encoded = waiting.popleft().result()
        assert encoded is not None
        return num_chunks * self._setting.chunk_frames / (time.perf_counter() - began), encoded

    def _ask(self, num_tokens: int) -> Future[Answer]:
        question = QUESTION if num_tokens == 1 else LONG_QUESTION
        return self._engine.ask(_request(question, num_tokens), arrived=time.monotonic())

    def _chunk_rows(self, history: int, times_ms: list[float], encoded: list[Encoded]) -> list[Row]:
        num_tokens = encoded[-1].num_tokens
        vision, prefill, past = self._works(history, encoded[-1])
        ceilings = self._bench.ceilings

        def row(stage: str, ms: float, over: int) -> Row:
            return Row(self._case(stage, over, encoded[-1]), ms=ms, num_tokens=num_tokens)

        whole = row("chunk", statistics.median(times_ms), history).limited(ceilings, vision, prefill, past)
        rows = [
            row("prefill", statistics.median(each.prefill_ms for each in encoded), history).limited(
                ceilings, prefill, past
            ),
            replace(whole, rate=self._setting.chunk_frames / whole.ms * 1e3 if whole.ms else None, unit="frames/s"),
        ]
        if self._has_seen:
            return rows
        self._has_seen = True
        return [
            row("preprocess", statistics.median(each.preprocess_ms for each in encoded), 0),
            row("vision tower", statistics.median(each.vision_ms for each in encoded), 0).limited(ceilings, vision),
            *rows,
        ]

    def _works(self, history: int, encoded: Encoded) -> tuple[Work, Work, Work]:
        """Of the vision tower, of the chunk's own tokens in the language model, and of its attention to the history."""
        bench, itemsize = self._bench, self._bench.model.dtype.itemsize
        grid = bench.grid(encoded.encoded_size, self._setting.chunk_frames)
        return (
            vision_work(bench.vision, grid, itemsize),
            prefill_work(bench.text, encoded.num_tokens, itemsize),
            history_work(bench.text, encoded.num_tokens, history, itemsize),
        )

    def _rate_row(self, stage: str, history: int, fps: float, encoded: Encoded, num_chunks: int) -> Row:
        """The limit is that of a chunk in the middle: the history grows by every chunk."""
        row = Row(
            self._case(stage, history, encoded),
            ms=self._setting.chunk_frames / fps * 1e3,
            rate=fps,
            unit="frames/s",
            num_tokens=encoded.num_tokens,
        )
        middle = history + num_chunks // 2 * encoded.num_tokens
        return row.limited(self._bench.ceilings, *self._works(middle, encoded))

    def _first_token_row(self, history: int, answers: list[Answer]) -> Row:
        ms, num = statistics.median(a.timing.first_token_ms for a in answers), answers[0].num_prompt_tokens
        bench, itemsize = self._bench, self._bench.model.dtype.itemsize
        case = Case(bench.name, "first token", history=history, num_answers=1)
        row = Row(case, ms=ms, num_tokens=num, note=f"a question of {num} tokens")
        return row.limited(
            bench.ceilings,
            prefill_work(bench.text, num, itemsize, num_logits=1) + history_work(bench.text, num, history, itemsize),
        )

    def _token_row(self, history: int, answers: list[Answer], num_wanted: int) -> Row:
        """The pace of the answer that began last: it alone never waited for the first token of another."""
        bench, num = self._bench, len(answers)
        case = Case(bench.name, "decoded token", history=history, num_answers=num)
        paces = [a.timing.decode_ms / (a.num_answer_tokens - 1) for a in answers if a.num_answer_tokens > 1]
        if not paces:
            return Row(case, note="every answer ended with its first token")
        ms = min(paces)
        own = answers[0].num_prompt_tokens + num_wanted // 2
        work = decode_work(bench.text, num, history, own, bench.model.dtype.itemsize)
        return Row(case, ms=ms, rate=num / ms * 1e3, unit="tokens/s", num_tokens=num).limited(bench.ceilings, work)

    def _case(self, stage: str, history: int, encoded: Encoded) -> Case:
        return Case(
            self._bench.name, stage, "x".join(map(str, encoded.encoded_size)), self._setting.chunk_frames, history
        )


class Askers:
    """Several threads, each with a question that is asked anew as soon as it is answered."""

    def __init__(self, engine: Engine, num: int, *, num_tokens: int = 16) -> None:
        self._engine = engine
        self._request = _request(LONG_QUESTION, num_tokens)
        self._answers: list[deque[Answer]] = [deque() for _ in range(num)]  # each filled by its own thread
        self._running: dict[int, Future[Answer]] = {}
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(num)]
        self._stop = threading.Event()
        self._errors: list[NodeError] = []

    def __enter__(self) -> "Askers":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for future in list(self._running.values()):
            future.cancel()
        for thread in self._threads:
            thread.join()

    def wait_until_each_was_answered(self, timeout_s: float = 60.0) -> None:
        """Raises TimeoutError, or the first error that an asker met with."""
        deadline = time.monotonic() + timeout_s
        while not all(self._answers):
            if self._errors:
                raise self._errors[0]
            if time.monotonic() > deadline:
                raise TimeoutError(f"not every question had an answer after {timeout_s:g} s")
            time.sleep(0.002)

    def forget(self) -> None:
        """Count only what is answered from now on."""
        for answers in self._answers:
            answers.clear()

    @property
    def tokens_per_s(self) -> float | None:
        """Of all askers together, by the pace of the answers that are complete; None if none is."""
        answers = [answer for answers in self._answers for answer in list(answers)]
        seconds = sum(answer.timing.total_ms for answer in answers) / 1e3
        return len(self._answers) * sum(answer.num_answer_tokens for answer in answers) / seconds if seconds else None

    def _run(self, i: int) -> None:
        try:
            while not self._stop.is_set():
                future = self._running[i] = self._engine.ask(self._request, arrived=time.monotonic())
                if self._stop.is_set():
                    future.cancel()
                self._answers[i].append(future.result())
        except CancelledError:
            return
        except NodeError as error:
            self._errors.append(error)


def history_rows(rows: Sequence[Row], ceilings: Ceilings) -> list[Row]:
    """What attention over the history takes: the prefill of a chunk over it, less that of one over no history."""
    prefills = [row for row in rows if row.case.stage == "prefill" and row.way == ONLOOKER and row.ms is not None]
    alone = {row.case: row for row in prefills if row.case.history == 0}
    past = []
    for row in prefills:
        base = alone.get(replace(row.case, history=0))
        if row.case.history and base is not None and base.ms is not None and row.ms is not None:
            case = replace(row.case, stage="attention over history")
            work = Work(row.flops - base.flops, row.num_bytes - base.num_bytes)
            ms = row.ms - base.ms
            is_lost = ms <= 0
            note = "lost in the noise of the prefill" if is_lost else ""
            past.append(
                Row(case, ms=None if is_lost else ms, num_tokens=row.num_tokens, note=note).limited(ceilings, work)
            )
    return past


def _request(question: str, num_tokens: int) -> Ask:
    return Ask(stream=STREAM, question=question, max_new_tokens=num_tokens)


def _snapshot_ms(memory: StreamMemory) -> float:
    began = time.perf_counter()
    for _ in range(_NUM_SNAPSHOTS):
        memory.mark("snapshot")
        memory.rollback("snapshot")
    ms = (time.perf_counter() - began) / _NUM_SNAPSHOTS * 1e3
    memory.ledger.delete_mark("snapshot")
    return ms


def _fresh_vram(engine: Engine) -> Vram:
    """What the engine measures next: it does so about once a second. On the CPU nothing changes."""
    if engine.vram().torch_peak_bytes is UNSET:
        return engine.vram()
    before, deadline = engine.vram(), time.monotonic() + _VRAM_AGE_S
    while engine.vram() is before and time.monotonic() < deadline:
        time.sleep(0.01)
    return engine.vram()


def _known(num_bytes: int | UnsetType) -> int | None:
    return None if num_bytes is UNSET else num_bytes


def _first_text(first_ms: float, usual_ms: float) -> str:
    """Worth a word only where the first chunk was held up."""
    return f"the first of them {first_ms:.0f} ms" if first_ms > 2 * usual_ms else ""
