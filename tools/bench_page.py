"""The page of `onlooker bench`: each stage beside its limit and beside the naive way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

import msgspec

from .panel import Panel
from .quantity import bytes_text, ms_text, seconds_text
from .report_page import UNKNOWN, Cell, Column, Fact, Page, Plots, Table, Tile, Verdict, machine_facts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ONLOOKER, NAIVE = "onlooker", "naive"
_DRAWN = (("chunk", "A chunk"), ("decoded token", "A decoded token"))
_LINES = (
    (ONLOOKER, "ms", "-", "o", ""),
    (ONLOOKER, "limit_ms", "--", "", ", limit"),
    (NAIVE, "ms", ":", "x", ", naive"),
)


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """What was done, apart from how."""

    model: str
    stage: str
    encoded: str
    chunk_frames: int
    history: int
    num_answers: int

    @property
    def setting(self) -> str:
        frames = f"{self.chunk_frames} frame" + ("s" if self.chunk_frames > 1 else "")
        parts = [self.encoded, frames if self.chunk_frames else ""]
        parts += [f"{self.num_answers} at once"] if self.num_answers > 1 else []
        return ", ".join(part for part in parts if part)


class Row(Case, frozen=True, kw_only=True):
    """One measurement, or why there is none."""

    way: str
    ms: float | None
    limit_ms: float | None
    ratio: float | None
    rate: float | None
    unit: str
    note: str

    @property
    def case(self) -> tuple[str, str, str, int, int, int]:
        return self.model, self.stage, self.encoded, self.chunk_frames, self.history, self.num_answers

    @property
    def is_failed(self) -> bool:
        """Whether what is ours could not be measured; what there was no time for is not failed."""
        return self.way == ONLOOKER and self.note.startswith(("failed", "out of memory"))


class Ceilings(msgspec.Struct, frozen=True, kw_only=True):
    """What the machine does at best."""

    flops_per_s: float
    bytes_per_s: float


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """Device memory after a part of the benchmark."""

    model: str
    after: str
    weights_bytes: int
    arena_bytes: int
    scratch_bytes: int
    workspace_peak_bytes: int | None
    torch_reserved_bytes: int | None
    torch_peak_bytes: int | None


class Kernel(msgspec.Struct, frozen=True, kw_only=True):
    """What ran on the device under one name."""

    model: str
    of: str
    name: str
    ms: float
    num_calls: int
    share: float


class Growth(msgspec.Struct, frozen=True, kw_only=True):
    """How much longer a chunk takes over a long history than over a short one."""

    case: Case
    short: int
    measured: float
    by_operations: float


class BenchReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `onlooker bench --json` writes."""

    machine: dict[str, str]
    ceilings: dict[str, Ceilings]
    rows: list[Row]
    rooms: list[Room] = []
    kernels: list[Kernel] = []
    growth: list[Growth] = []
    seconds: float

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys([*self.ceilings, *(row.model for row in self.rows)]))


def bench_page(report: BenchReport) -> Page:
    """Needs matplotlib."""
    return Page(
        title="bench",
        subject=f"{', '.join(report.models)} on {report.machine.get('device', 'an unknown device')}",
        verdict=_verdict(report),
        facts=[
            Fact("models", ", ".join(report.models)),
            Fact("took", seconds_text(report.seconds)),
            *machine_facts(report.machine),
        ],
        tiles=_tiles(report) if len(report.models) == 1 else [],
        parts=[part for model in report.models for part in _parts(report, model)],
    )


def _verdict(report: BenchReport) -> Verdict:
    failed = [row for row in report.rows if row.is_failed]
    if failed:
        return Verdict(
            False, f"{len(failed)} of {len(report.rows)} measurements failed: {failed[0].stage}, {failed[0].note}"
        )
    sentences = [text for model in report.models if (text := _speed_text(report, model))]
    return Verdict(None, ". ".join(sentences) or "Nothing was measured")


