"""The benchmark: how long everything takes on this machine, beside the least time it could take.

    python -m onlooker.node.bench                                        the built-in model, in half a minute
    python -m onlooker.node.bench --config qwen2.5-vl-3b --json FILE     its published sizes, with random weights
    python -m onlooker.node.bench --model PATH --size 1280x720 --chunk-frames 2 --history 0,50000

The limit of a step is the larger of its operations over the rate of a large matrix product, and its bytes over the
rate of a copy, both measured in the same run. What it takes to do the same with transformers alone is measured too.
"""

import argparse
import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from .bench_engine import (
    NUM_TOGETHER,
    SPARE_TOKENS,
    WHILE_ANSWERED,
    EngineBench,
    Setting,
    StreamBench,
    history_rows,
)
from .bench_naive import NaiveBench, released
from .bench_plot import plot, require_matplotlib
from .bench_report import (
    NAIVE,
    ONLOOKER,
    Case,
    Report,
    Row,
    ceilings_text,
    growth,
    growth_text,
    kernels_text,
    rooms_text,
    row_text,
    table_text,
)
from .ceilings import measure_ceilings
from .chunk import CHUNK_FRAMES
from .compilation import CompileSetting
from .machine import machine
from .model import BUILTIN, DTYPES, VisionLanguageModel, load_model, resolve_device, use_few_threads
from .preprocess import PatchGeometry, encode_size
from .published import PUBLISHED, build_network, build_published, default_dtype

logger = logging.getLogger(__name__)

WIRE_ENCODINGS = ("jpeg", "png", "rgb8")
NAIVE_SHARE = 0.35  # of the budget
_ROW_TOKENS = 30_000  # of chunks in a row, at most: the history grows by them
_ROW_S = 1.5
_MAX_IN_A_ROW = 100
_CASE_S = 5.0

_DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {"size": ["1920x1080", "1920x1080@392x224"], "history": "0,28500,150000", "wire": 480, "budget_s": 240.0},
    "cpu": {"size": ["640x360"], "history": "0,1000,4000", "wire": 48, "budget_s": 20.0},
}


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured: a checkpoint, or a published model's sizes."""

    name: str
    is_published: bool
    device: str
    dtype: str

    def load(self) -> VisionLanguageModel:
        """As a node has it. Raises as `load_model` does."""
        if not self.is_published:
            return load_model(self.name, device=self.device, dtype=self.dtype)
        return build_published(self.name, device=self.device, dtype=self._torch_dtype)

    def load_network(self, dtype: torch.dtype, attention: str) -> Any:
        """As transformers has it."""
        if self.is_published:
            return build_network(self.name, device=self.device, dtype=dtype, attention=attention)
        path = str(BUILTIN) if self.name == "builtin" else self.name
        return transformers.AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, device_map={"": self.device}, attn_implementation=attention
        ).eval()

    @property
    def _torch_dtype(self) -> torch.dtype:
        return default_dtype(self.device) if self.dtype == "auto" else getattr(torch, self.dtype)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured of each subject."""

    settings: tuple[Setting, ...]
    histories: tuple[int, ...]
    wire_frames: int
    wire_encodings: tuple[str, ...]
    attention: str | None  # of the naive way; None: it is not measured
    compile: CompileSetting = "auto"
    has_profile: bool = False
    is_quick: bool = False  # chunks one by one alone, none in a row

    @property
    def main_history(self) -> int | None:
        """The one that everything is measured over; None if there are only empty ones."""
        return next((history for history in self.histories if history), None)

    @property
    def wire_setting(self) -> Setting:
        """The one of the fewest pixels."""
        return min(self.settings, key=lambda setting: math.prod(setting.encode_size or setting.received))


class Budget:
    """Seconds that are left."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        return max(0.0, self._end - time.monotonic())


