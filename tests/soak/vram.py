"""Device memory of an engine that works for a long time: streams whose memories are full, and questions in between.

    python tests/soak/vram.py --config qwen2.5-vl-3b --minutes 20 --json FILE     random weights, on a GPU
    python tests/soak/vram.py --model builtin --size 56 --minutes 1 --horizon 60  a trial, on the CPU

Three cameras run in real time: `window`, `thin`, and `still`, a window that is gated and drops tokens. A fourth one,
`visitor`, starts over when it is full; from the middle on it is removed and added again by turns. All memories are
soon full, and positions end after `--horizon`, so that keys are rotated again and again.

A line a second goes to FILE; the last one is the summary, also of a run that is ended by SIGTERM. Exits with 1
where, after the warm-up, what torch has allocated or reserved while all cameras are there and nothing is answered
moved by a megabyte, where positions passed the horizon, or where anything failed. Both are this process's own figures,
whatever others take of the device.
"""

import argparse
import json
import logging
import signal
import statistics
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import msgspec
import numpy as np
import torch

from onlooker.node.chunk import Chunk, ChunkRefused, Encoded, Picture, Unchanged
from onlooker.node.engine import Engine
from onlooker.node.forecast import footprint_of
from onlooker.node.model import load_model
from onlooker.node.options import StreamOptions
from onlooker.node.published import build_published, default_dtype
from onlooker.protocol.errors import ErrorCode, NodeError
from onlooker.protocol.messages import Ask, AskChoice

CAMERAS = ("window", "thin", "still", "visitor")
MEGABYTE = 1_000_000
WARM_UP_SHARE = 0.15  # of the run: the third minute of twenty
VISIT_SHARE = 0.05  # a visitor stays for, from the middle on
ABSENT_S = 5.0
ASK_EVERY_S = 3.0
DEADLINE_S = 30.0
NUM_ASKED = (1, 1, 2, 1, 4, 1, 1, 8)  # at a time, one after the other
NUM_WORDS = (1, 12, 40, 100)  # of a question
SCENE_S = 10  # for so long the still camera's picture moves, and then stands still
MAX_IN_FLIGHT = 2
NUM_PICTURES = 32

logger = logging.getLogger("soak")


class DeviceBytes(NamedTuple):
    """What torch has of the device, between two turns of the engine."""

    at_rest: bool  # nothing is answered, and no pictures are on their way
    allocated: int
    reserved: int
    peak: int  # since the reading before


class WatchedEngine(Engine):
    """Keeps what torch has whenever the engine measures itself, which no chunk is in the middle of."""

    def _read_vram(self) -> Any:
        questions = self.question_counters()
        at_rest = not (questions.running or questions.waiting or self._ahead)
        allocated, reserved, peak = 0, 0, 0
        if self._model.device.type == "cuda":
            stats = torch.cuda.memory_stats(self._model.device)  # the peak begins anew with the engine's own reading
            allocated, peak = stats["allocated_bytes.all.current"], stats["allocated_bytes.all.peak"]
            reserved = stats["reserved_bytes.all.current"]
        self.device_bytes = DeviceBytes(at_rest, allocated, reserved, peak)
        return super()._read_vram()


