"""What a benchmark found out: rows of measured times beside their limits, as a table and as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from ..protocol.quantity import bytes_text
from .ceilings import Ceilings
from .workload import Work

ONLOOKER, NAIVE = "onlooker", "naive"


@dataclass(frozen=True, slots=True)
class Case:
    """What was done, apart from how: two rows of one case can be compared."""

    model: str
    stage: str
    encoded: str = ""  # width x height as the model saw the frames
    chunk_frames: int = 0  # 0: it is not about chunks
    history: int = 0  # tokens in the memory before it
    num_answers: int = 0  # decoded together; 0: it is not about answers

    @property
    def text(self) -> str:
        frames = f"{self.chunk_frames} frame" + ("s" if self.chunk_frames > 1 else "")
        parts = [self.encoded, frames if self.chunk_frames else ""]
        parts += [f"{self.num_answers} at once"] if self.num_answers > 1 else []
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement, or why there is none."""

    case: Case
    way: str = ONLOOKER
    ms: float | None = None
    limit_ms: float | None = None  # None: it has none that is worth a word
    flops: int = 0
    num_bytes: int = 0
    rate: float | None = None
    unit: str = ""  # of the rate
    num_tokens: int = 0  # that went through the language model
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """How many times as long as the limit it took."""
        return None if self.ms is None or not self.limit_ms else self.ms / self.limit_ms

    def limited(self, ceilings: Ceilings, *works: Work) -> "Row":
        """This row with the limit of pieces of work that go one after the other."""
        return replace(
            self,
            limit_ms=sum(ceilings.limit_ms(work) for work in works),
            flops=sum(work.flops for work in works),
            num_bytes=sum(work.num_bytes for work in works),
        )


@dataclass(frozen=True, slots=True)
class Room:
    """Device memory after a part of the benchmark, in bytes; what is unknown is None."""

    model: str
    after: str
    weights_bytes: int
    arena_bytes: int
    scratch_bytes: int
    workspace_peak_bytes: int | None = None
    torch_reserved_bytes: int | None = None
    torch_peak_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Kernel:
    """What ran on the device under one name, all its calls together."""

    model: str
    of: str
    name: str
    ms: float
    num_calls: int
    share: float  # of all that ran


@dataclass(frozen=True, slots=True)
class Growth:
    """How much longer a chunk takes over a long history than over a short one, and how many more operations it is."""

    case: Case  # with the longer history
    short: int
    measured: float
    by_operations: float


@dataclass(slots=True)
class Report:
    """All of it; grows while the benchmark runs."""

    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    rooms: list[Room] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)
    ceilings: dict[str, Ceilings] = field(default_factory=dict)  # by model
    seconds: float = 0.0

    def document(self) -> dict[str, Any]:
        """For JSON."""
        rows = [
            asdict(row.case) | {k: v for k, v in asdict(row).items() if k != "case"} | {"ratio": row.ratio}
            for row in self.rows
        ]
        return {
            "machine": self.machine,
            "ceilings": {model: asdict(ceilings) for model, ceilings in self.ceilings.items()},
            "rows": rows,
            "rooms": [asdict(room) for room in self.rooms],
            "kernels": [asdict(kernel) for kernel in self.kernels],
            "growth": [asdict(each) for each in growth(self.rows)],
            "seconds": self.seconds,
        }

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self.document(), indent=2) + "\n")


def growth(rows: Sequence[Row]) -> list[Growth]:
    """Compare the chunks of each setting over its shortest history, which is not empty, with those over the others."""
    chunks = [row for row in rows if row.way == ONLOOKER and row.case.stage == "chunk" and row.ms and row.case.history]
    grown = []
    for row in chunks:
        short = min((r for r in chunks if _is_same_setting(r.case, row.case)), key=lambda r: r.case.history)
        if short.case.history < row.case.history and short.ms and row.ms and short.flops:
            grown.append(Growth(row.case, short.case.history, row.ms / short.ms, row.flops / short.flops))
    return grown


def _is_same_setting(a: Case, b: Case) -> bool:
    return replace(a, history=0) == replace(b, history=0)


# As text

_COLUMNS = (("stage", 26), ("of", 20), ("history", 8), ("time", 9), ("limit", 9), ("ratio", 6), ("rate", 14))
_STAGES = (
    *("load", "warm-up"),
    *("preprocess", "vision tower", "prefill", "attention over history", "chunk", "chunks in a row"),
    *("chunks while 8 are asked", "tokens while encoding", "first token", "decoded token", "snapshot + restore"),
)
_NAIVE_COLUMNS = (("naive", 9), ("faster", 7))