class Bench:
    """Measures one subject into a report; whatever fails is a row, and the rest goes on."""

    def __init__(self, subject: Subject, plan: Plan, report: Report, say: Callable[[str], None]) -> None:
        self._subject = subject
        self._plan = plan
        self._report = report
        self._say = say
        self.has_failed = False  # in what is ours

    def run(self, seconds: float) -> None:
        """Measure within so many seconds. Raises what loading the subject raises."""
        budget, began = Budget(seconds), time.monotonic()
        model = self._subject.load()
        load_s = time.monotonic() - began
        use_few_threads(model)
        device, dtype = model.device, model.dtype
        cases = Cases(self._subject.name, model.geometry)
        ceilings = self._report.ceilings[cases.model] = measure_ceilings(device, dtype)
        self._say(f"{cases.model} on {device}, {str(dtype).removeprefix('torch.')}: {ceilings_text(ceilings)}")
        share = NAIVE_SHARE if self._plan.attention else 0.0
        with released(device):
            engine = EngineBench(model, ceilings, cases.model, self._plan.compile)
            del model
            for stage, stage_s in (("load", load_s), ("warm-up", engine.warm_up_s)):
                self._add([Row(Case(cases.model, stage), ms=stage_s * 1e3)])
            self._measure(engine, cases, Budget(budget.left_s * (1 - share)))
            del engine
        if self._plan.attention:
            with released(device):
                self._measure_naive(dtype, self._plan.attention, cases, budget)

    # Ours

    def _measure(self, bench: EngineBench, cases: "Cases", budget: Budget) -> None:
        """Questions before what is about both questions and chunks: the time may be over before the end."""
        plan = self._plan
        try:
            wires = plan.wire_encodings if plan.wire_frames else ()
            for i, setting in enumerate(plan.settings):
                share = Budget(budget.left_s / (len(plan.settings) - i + len(wires)))
                part = partial(self._measure_stream, bench, cases, setting, share)
                self._try(cases.of("a stream", setting), budget, part)
            for encoding in wires:
                burst = partial(_measure_burst, bench, plan, encoding, budget)
                self._try(cases.of(f"over the wire, {encoding}", plan.wire_setting), budget, burst)
        finally:
            bench.close()
        self._add(history_rows([row for row in self._report.rows if row.case.model == cases.model], bench.ceilings))

    def _measure_stream(self, bench: EngineBench, cases: "Cases", setting: Setting, budget: Budget) -> list[Row]:
        """All that is about one setting; with the first one, also what is about questions alone."""
        plan, num_chunk = self._plan, bench.num_chunk_tokens(setting) + SPARE_TOKENS
        max_chunks = max(4, min(_MAX_IN_A_ROW, _ROW_TOKENS // num_chunk))
        with bench.stream(setting, max(plan.histories) + max_chunks * num_chunk) as stream:
            chunks = [
                row
                for history in plan.histories
                for row in self._try(
                    cases.of("chunk", setting, history),
                    budget,
                    partial(stream.encode, history, max_s=min(_CASE_S, budget.left_s / 8)),
                )
                if row.case.stage == "chunk"
            ]
            if setting is plan.settings[0]:
                self._measure_questions(stream, cases, budget)
                if plan.has_profile:
                    part = partial(self._profile, stream, plan.main_history or 0)
                    self._try(cases.of("kernels", setting), budget, part)
            if plan.main_history is not None and not plan.is_quick:
                times_ms = [row.ms for row in chunks if row.ms]
                num = max(4, min(max_chunks, int(_ROW_S * 1e3 / max(times_ms)))) if times_ms else 4
                self._measure_both(stream, cases, InARow(setting, plan.main_history, num, max_chunks), budget)
            self._report.rooms.append(bench.room(_setting_text(setting), is_fresh=not plan.is_quick))
        return []

    def _measure_questions(self, stream: StreamBench, cases: "Cases", budget: Budget) -> None:
        for history in filter(None, self._plan.histories):
            self._try(cases.answers("decoded token", 1, history), budget, partial(stream.questions, history))
        if (main := self._plan.main_history) is not None:
            self._try(cases.answers("snapshot + restore", 0, main), budget, partial(stream.snapshot, main))

    def _profile(self, stream: StreamBench, history: int) -> list[Row]:
        kernels = stream.kernels(history) if history else []
        self._report.kernels += kernels
        self._say(kernels_text(kernels))
        return []

    def _measure_both(self, stream: StreamBench, cases: "Cases", row: "InARow", budget: Budget) -> None:
        """Chunks in a row by themselves, and while questions are answered."""
        case = cases.of("chunks in a row", row.setting, row.history)
        alone = self._try(case, budget, partial(stream.throughput, row.history, num_chunks=row.num_chunks))
        if alone[0].rate:
            part = partial(
                stream.throughput_while_asked, alone[0], num_chunks=row.num_chunks, max_chunks=row.max_chunks
            )
            self._try(cases.of(WHILE_ANSWERED, row.setting, row.history), budget, part)

    # The naive way

    def _measure_naive(self, dtype: torch.dtype, attention: str, cases: "Cases", budget: Budget) -> None:
        """The main history before the others: the time may be over before the end."""
        loaded: list[NaiveBench] = []

        def load() -> list[Row]:
            network = self._subject.load_network(dtype, attention)
            loaded.append(NaiveBench(network, cases.model, cases.geometry))
            return []

        self._try(Case(cases.model, "the model of transformers"), budget, load, way=NAIVE)
        if not loaded:
            return
        plan, main = self._plan, self._plan.main_history
        settings = [setting for setting in plan.settings if setting.chunk_frames == plan.settings[0].chunk_frames]
        for history in sorted(plan.histories, key=lambda history: history != main):
            self._measure_naive_over(loaded[0], cases, settings, history, budget)
        for setting in settings if main is not None else ():
            self._measure_whole_video(loaded[0], cases, setting, budget)

    def _measure_naive_over(
        self, naive: NaiveBench, cases: "Cases", settings: Sequence[Setting], history: int, budget: Budget
    ) -> None:
        for setting in settings:
            part = partial(naive.chunk, setting, history)
            self._try(cases.of("chunk", setting, history), budget, part, way=NAIVE)
        if not history:
            return
        for num in (1, NUM_TOGETHER):
            part = partial(naive.token, history, num)
            self._try(cases.answers("decoded token", num, history), budget, part, way=NAIVE)
        part = partial(naive.first_token, history)
        self._try(cases.answers("first token", 1, history), budget, part, way=NAIVE)
        if history == self._plan.main_history:
            part = partial(naive.snapshot, history)
            self._try(cases.answers("snapshot + restore", 0, history), budget, part, way=NAIVE)

    def _measure_whole_video(self, naive: NaiveBench, cases: "Cases", setting: Setting, budget: Budget) -> None:
        """Encode everything anew for a question, if that is over before the budget is."""
        history = self._plan.main_history
        assert history is not None
        case = cases.of("first token, whole video anew", setting, history)
        times_ms = [row.ms for row in self._report.rows if row.ms and row.way == NAIVE and row.case.stage == "chunk"]
        num_chunks = history // naive.num_chunk_tokens(setting) + 1
        foreseen_s = 2 * num_chunks * max(times_ms, default=0.0) / 1e3
        if foreseen_s > budget.left_s:
            self._add([Row(case, NAIVE, note=f"left out: it would take about {foreseen_s:.0f} s")])
            return
        self._try(case, budget, partial(naive.whole_video, setting, history), way=NAIVE)

    # Rows

    def _try(
        self, case: Case, budget: Budget, measure: Callable[[], Sequence[Row]], *, way: str = ONLOOKER
    ) -> Sequence[Row]:
        """Measure a part, and note what came of it; nothing it raises ends the rest."""
        if budget.left_s <= 0:
            return self._add([Row(case, way, note="left out: the time is over")])
        try:
            return self._add(measure())
        except torch.OutOfMemoryError as error:
            error.__traceback__ = None  # its frames hold what must go
            note = "out of memory"
        except ModuleNotFoundError as error:
            return self._add([Row(case, way, note=f"left out: the module {error.name} is missing")])
        except Exception as error:
            logger.debug("a part failed", exc_info=True)
            note = f"failed: {type(error).__name__}: {error}"
        self.has_failed |= way == ONLOOKER
        return self._add([Row(case, way, note=note)])

    def _add(self, rows: Sequence[Row]) -> Sequence[Row]:
        self._report.rows += rows
        for row in rows:
            self._say(row_text(row))
        return rows


@dataclass(frozen=True, slots=True)
class InARow:
    """Chunks in a row over a history."""

    setting: Setting
    history: int
    num_chunks: int
    max_chunks: int  # for which there is room


@dataclass(frozen=True, slots=True)
class Cases:
    """Names what is about to be measured as the measurement itself will."""

    model: str
    geometry: PatchGeometry

    def of(self, stage: str, setting: Setting, history: int = 0) -> Case:
        size = encode_size(setting.received, self.geometry, explicit=setting.encode_size)
        return Case(self.model, stage, "{}x{}".format(*size), setting.chunk_frames, history)

    def answers(self, stage: str, num: int, history: int) -> Case:
        return Case(self.model, stage, history=history, num_answers=num)


def _measure_burst(bench: EngineBench, plan: Plan, encoding: str, budget: Budget) -> list[Row]:
    from .bench_wire import Burst, measure_burst  # needs what the sockets need, and OpenCV

    burst = Burst(plan.wire_setting, plan.wire_frames, encoding)
    return measure_burst(bench, burst, timeout_s=max(_CASE_S, budget.left_s))


def _setting_text(setting: Setting) -> str:
    encoded = "" if setting.encode_size is None else "@{}x{}".format(*setting.encode_size)
    return "{}x{}".format(*setting.received) + f"{encoded}, {setting.chunk_frames} frames"


# The command line


def _size(text: str) -> tuple[int, int]:
    width, x, height = text.partition("x")
    if not (x and width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"a size is WIDTHxHEIGHT, got {text!r}")
    return int(width), int(height)


def _received_and_encoded(text: str) -> tuple[tuple[int, int], tuple[int, int] | None]:
    received, at, encoded = text.partition("@")
    return _size(received), _size(encoded) if at else None


def _counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"numbers separated by commas are wanted, got {text!r}") from error
    if min(counts) < 0:
        raise argparse.ArgumentTypeError(f"no number may be negative, got {text!r}")
    return counts


def _chunk_counts(text: str) -> tuple[int, ...]:
    counts = _counts(text)
    if not set(counts) <= set(CHUNK_FRAMES):
        raise argparse.ArgumentTypeError(f"a chunk has {', '.join(map(str, CHUNK_FRAMES))} frames, got {text!r}")
    return counts


def _encodings(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not set(names) <= set(WIRE_ENCODINGS):
        raise argparse.ArgumentTypeError(f"frames are sent as {', '.join(WIRE_ENCODINGS)}, got {text!r}")
    return names


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"a number of seconds above 0 is wanted, got {text!r}")
    return seconds


def _file(text: str) -> Path:
    path = Path(text)
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: there is no folder {path.absolute().parent}")
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="onlooker bench", description="Measure encoding and answering on this machine, beside their limits."
    )
    add = parser.add_argument
    add("--model", action="append", default=[], help="a folder, a hub id, or builtin; may be repeated")
    add("--config", action="append", default=[], choices=sorted(PUBLISHED), help="published sizes, random weights")
    add("--size", action="append", metavar="WxH[@WxH]", help="frames as received, and as encoded; may be repeated")
    add("--chunk-frames", type=_chunk_counts, default=(4,), metavar="N,…", help="frames a chunk")
    add("--history", type=_counts, metavar="N,…", help="tokens in the memory before a chunk or a question")
    add("--wire", type=int, metavar="N", help="frames to send over real sockets; 0: none")
    add("--wire-encoding", type=_encodings, default=("jpeg",), metavar="NAME,…", help=", ".join(WIRE_ENCODINGS))
    add("--naive", default="sdpa", choices=("sdpa", "eager", "off"), help="attention of transformers' own way")
    add("--compile", default="auto", choices=("auto", "on", "off"), help="as a node's setting of that name")
    add("--quick", action="store_true", help="chunks one by one: none in a row, none while questions are answered")
    add("--profile", action="store_true", help="also list the kernels of a chunk and of an answer that take longest")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    add("--dtype", default="auto", choices=DTYPES)
    add("--budget-s", type=_seconds, metavar="SECONDS", help="for all of it, once torch is loaded")
    add("--json", type=_file, metavar="FILE", help="`onlooker report` makes a page of it")
    add("--plot", type=_file, metavar="FILE", help="time and limit over history, a PNG")
    return parser


