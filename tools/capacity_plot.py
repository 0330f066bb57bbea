"""A picture of a capacity run: memory and rate over frames."""

from __future__ import annotations

from pathlib import Path

from .capacity_report import CapacityReport
from .plot import PlotError

MAX_HEADROOM = 8  # times what is in use: a line farther above would press all others flat


def plot_capacity(report: CapacityReport, path: Path) -> None:
    """Draw the memory, as predicted and as measured, and the rate of each round. Raises PlotError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    memory, rate = figure.subplots(2, 1, sharex=True)
    rounds, footprint = report.rounds, report.footprint
    frames = [each.num_frames for each in rounds]
    used = report.last.logical_bytes
    unit, scale = ("GB", 1e9) if used >= 1e9 else ("MB", 1e6)
    predicted = [footprint.tokens(each.num_chunks) * footprint.bytes_per_token / scale for each in rounds]
    memory.plot(frames, [each.logical_bytes / scale for each in rounds], "o-", label="keys and values")
    memory.plot(frames, predicted, "k--", label="keys and values, predicted")
    others = {
        "reserved for them": [each.resident_bytes for each in rounds],
        "allocated, peak": [each.vram.torch_peak_bytes for each in rounds],
        "reserved by torch": [each.vram.torch_reserved_bytes for each in rounds],
    }
    for label, values in others.items():
        known = [value for value in values if isinstance(value, int)]
        if len(known) == len(rounds) and max(known) <= MAX_HEADROOM * used:
            memory.plot(frames, [value / scale for value in known], ".-", label=label)
    memory.set_ylabel(unit)
    memory.set_ylim(bottom=0)
    memory.legend(loc="best", fontsize=8)
    rate.plot(frames, [each.fps for each in rounds], "o-", label="of each round")
    rate.axhline(report.prediction.fps, color="black", linestyle="--", label="predicted")
    if report.video_fps:
        rate.axhline(report.video_fps, color="C3", linestyle=":", label="of the video")
    rate.set_ylabel("frames a second")
    rate.set_xlabel("frames in the memory")
    rate.set_ylim(bottom=0)
    rate.legend(loc="best", fontsize=8)
    for axes in (memory, rate):
        axes.grid(alpha=0.3)
    width, height = footprint.encoded_size
    figure.suptitle(f"{report.model} on {report.device}: {report.video}, encoded at {width}x{height}")
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise PlotError(f"{path}: {error.strerror}") from error