class Tally:
    """What happened, and how long it took. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._times: dict[str, list[tuple[float, float]]] = {}  # when, and milliseconds
        self.counts: Counter[str] = Counter()

    def count(self, what: str, num: int = 1) -> None:
        with self._lock:
            self.counts[what] += num

    def took(self, what: str, ms: float) -> None:
        with self._lock:
            self._times.setdefault(what, []).append((time.monotonic(), ms))

    def median_ms(self, what: str, begin: float, end: float) -> float | None:
        """Of what was done between two times; None if nothing was."""
        with self._lock:
            some = [ms for at, ms in self._times.get(what, ()) if begin <= at < end]
        return round(statistics.median(some), 3) if some else None

    @property
    def num_failures(self) -> int:
        return sum(num for what, num in self.counts.items() if what.startswith("failed"))


@dataclass(frozen=True, slots=True)
class Setting:
    """What all cameras have in common."""

    size: int  # pixels of a side
    fps: float
    seconds: float  # of the run


class Camera:
    """Pictures of one stream in real time, on a thread of its own, from the adding of the stream to its removal."""

    def __init__(self, engine: Engine, options: StreamOptions, setting: Setting, tally: Tally) -> None:
        self._engine, self._options, self._setting, self._tally = engine, options, setting, tally
        self._pictures = _pictures(setting.size, has_scene=options.drop is not None)
        self._in_flight: deque[Future[Encoded]] = deque()
        self._pending: list[Picture] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=options.name, daemon=True)
        engine.add_stream(options).result(60)
        self._thread.start()

    def remove(self) -> None:
        self.stop()
        self._thread.join(60)
        self._engine.remove_stream(self._options.name).result(60)

    def stop(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        began, seq = time.monotonic(), 0
        try:
            while not self._stop.wait(max(0.0, began + seq / self._setting.fps - time.monotonic())):
                self._take(seq)
                seq = max(seq + 1, int((time.monotonic() - began) * self._setting.fps))  # late ones are left out
        except Exception:
            traceback.print_exc()
            self._tally.count(f"failed: camera {self._options.name}")

    def _take(self, seq: int) -> None:
        stream_ns = int(seq / self._setting.fps * 1e9)
        if self._options.drop is not None and int(stream_ns / 1e9) // SCENE_S % 2:
            self._engine.note_unchanged(self._options.name, Unchanged(stream_ns, time.time_ns()))
            self._tally.count(f"{self._options.name}: gated")
            return
        pixels = self._pictures[seq % NUM_PICTURES]
        self._pending.append(Picture(pixels, seq, time.time_ns(), "capture", stream_ns))
        if len(self._pending) == self._options.chunk_frames:
            self._send(Chunk(tuple(self._pending)))
            self._pending.clear()

    def _send(self, chunk: Chunk) -> None:
        while self._in_flight and self._in_flight[0].done():
            self._in_flight.popleft()
        if len(self._in_flight) == MAX_IN_FLIGHT:
            self._tally.count(f"{self._options.name}: left out, two chunks wait")
            return
        future = self._engine.encode(self._options.name, chunk)
        self._in_flight.append(future)
        future.add_done_callback(partial(self._settle, time.monotonic()))

    def _settle(self, began: float, future: Future[Encoded]) -> None:
        name = self._options.name
        try:
            encoded = future.result()
        except CancelledError:
            return
        except ChunkRefused as error:
            is_expected = error.reason == "removed"
            self._tally.count(f"{name}: removed" if is_expected else f"failed: {name} {error.reason}")
            if not is_expected:
                logger.error("a chunk of %s was refused: %s", name, error)
            return
        self._tally.count(f"{name}: chunks")
        self._tally.count(f"{name}: dropped tokens", encoded.num_dropped_tokens)
        self._tally.count(f"{name}: forgotten frames", encoded.num_forgotten_frames)
        self._tally.took(f"{name}: chunk", encoded.preprocess_ms + encoded.vision_ms + encoded.prefill_ms)
        self._tally.took(f"{name}: chunk until done", (time.monotonic() - began) * 1e3)


class Asker:
    """Questions of all lengths, by turns about each stream; a few at a time, which nobody waits for."""

    def __init__(self, engine: Engine, tally: Tally) -> None:
        self._engine, self._tally = engine, tally
        self._num_rounds = self._num_asked = 0

    def ask(self, streams: list[str]) -> None:
        for _ in range(NUM_ASKED[self._num_rounds % len(NUM_ASKED)]):
            self._ask(streams[self._num_asked % len(streams)])
            self._num_asked += 1
        self._num_rounds += 1

    def _ask(self, stream: str) -> None:
        number, now = self._num_asked, time.monotonic()
        question = "What? " * NUM_WORDS[number % len(NUM_WORDS)]
        if number % 7 == 6:
            choice = AskChoice(stream=stream, question=question, options=["yes", "no, not at all", "not known"])
            future: Future[Any] = self._engine.ask_choice(choice, arrived=now, deadline=now + DEADLINE_S)
            future.add_done_callback(partial(self._settle, stream, "choice"))
        else:
            request = Ask(stream=stream, question=question, max_new_tokens=2 + number % 15)
            future = self._engine.ask(request, arrived=now, deadline=now + DEADLINE_S)
            future.add_done_callback(partial(self._settle, stream, "question"))

    def _settle(self, stream: str, what: str, future: Future[Any]) -> None:
        try:
            reply = future.result()
        except (CancelledError, NodeError) as error:
            code = getattr(error, "code", "CANCELLED")
            if stream == "visitor" and code in (ErrorCode.UNKNOWN_STREAM, ErrorCode.CANCELLED, ErrorCode.NO_FRAMES):
                self._tally.count(f"{what}s about a visitor that left")
                return
            self._tally.count(f"failed: {what} {code}")
            logger.error("a %s about %s failed: %s", what, stream, error)
            return
        self._tally.count(f"{what}s")
        if not reply.memory.unchanged:
            self._tally.count(f"failed: {what} that left a trace")
        self._tally.took(f"{what}: first token", reply.timing.first_token_ms)


class Visitor:
    """A camera that is there in the first half, and comes and goes in the second; only the verbs of its stream wait."""

    def __init__(self, make: Callable[[], Camera], setting: Setting) -> None:
        self._make, self._setting = make, setting
        self.camera: Camera | None = make()
        self._until = setting.seconds / 2
        self.num_visits = 1

    def turn(self, elapsed_s: float) -> None:
        if elapsed_s < self._until:
            return
        if self.camera is not None:
            self.camera.remove()
            self.camera, self._until = None, elapsed_s + min(ABSENT_S, self._setting.seconds * VISIT_SHARE / 4)
        else:
            self.camera, self._until = self._make(), elapsed_s + self._setting.seconds * VISIT_SHARE
            self.num_visits += 1


class Watch:
    """A row a second, and what they come to."""

    def __init__(self, engine: WatchedEngine, tally: Tally, setting: Setting, horizon: int, file: TextIO | None):
        self._engine, self._tally, self._setting = engine, tally, setting
        self._horizon, self._file = horizon, file
        self.began = time.monotonic()
        self.rows: list[dict[str, Any]] = []
        self.num_rebased: Counter[str] = Counter()
        self._positions: dict[str, int] = {}

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.began

    def note(self, row: dict[str, Any]) -> None:
        if self._file is not None:
            print(json.dumps(row), file=self._file, flush=True)

    def sample(self) -> None:
        engine, now = self._engine, time.monotonic()
        row = {"s": round(now - self.began, 2), **engine.device_bytes._asdict(), "streams": self._streams()}
        row |= {"rss": _rss_bytes(), "vram": msgspec.to_builtins(engine.vram())}
        questions = engine.question_counters()
        row |= {"answered": questions.answered, "running": questions.running, "waiting": questions.waiting}
        for what in ("window: chunk", "thin: chunk", "still: chunk", "question: first token"):
            row[f"{what} ms"] = self._tally.median_ms(what, now - 15, now)
        self.rows.append(row)
        self.note(row)

    def _streams(self) -> dict[str, dict[str, Any]]:
        shown = {}
        for name in self._engine.streams():
            info = self._engine.cache_info(name)
            if info.positions_used < self._positions.get(name, 0) and name != "visitor":
                self.num_rebased[name] += 1
            self._positions[name] = info.positions_used
            shown[name] = {
                "tokens": info.num_tokens,
                "resident": info.resident_bytes,
                "position": info.positions_used,
                "forgotten": info.num_forgotten_frames,
            }
        return shown

    def line(self) -> str:
        row = self.rows[-1]
        positions = ", ".join(f"{name} {each['position']}" for name, each in row["streams"].items())
        ms = f"chunk {row['window: chunk ms']} ms, first token {row['question: first token ms']} ms"
        memory = f"allocated {row['allocated'] / MEGABYTE:.1f} reserved {row['reserved'] / MEGABYTE:.1f}"
        memory += f" rss {row['rss'] / MEGABYTE:.0f} MB"
        return f"{row['s']:7.1f} s  {memory}; {ms}; {row['answered']} answered; positions {positions}"

    def summary(self) -> dict[str, Any]:
        """Figures of the run as far as it has come; `held` says what was to be shown."""
        warm_s = WARM_UP_SHARE * self._setting.seconds
        warm = [row for row in self.rows if row["s"] >= warm_s]
        most = max((len(row["streams"]) for row in self.rows), default=0)
        rest = [row for row in warm if row["at_rest"] and len(row["streams"]) == most]
        allocated, reserved = ([row[name] for row in rest] for name in ("allocated", "reserved"))
        positions = [each["position"] for row in self.rows for each in row["streams"].values()]
        held = {
            "there are samples after the warm-up": len(rest) > 1,
            "allocated at rest is flat to the MB": _range(allocated) < MEGABYTE,
            "reserved is flat to the MB": _range(reserved) < MEGABYTE,
            "positions stay below the horizon": max(positions, default=0) <= self._horizon,
            "every memory has forgotten": all(self._tally.counts[f"{name}: forgotten frames"] for name in CAMERAS),
            "keys were rotated": all(self.num_rebased[name] for name in CAMERAS[:-1]),
            "nothing failed": self._tally.num_failures == 0,
        }
        return {
            "seconds": round(self.elapsed_s, 1),
            "warm": _bytes_at(rest, warm_s),
            "middle": _bytes_at(rest, self._setting.seconds / 2),
            "end": _bytes_at(rest, self.elapsed_s),
            "allocated_at_rest_range_bytes": _range(allocated),
            "reserved_range_bytes": _range(reserved),
            "most_allocated_bytes": max((row["peak"] for row in warm), default=0),
            "rss_bytes": [row["rss"] for row in (*warm[:1], *warm[-1:])],
            "medians_ms": self._medians(),
            "rebased": dict(self.num_rebased),
            "most_positions": max(positions, default=0),
            "horizon": self._horizon,
            "counts": dict(sorted(self._tally.counts.items())),
            "held": held,
        }

    def _medians(self) -> dict[str, list[float | None]]:
        """Of the first and of the last tenth after the warm-up."""
        begin, end = self.began + WARM_UP_SHARE * self._setting.seconds, time.monotonic()
        tenth = (end - begin) / 10
        kinds = [f"{name}: chunk{more}" for name in CAMERAS for more in ("", " until done")]
        kinds += ["question: first token", "choice: first token"]
        spans = ((begin, begin + tenth), (end - tenth, end))
        return {kind: [self._tally.median_ms(kind, *span) for span in spans] for kind in kinds}


def _options(model: Any, setting: Setting) -> list[StreamOptions]:
    """The streams of CAMERAS; their memories hold seconds of a run of twenty minutes, less of a shorter one."""
    side = (setting.size, setting.size)
    base = StreamOptions("", chunk_frames=4, encode_size=side, retention="window")
    kinds = [
        (replace(base, name="window"), 30),
        (replace(base, name="thin", retention="thin"), 60),
        (replace(base, name="still", chunk_frames=2, drop=0.95), 4),
        (replace(base, name="visitor", retention="reset"), 20),
    ]
    return [replace(options, memory_bytes=_memory_bytes(model, options, setting, held_s)) for options, held_s in kinds]


def _memory_bytes(model: Any, options: StreamOptions, setting: Setting, held_s: float) -> int:
    footprint = footprint_of(model, options, (setting.size, setting.size))
    num_chunks = max(8, round(held_s * min(1.0, setting.seconds / 1200) * setting.fps / options.chunk_frames))
    num_tokens = footprint.opening_tokens + num_chunks * footprint.tokens_per_chunk
    return num_tokens * 8 // 7 * footprint.bytes_per_token  # some rows are for what is read while it is forgotten


def _pictures(side: int, *, has_scene: bool) -> np.ndarray:
    """Noise, every picture another; or a square that moves before noise which stays."""
    pool = np.random.default_rng(0)
    if not has_scene:
        return pool.integers(0, 256, (NUM_PICTURES, side, side, 3), dtype=np.uint8)
    pictures = np.repeat(pool.integers(0, 256, (1, side, side, 3), dtype=np.uint8), NUM_PICTURES, axis=0)
    square = side // 4
    for number, picture in enumerate(pictures):
        left = (side - square) * number // NUM_PICTURES
        picture[left : left + square, left : left + square] = 255 - 4 * number
    return pictures


def _bytes_at(rows: list[dict[str, Any]], s: float) -> dict[str, int] | None:
    """Of the sample at rest that is nearest to a time."""
    row = min(rows, key=lambda row: abs(row["s"] - s), default=None)
    return row and {key: row[key] for key in ("s", "allocated", "reserved")}


def _range(values: list[int]) -> int:
    return max(values) - min(values) if values else 0


def _rss_bytes() -> int:
    """Resident memory of this process."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS:"))