def _plan(args: argparse.Namespace, defaults: dict[str, Any]) -> Plan:
    sizes = [_received_and_encoded(text) for text in args.size or defaults["size"]]
    return Plan(
        settings=tuple(Setting(*size, num) for size in sizes for num in args.chunk_frames),
        histories=tuple(sorted(set(args.history or _counts(defaults["history"])))),
        wire_frames=defaults["wire"] if args.wire is None else args.wire,
        wire_encodings=args.wire_encoding,
        attention=None if args.naive == "off" else args.naive,
        compile=args.compile,
        has_profile=args.profile,
        is_quick=args.quick,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if a part of it that is ours failed."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        device = resolve_device(args.device)
        defaults = _DEFAULTS["cuda" if device.startswith("cuda") else "cpu"]
        plan = _plan(args, defaults)
    except (ValueError, argparse.ArgumentTypeError) as error:
        parser.error(str(error))
    if args.plot:
        try:
            require_matplotlib()
        except ImportError as error:
            parser.error(str(error))
    subjects = [Subject(name, False, device, args.dtype) for name in args.model]
    subjects += [Subject(name, True, device, args.dtype) for name in args.config]
    subjects = subjects or [Subject("builtin", False, device, args.dtype)]
    transformers.logging.disable_progress_bar()
    report = Report(machine(device, "onlooker bench", argv))
    return _run(subjects, plan, report, args, args.budget_s or defaults["budget_s"])


def _run(subjects: list[Subject], plan: Plan, report: Report, args: argparse.Namespace, seconds: float) -> int:
    budget, began = Budget(seconds), time.monotonic()

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)
        report.seconds = time.monotonic() - began
        if args.json:
            report.write(args.json)  # as it grows: what is measured stays, whatever ends the run

    has_failed = False
    for i, subject in enumerate(subjects):
        bench = Bench(subject, plan, report, say)
        try:
            bench.run(budget.left_s / (len(subjects) - i))
        except (OSError, ValueError, torch.OutOfMemoryError) as error:
            say(f"{subject.name}: cannot be loaded: {error}")
            has_failed = True
        has_failed |= bench.has_failed
    report.seconds = time.monotonic() - began
    print(_summary(report))
    if args.json:
        report.write(args.json)
    if args.plot:
        plot(report.document(), args.plot)
    return 1 if has_failed else 0


def _summary(report: Report) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in report.machine.items())
    parts = [facts]
    for model, ceilings in report.ceilings.items():
        parts += [f"\n{model}: {ceilings_text(ceilings)}"]
        parts += [table_text([row for row in report.rows if row.case.model == model])]
        parts += [rooms_text([room for room in report.rooms if room.model == model])]
        parts += [kernels_text([kernel for kernel in report.kernels if kernel.model == model])]
        parts += [growth_text([each for each in growth(report.rows) if each.case.model == model])]
    return "\n".join(part for part in [*parts, f"measured in {report.seconds:.1f} s"] if part)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
