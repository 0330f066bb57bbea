"""Pictures of a score: accuracy against the length of the memory, and settings against each other."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..protocol.errors import OnlookerError
from .panel import Panel
from .quantity import bytes_text
from .score import Count, RecallScore, Score, SettingScore
from .story import COLOURS as STORY_COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"native": "#0b6bb3", "turns": "#d1690e"}
MARKERS = {"native": "o", "turns": "s"}
_RECALL_MARKERS = "osD^vPX*"
Z_95 = 1.96
INTERVAL = "bars: 95 % interval"


class PlotError(OnlookerError):
    """A plot cannot be drawn or written here."""


def check_plot(path: Path) -> None:
    """Raise PlotError before anything is measured for a plot that cannot be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise PlotError("a plot needs matplotlib; install it with: pip install 'onlooker[plot]'")
    if not path.resolve().parent.is_dir():
        raise PlotError(f"{path}: there is no folder {path.resolve().parent}")


def plot_lengths(score: Score, path: Path, title: str) -> None:
    """Draw the share of right answers against the number of chunks in the memory, by layout."""
    figure = _figure(9, 5)
    lengths_panel(score).draw(figure.subplots())
    _save(figure, path, title)


def plot_settings(rows: Sequence[SettingScore], path: Path, title: str) -> None:
    """Draw accuracy, memory, encoding and answering time of each setting."""
    figure = _figure(11, 8)
    for panel, axes in zip(settings_panels(rows), figure.subplots(2, 2).flat, strict=True):
        panel.draw(axes)
    _save(figure, path, title)


def plot_recall(rows: Sequence[RecallScore], path: Path, title: str) -> None:
    """Draw the share of right answers of each way to keep against how long ago the thing was seen, by layout."""
    panels = recall_panels(rows)
    figure = _figure(9, 5.5 * len(panels))
    for panel, axes in zip(panels, figure.subplots(len(panels), squeeze=False).flat, strict=True):
        panel.draw(axes)
        axes.set_title(panel.caption)
    _save(figure, path, title)


def lengths_panel(score: Score) -> Panel:
    """The share of right answers against the number of chunks in the memory, by layout."""
    return Panel("Right answers by the length of the memory", partial(_draw_lengths, score))


def kinds_panel(score: Score) -> Panel:
    """The share of right answers to each kind of question, by layout."""
    return Panel("Right answers by kind", partial(_draw_kinds, score))


def settings_panels(rows: Sequence[SettingScore]) -> list[Panel]:
    """Accuracy, memory, encoding and answering time of each setting."""
    return [
        Panel("Right answers", partial(_draw_accuracy, rows)),
        Panel("Memory", partial(_draw_memory, rows)),
        Panel("Encoding", partial(_draw_encoding, rows)),
        Panel("Answering", partial(_draw_answering, rows)),
    ]


def recall_panels(rows: Sequence[RecallScore]) -> list[Panel]:
    """The share of right answers of each way to keep against how long ago the thing was seen; a panel a layout."""
    layouts = list(dict.fromkeys(row.layout for row in rows))
    return [
        Panel(f"Right answers by age, {layout}", partial(_draw_recall, [row for row in rows if row.layout == layout]))
        for layout in layouts
    ]


def _draw_recall(rows: Sequence[RecallScore], axes: Axes) -> None:
    num_asked = {(age.first, age.last): age.right.of for age in rows[0].ages}  # the same of every row
    spans = list(num_asked)
    for i, row in enumerate(rows):
        axes.errorbar(
            [spans.index((age.first, age.last)) + _shift(i, len(rows)) / 2 for age in row.ages],
            [100 * age.right.share for age in row.ages],
            yerr=_bars([age.right for age in row.ages]),
            color="black" if row.keeping.share == 1 else None,
            marker=_RECALL_MARKERS[i % len(_RECALL_MARKERS)],
            linestyle="--" if row.keeping.share == 1 else "-",
            elinewidth=0.7,
            capsize=2,
            label=f"{row.keeping.name}, {bytes_text(round(row.logical_bytes))}",
        )
    axes.axhline(100 / len(STORY_COLOURS), color="grey", linewidth=0.8, linestyle=":", label="a blind guess")
    _name_places(axes, [f"{_span_text(*span)}\n{num}" for span, num in num_asked.items()])
    axes.set_xlabel("chunks since the thing was seen last, and how many were asked then")
    axes.set_ylabel("right answers, %")
    axes.set_ylim(-3, 103)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), title=INTERVAL, frameon=False)


def _span_text(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}\N{EN DASH}{last}"


def _draw_lengths(score: Score, axes: Axes) -> None:
    spans = [_span_text(each.first, each.last) for each in score.lengths]
    layouts = list(score.by_layout)
    for i, layout in enumerate(layouts):
        counts = [each.by_layout.get(layout, Count(0, 0)) for each in score.lengths]
        _draw_shares(axes, counts, layout, [n + _shift(i, len(layouts)) for n in range(len(counts))])
    _name_places(axes, [f"{span}\n{each.all.of}" for span, each in zip(spans, score.lengths, strict=True)])
    axes.set_xlabel("chunks in the memory when the question was asked,\nand how many were asked then")
    _finish_shares(axes)