def _speed_text(report: BenchReport, model: str) -> str:
    """The chunk over the longest history, and the first token after it."""
    chunk, token = _longest(report, model, "chunk"), _longest(report, model, "first token")
    parts = []
    if chunk and chunk.ms:
        rate = f", {chunk.rate:.3g} {chunk.unit}" if chunk.rate else ""
        parts.append(f"a chunk of {chunk.setting} over {chunk.history} tokens takes {ms_text(chunk.ms)}{rate}")
    if token and token.ms:
        parts.append(f"the first token of an answer comes after {ms_text(token.ms)}")
    return f"{model}: {'; '.join(parts)}" if parts else ""


def _longest(report: BenchReport, model: str, stage: str) -> Row | None:
    rows = [row for row in _ours(report, model) if row.stage == stage and row.ms]
    return max(rows, key=lambda row: row.history, default=None)


def _ours(report: BenchReport, model: str) -> list[Row]:
    return [row for row in report.rows if (row.way, row.model) == (ONLOOKER, model)]


def _tiles(report: BenchReport) -> list[Tile]:
    model = report.models[0]
    tiles = []
    for stage, name in (("chunk", "a chunk"), ("first token", "first token"), ("decoded token", "a decoded token")):
        row = _longest(report, model, stage)
        if row and row.ms:
            limit = f", {row.ratio:.1f}x its limit" if row.ratio else ""
            tiles.append(Tile(name, ms_text(row.ms), f"over {row.history} tokens{limit}"))
    if (ceilings := report.ceilings.get(model)) is not None:
        tiles.append(Tile("matrix product", _flops_text(ceilings.flops_per_s), "measured here"))
        tiles.append(Tile("copy", f"{ceilings.bytes_per_s / 1e9:.4g} GB/s", "read and written, measured here"))
    return tiles


def _flops_text(flops_per_s: float) -> str:
    unit, scale = ("TFLOP/s", 1e12) if flops_per_s >= 1e12 else ("GFLOP/s", 1e9)
    return f"{flops_per_s / scale:.3g} {unit}"


def _parts(report: BenchReport, model: str) -> Iterator[Table | Plots]:
    behind = f": {model}" if len(report.models) > 1 else ""
    rows = [row for row in report.rows if row.model == model]
    panels = [
        Panel(caption, partial(_draw, its))
        for stage, caption in _DRAWN
        if (its := [row for row in rows if row.stage == stage and row.ms])
    ]
    note = "The limit is the larger of operations over the rate of a matrix product, and bytes over the rate of a copy."
    yield Plots(f"Time over the length of the history{behind}", panels, note)
    yield _rows_table(f"Stages{behind}", rows)
    yield _growth_table(
        f"Growth with the history{behind}", [each for each in report.growth if each.case.model == model]
    )
    yield _rooms_table(f"Device memory{behind}", [room for room in report.rooms if room.model == model])
    kernels = [kernel for kernel in report.kernels if kernel.model == model]
    for of, its in groupby(kernels, key=lambda kernel: kernel.of):
        yield _kernels_table(f"Kernels of {of}{behind}", list(its))


def _rows_table(title: str, rows: Sequence[Row]) -> Table:
    """Ours, the naive way beside it; then what there is of the naive way alone. Stages stand together."""
    ours = [row for row in rows if row.way == ONLOOKER]
    naive = {row.case: row for row in rows if row.way == NAIVE}
    alone = [row for row in naive.values() if row.case not in {row.case for row in ours}]
    stages = list(dict.fromkeys(row.stage for row in rows))
    figures = ("history", "time", "limit", "ratio", "rate", "naive", "faster")
    columns = [Column("stage"), Column("of"), *(Column(name, True) for name in figures), Column("note")]
    pairs: list[tuple[Row | None, Row | None]] = [(row, naive.get(row.case)) for row in ours]
    pairs += [(None, row) for row in alone]
    pairs.sort(key=lambda pair: _place(pair[0] or pair[1], stages))
    return Table(title, columns, [_pair_row(*pair) for pair in pairs])