def build(args: argparse.Namespace) -> Any:
    """The model, whose positions end at the horizon."""
    if args.model is not None:
        model = load_model(args.model)
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = build_published(args.config, device=device, dtype=default_dtype(device))
    model.config.text_config.max_position_embeddings = args.horizon
    return model


def run(engine: WatchedEngine, watch: Watch, setting: Setting, tally: Tally, options: list[StreamOptions]) -> None:
    """Until the time is over, the engine has ended, or somebody ends the process."""
    stop = threading.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: stop.set())
    cameras = [Camera(engine, each, setting, tally) for each in options[:-1]]
    visitor = Visitor(lambda: Camera(engine, options[-1], setting, tally), setting)
    asker = Asker(engine, tally)
    next_ask, next_line, second = 2 * ASK_EVERY_S, 0.0, 0
    while watch.elapsed_s < setting.seconds and engine.is_ready:
        second += 1
        if stop.wait(max(0.0, watch.began + second - time.monotonic())):
            break
        second = max(second, int(watch.elapsed_s))
        watch.sample()
        if watch.elapsed_s >= next_ask:
            next_ask = watch.elapsed_s + ASK_EVERY_S
            asker.ask([name for name in engine.streams() if engine.cache_info(name).num_frames])
        if watch.elapsed_s >= next_line:
            next_line += 30.0
            print(watch.line(), flush=True)
        visitor.turn(watch.elapsed_s)
    if not engine.is_ready:
        tally.count("failed: the engine has ended")
    for camera in (*cameras, visitor.camera):
        if camera is not None:
            camera.stop()
    tally.count("visits", visitor.num_visits)
    until = time.monotonic() + DEADLINE_S
    while any(_open(engine)) and time.monotonic() < until:
        time.sleep(0.05)


