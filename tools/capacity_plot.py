"""A picture of a capacity run: memory and rate over frames."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .capacity_report import CapacityReport
from .panel import Panel
from .plot import PlotError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_HEADROOM = 8  # times what is in use: a line farther above would press all others flat


def plot_capacity(report: CapacityReport, path: Path) -> None:
    """Draw the memory, as predicted and as measured, and the rate of each round. Raises PlotError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, axes in zip(capacity_panels(report), figure.subplots(2, 1), strict=True):
        panel.draw(axes)
    width, height = report.footprint.encoded_size
    figure.suptitle(f"{report.model} on {report.device}: {report.video}, encoded at {width}x{height}")
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise PlotError(f"{path}: {error.strerror}") from error


def capacity_panels(report: CapacityReport) -> list[Panel]:
    """The memory, as predicted and as measured, and the rate of each round."""
    return [Panel("Memory", partial(_draw_memory, report)), Panel("Rate", partial(_draw_rate, report))]


def _draw_memory(report: CapacityReport, axes: Axes) -> None:
    rounds, footprint = report.rounds, report.footprint
    frames = [each.num_frames for each in rounds]
    used = report.last.logical_bytes
    unit, scale = ("GB", 1e9) if used >= 1e9 else ("MB", 1e6)
    predicted = [footprint.tokens(each.num_chunks) * footprint.bytes_per_token / scale for each in rounds]
    axes.plot(frames, [each.logical_bytes / scale for each in rounds], "o-", label="keys and values")
    axes.plot(frames, predicted, "k--", label="keys and values, predicted")
    others = {
        "reserved for them": [each.resident_bytes for each in rounds],
        "allocated, peak": [each.vram.torch_peak_bytes for each in rounds],
        "reserved by torch": [each.vram.torch_reserved_bytes for each in rounds],
    }
    for label, values in others.items():
        known = [value for value in values if isinstance(value, int)]
        if len(known) == len(rounds) and max(known) <= MAX_HEADROOM * used:
            axes.plot(frames, [value / scale for value in known], ".-", label=label)
    axes.set_ylabel(f"memory, {unit}")
    _finish(axes)


def _draw_rate(report: CapacityReport, axes: Axes) -> None:
    rounds = report.rounds
    axes.plot([each.num_frames for each in rounds], [each.fps for each in rounds], "o-", label="of each round")
    axes.axhline(report.prediction.fps, color="black", linestyle="--", label="predicted")
    if report.video_fps:
        axes.axhline(report.video_fps, color="C3", linestyle=":", label="of the video")
    axes.set_ylabel("frames a second")
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.set_xlabel("frames in the memory")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(loc="best", fontsize=8)
    axes.grid(alpha=0.3)