def _place(row: Row | None, stages: Sequence[str]) -> tuple[int, str, int, int, int]:
    assert row is not None
    return stages.index(row.stage), row.encoded, row.chunk_frames, row.history, row.num_answers


def _pair_row(row: Row | None, peer: Row | None) -> list[Cell]:
    case = row or peer
    assert case is not None
    is_faster = row is not None and peer is not None and row.ms and peer.ms
    notes = [row.note if row else "", f"naive: {peer.note}" if peer and peer.note else ""]
    return [
        Cell(case.stage),
        Cell(case.setting),
        Cell(str(case.history) if case.history or case.setting else UNKNOWN),
        Cell(_time_text(row.ms if row else None), "bad" if row and row.is_failed else ""),
        Cell(_time_text(row.limit_ms if row else None)),
        Cell(f"{row.ratio:.1f}x" if row and row.ratio is not None else UNKNOWN),
        Cell(_rate_text(case)),
        Cell(_time_text(peer.ms if peer else None)),
        Cell(f"{peer.ms / row.ms:.1f}x" if is_faster and row and peer and peer.ms and row.ms else UNKNOWN),
        Cell("; ".join(note for note in notes if note), "quiet"),
    ]


def _time_text(ms: float | None) -> str:
    if ms is None:
        return UNKNOWN
    return f"{ms * 1e3:.3g} \N{MICRO SIGN}s" if ms < 0.1 else ms_text(ms)


def _rate_text(row: Row) -> str:
    if row.rate is None:
        return UNKNOWN
    return f"{row.rate:.0f} {row.unit}" if row.rate >= 100 else f"{row.rate:.3g} {row.unit}"


def _growth_table(title: str, grown: Sequence[Growth]) -> Table:
    columns = [Column("chunk"), *(Column(name, True) for name in ("over", "against", "time", "operations"))]
    rows = [
        [
            Cell(each.case.setting),
            Cell(f"{each.case.history} tokens"),
            Cell(f"{each.short} tokens"),
            Cell(f"{each.measured:.2f}x"),
            Cell(f"{each.by_operations:.2f}x"),
        ]
        for each in grown
    ]
    return Table(title, columns, rows)


def _rooms_table(title: str, rooms: Sequence[Room]) -> Table:
    fields = ("weights", "arena", "scratch", "workspace_peak", "torch_reserved", "torch_peak")
    names = ("weights", "keys and values", "scratch", "workspace, peak", "reserved by torch", "allocated, peak")
    rows = [[Cell(room.after), *(_room_cell(getattr(room, f"{field}_bytes")) for field in fields)] for room in rooms]
    return Table(title, [Column("after"), *(Column(name, True) for name in names)], rows)


def _room_cell(num_bytes: int | None) -> Cell:
    return Cell(UNKNOWN if num_bytes is None else bytes_text(num_bytes))


def _kernels_table(title: str, kernels: Sequence[Kernel]) -> Table:
    columns = [Column("kernel"), *(Column(name, True) for name in ("time", "share", "calls"))]
    rows = [[Cell(k.name), Cell(_time_text(k.ms)), Cell(f"{k.share:.0%}"), Cell(str(k.num_calls))] for k in kernels]
    return Table(title, columns, rows)


def _draw(rows: Sequence[Row], axes: Axes) -> None:
    """A colour for each setting; a style for what was measured, its limit, and the naive way."""
    from matplotlib.ticker import LogLocator

    settings = list(dict.fromkeys(row.setting for row in rows))
    for i, setting in enumerate(settings):
        its = [row for row in rows if row.setting == setting]
        for way, field, style, marker, name in _LINES:
            points = sorted((row.history, getattr(row, field)) for row in its if row.way == way and getattr(row, field))
            if points:
                x, y = zip(*points, strict=True)
                axes.plot(x, y, style, marker=marker, color=f"C{i % 10}", label=(setting or "one at a time") + name)
    axes.set_xlabel("history, tokens in the memory")
    axes.set_ylabel("milliseconds")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.18), ncols=2, fontsize=8, frameon=False)