def row_text(row: Row) -> str:
    """One line, as it is measured."""
    way = "" if row.way == ONLOOKER else f"{row.way}: "
    return _line(_cells(row, way + row.case.stage), _COLUMNS) + (f"  {row.note}" if row.note else "")


def table_text(rows: Sequence[Row]) -> str:
    """All rows, the naive way beside ours."""
    naive = {row.case: row for row in rows if row.way == NAIVE}
    ours = sorted((row for row in rows if row.way == ONLOOKER), key=_place)
    matched = {row.case for row in ours}
    lines = [_line([name for name, _ in (*_COLUMNS, *_NAIVE_COLUMNS)], (*_COLUMNS, *_NAIVE_COLUMNS))]
    for row in ours:
        peer = naive.get(row.case)
        cells = [*_cells(row, row.case.stage), _ms_text(peer.ms) if peer else "", _faster_text(row, peer)]
        notes = [row.note, f"naive: {peer.note}" if peer and peer.note else ""]
        lines.append(_line(cells, (*_COLUMNS, *_NAIVE_COLUMNS)) + _notes_text(notes))
    lines += [row_text(row) for row in rows if row.way == NAIVE and row.case not in matched]
    return "\n".join(lines)


def rooms_text(rooms: Sequence[Room]) -> str:
    if not rooms:
        return ""
    lines = ["device memory             weights     arena   scratch  workspace, peak  torch reserved  torch peak"]
    for room in rooms:
        known = (room.workspace_peak_bytes, room.torch_reserved_bytes, room.torch_peak_bytes)
        lines.append(
            f"{room.after:<22}{_bytes_text(room.weights_bytes):>11}{_bytes_text(room.arena_bytes):>10}"
            f"{_bytes_text(room.scratch_bytes):>10}{_bytes_text(known[0]):>17}{_bytes_text(known[1]):>16}"
            f"{_bytes_text(known[2]):>12}"
        )
    return "\n".join(lines)


def kernels_text(kernels: Sequence[Kernel]) -> str:
    lines: list[str] = []
    for of, group in groupby(kernels, key=lambda kernel: kernel.of):
        lines.append(f"kernels of {of}")
        lines += [f"{_ms_text(k.ms):>9} {k.share:>4.0%} {k.num_calls:>6} x  {k.name}" for k in group]
    return "\n".join(lines)


def growth_text(grown: Sequence[Growth]) -> str:
    return "\n".join(
        f"chunk, {each.case.text}: over {each.case.history} tokens {each.measured:.2f} times as long as over "
        f"{each.short}; by its operations {each.by_operations:.2f}"
        for each in grown
    )


def ceilings_text(ceilings: Ceilings) -> str:
    tera, giga = ceilings.flops_per_s / 1e12, ceilings.bytes_per_s / 1e9
    return f"{tera:.3g} TFLOP/s in a matrix product, {giga:.4g} GB/s read and written in a copy"


def _place(row: Row) -> tuple[int, str, int, int, int]:
    """By stage, in the order of a chunk's and a question's life; then by what is longer."""
    case = row.case
    stage = _STAGES.index(case.stage) if case.stage in _STAGES else len(_STAGES)
    return stage, case.encoded, case.chunk_frames, case.history, case.num_answers


def _cells(row: Row, stage: str) -> list[str]:
    return [
        stage,
        row.case.text,
        str(row.case.history),
        _ms_text(row.ms),
        _ms_text(row.limit_ms),
        "" if row.ratio is None else f"{row.ratio:.1f}x",
        "" if row.rate is None else f"{_three(row.rate)} {row.unit}",
    ]


def _line(cells: Sequence[str], columns: Sequence[tuple[str, int]]) -> str:
    """Words to the left, figures to the right."""
    texts = [
        f"{cell:<{width}}" if name in ("stage", "of") else f"{cell:>{width}}"
        for cell, (name, width) in zip(cells, columns, strict=True)
    ]
    return " ".join(texts).rstrip()


def _faster_text(row: Row, peer: Row | None) -> str:
    return f"{peer.ms / row.ms:.1f}x" if peer and peer.ms and row.ms else ""


def _notes_text(notes: Sequence[str]) -> str:
    text = "; ".join(note for note in notes if note)
    return f"  {text}" if text else ""


def _ms_text(ms: float | None) -> str:
    if ms is None:
        return "-"
    return f"{ms * 1e3:.3g} us" if ms < 0.1 else f"{_three(ms)} ms"


def _three(value: float) -> str:
    """Three digits, but never an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _bytes_text(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else bytes_text(num_bytes)