def _open(engine: Engine) -> tuple[int, int]:
    """Questions that wait, and that are answered."""
    counters = engine.question_counters()
    return counters.waiting, counters.running


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="qwen2.5-vl-3b", help="a published model's sizes")
    parser.add_argument("--model", help="builtin or a checkpoint, instead")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--size", type=int, default=448, help="pixels of a side")
    parser.add_argument("--fps", type=float, default=4.0)
    parser.add_argument("--horizon", type=int, default=300, help="positions that the model has")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(relativeCreated)9.0f %(name)s %(message)s")
    setting, tally = Setting(args.size, args.fps, args.minutes * 60), Tally()
    began = time.monotonic()
    model = build(args)
    engine = WatchedEngine(model)
    engine.warm_up()
    engine.start()
    print(f"{model.name} on {model.device}, warm after {time.monotonic() - began:.0f} s", flush=True)
    options = _options(model, setting)
    with args.json.open("w") if args.json else nullcontext() as file:
        watch = Watch(engine, tally, setting, args.horizon, file)
        device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else str(model.device)
        memories = {each.name: each.memory_bytes for each in options}
        watch.note({"model": model.name, "device": device, "torch": torch.__version__, "memory_bytes": memories})
        try:
            run(engine, watch, setting, tally, options)
        except Exception:
            traceback.print_exc()
            tally.count("failed: the run")
        summary = watch.summary()
        watch.note({"summary": summary})
    print(json.dumps(summary, indent=2), flush=True)
    engine.close()
    return 0 if all(summary["held"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