def _draw_kinds(score: Score, axes: Axes) -> None:
    layouts = list(score.by_layout)
    for i, layout in enumerate(layouts):
        known = [(n, each.by_layout[layout]) for n, each in enumerate(score.kinds) if layout in each.by_layout]
        axes.errorbar(
            [100 * count.share for _, count in known],
            [n + 2 * _shift(i, len(layouts)) for n, _ in known],
            xerr=_bars([count for _, count in known]),
            color=COLOURS[layout],
            marker=MARKERS[layout],
            markersize=4,
            linestyle="none",
            label=layout,
        )
    axes.set_yticks(range(len(score.kinds)), [each.kind for each in score.kinds], fontsize=8)
    axes.set_ylim(len(score.kinds) - 0.5, -0.5)
    axes.set_xlim(-3, 103)
    axes.set_xlabel("right answers, %")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.18), ncols=2, title=INTERVAL, frameon=False)


def _draw_accuracy(rows: Sequence[SettingScore], axes: Axes) -> None:
    for layout, its, places in _lines(rows):
        _draw_shares(axes, [row.right for row in its], layout, places)
    _finish_shares(axes)
    _name_sizes(axes, rows)


def _draw_memory(rows: Sequence[SettingScore], axes: Axes) -> None:
    for layout, its, places in _lines(rows):
        _draw_line(axes, places, [row.tokens for row in its], layout)
    bytes_per_token = max(row.logical_bytes / row.tokens for row in rows)
    axes.set_ylabel("tokens at the end of a stream")
    megabytes = bytes_per_token / 1e6
    right = axes.secondary_yaxis("right", functions=(partial(_times, megabytes), partial(_times, 1 / megabytes)))
    right.set_ylabel("MB of keys and values")
    _finish_amounts(axes, rows)


def _times(factor: float, values: Any) -> Any:
    """Of a number or an array of them."""
    return factor * values


def _draw_encoding(rows: Sequence[SettingScore], axes: Axes) -> None:
    for layout, its, places in _lines(rows):
        _draw_line(axes, places, [row.encode_ms for row in its], layout)
    axes.set_ylabel("encoding, ms a frame")
    _finish_amounts(axes, rows)


def _draw_answering(rows: Sequence[SettingScore], axes: Axes) -> None:
    for layout, its, places in _lines(rows):
        _draw_line(axes, places, [row.answer_ms for row in its], layout, ", whole answer")
        _draw_line(axes, places, [row.first_token_ms for row in its], layout, ", first token", dashed=True)
    axes.set_ylabel("answering, ms a question")
    _finish_amounts(axes, rows)


def _lines(rows: Sequence[SettingScore]) -> Iterator[tuple[str, list[SettingScore], list[float]]]:
    """Each layout with its rows and their places, which are a little beside those of the other layout."""
    sizes = _sizes(rows)
    layouts = [layout for layout in COLOURS if any(row.layout == layout for row in rows)]
    for i, layout in enumerate(layouts):
        its = [row for row in rows if row.layout == layout]
        yield layout, its, [sizes.index(row.chunk_frames) + _shift(i, len(layouts)) for row in its]


def _shift(i: int, num: int) -> float:
    """How far the i-th of so many layouts stands beside its place, so that none hides another."""
    return 0.12 * (i - (num - 1) / 2)


def _sizes(rows: Sequence[SettingScore]) -> list[int]:
    return sorted({row.chunk_frames for row in rows})


def _figure(width: float, height: float) -> Figure:
    """A figure of its own, so that no display and no global state is needed; sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw_shares(axes: Axes, counts: Sequence[Count], layout: str, places: Sequence[float]) -> None:
    """Shares in per cent with 95 % intervals; a place where nothing was asked is left out."""
    known = [(x, count) for x, count in zip(places, counts, strict=True) if count.of]
    total = sum(count.of for _, count in known)
    axes.errorbar(
        [x for x, _ in known],
        [100 * count.share for _, count in known],
        yerr=_bars([count for _, count in known]),
        color=COLOURS[layout],
        marker=MARKERS[layout],
        capsize=3,
        label=f"{layout} ({total} questions)",
    )


def _bars(counts: Sequence[Count]) -> list[list[float]]:
    """How far the 95 % intervals of shares reach below them and above them, in per cent."""
    ends = [(count.share, *wilson(count)) for count in counts]
    return [[100 * (share - low) for share, low, _ in ends], [100 * (high - share) for share, _, high in ends]]


def _draw_line(
    axes: Axes, places: Sequence[float], values: Sequence[float], layout: str, what: str = "", *, dashed: bool = False
) -> None:
    axes.plot(
        places,
        values,
        color=COLOURS[layout],
        marker=MARKERS[layout],
        linestyle="--" if dashed else "-",
        label=f"{layout}{what}",
    )


def _finish_shares(axes: Axes) -> None:
    axes.set_ylabel("right answers, %")
    axes.set_ylim(-3, 103)
    axes.legend(loc="best", title=INTERVAL)


def _finish_amounts(axes: Axes, rows: Sequence[SettingScore]) -> None:
    axes.set_ylim(bottom=0)
    axes.legend(loc="best")
    _name_sizes(axes, rows)


def _name_sizes(axes: Axes, rows: Sequence[SettingScore]) -> None:
    _name_places(axes, [str(size) for size in _sizes(rows)])
    axes.set_xlabel("frames a chunk")


def _name_places(axes: Axes, names: Sequence[str]) -> None:
    axes.set_xticks(range(len(names)), names)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path, title: str) -> None:
    figure.suptitle(title)
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise PlotError(f"{path}: {error.strerror}") from error


def wilson(count: Count) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927), which also holds near 0 and 1; of none, all of it."""
    if not count.of:
        return 0.0, 1.0
    z2 = Z_95**2 / count.of
    middle = (count.share + z2 / 2) / (1 + z2)
    reach = Z_95 / (1 + z2) * math.sqrt(count.share * (1 - count.share) / count.of + z2 / (4 * count.of))
    return max(0.0, min(middle - reach, count.share)), min(1.0, max(middle + reach, count.share))
