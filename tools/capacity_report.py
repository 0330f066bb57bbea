"""What a capacity run found out: the prediction, every round, and what follows from them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import msgspec

from ..protocol.messages import StageTimings, Vram
from .prediction import MeasuredFootprint, Prediction
from .quantity import bytes_text, ms_text, reasons_text, seconds_text

HOUR_S = 3600.0
MEGAPIXEL = 1e6
_RATE_MARGIN = 0.8  # of the measured rate, to plan with

End = Literal["memory_full", "positions", "out_of_memory", "end_of_file", "frames", "interrupted"]


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """Where the memory stood after some chunks more. Frames are real ones; padding is apart."""

    num_chunks: int
    num_frames: int
    num_padded: int
    num_tokens: int
    logical_bytes: int
    resident_bytes: int
    seconds: float  # of this round
    total_s: float
    fps: float  # of this round
    stages: StageTimings
    vram: Vram
    host_rss_bytes: int | None


class Aftermath(msgspec.Struct, frozen=True, kw_only=True):
    """What the node does once no more frames come, or go in."""

    state: str
    dropped: dict[str, int]
    answered: bool
    unchanged: bool
    first_token_ms: float | None


class CapacityReport(msgspec.Struct, frozen=True, kw_only=True):
    """All of it."""

    video: str
    video_fps: float | None  # of the frames that are sent
    stride: int
    node: str
    model: str
    dtype: str
    device: str
    footprint: MeasuredFootprint
    prediction: Prediction
    rounds: list[Round]
    end: End
    after: Aftermath
    seconds: float

    @property
    def last(self) -> Round:
        return self.rounds[-1]

    @property
    def fps(self) -> float:
        """Frames a second over all rounds."""
        return self.last.num_frames / self.last.total_s

    @property
    def predicted_tokens(self) -> int:
        """For as many chunks as were really encoded."""
        return self.footprint.tokens(self.last.num_chunks)

    @property
    def bytes_per_frame(self) -> float:
        return self.last.logical_bytes / self.last.num_frames


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """A figure as it was predicted, beside the same one measured."""

    figure: str
    predicted: str
    measured: str


def comparisons(report: CapacityReport) -> list[Comparison]:
    """What was predicted, beside what came; of what was cut short, for as many chunks as there were."""
    prediction, last, footprint = report.prediction, report.last, report.footprint
    reached = report.end in ("memory_full", "positions", "end_of_file")
    workspace = last.vram.activations_peak_bytes
    pairs = [
        ("frames", str(prediction.num_frames), f"{last.num_frames}{'' if reached else ', cut short'}"),
        ("chunks", str(prediction.num_chunks), str(last.num_chunks)),
        ("ended by", prediction.limit.replace("memory", "full memory"), report.end.replace("_", " ")),
        (f"tokens of {last.num_chunks} chunks", str(report.predicted_tokens), str(last.num_tokens)),
        (
            "bytes of them",
            bytes_text(report.predicted_tokens * footprint.bytes_per_token),
            bytes_text(last.logical_bytes),
        ),
        ("bytes reserved", bytes_text(prediction.memory_bytes), bytes_text(last.resident_bytes)),
        ("frames a second", f"{prediction.fps:.3g}", f"{report.fps:.3g}"),
    ]
    if footprint.room is not None and isinstance(workspace, int):
        pairs.append(("workspace, peak", bytes_text(footprint.room.workspace_bytes), bytes_text(workspace)))
    return [Comparison(figure=figure, predicted=text, measured=measured) for figure, text, measured in pairs]


def findings(report: CapacityReport) -> list[str]:
    """What the figures say, in sentences."""
    last, footprint = report.last, report.footprint
    received, encoded = footprint.received_size, footprint.encoded_size
    lines = [
        f"{last.num_frames} frames of {_size_text(received)}, encoded at {_size_text(encoded)}, are in the memory: "
        f"{last.num_tokens} tokens, {bytes_text(last.logical_bytes)}",
        f"encoding them took {seconds_text(last.total_s)}, {report.fps:.3g} frames a second",
        f"{last.num_tokens / last.num_frames:.4g} tokens and {bytes_text(round(report.bytes_per_frame))} a frame; "
        f"{bytes_text(round(_per_megapixel(report, received)))} a megapixel as received, "
        f"{bytes_text(round(_per_megapixel(report, encoded)))} as encoded",
        f"frames padded to fill the last chunk: {last.num_padded}",
        *_slowdown(report.rounds),
        *_vram(last.vram),
    ]
    after = report.after
    if after.dropped:
        lines.append(f"at the end the stream is {after.state}, frames dropped: {reasons_text(after.dropped)}")
    answered = f"a question after it was answered, its first token after {ms_text(after.first_token_ms or 0.0)}"
    lines.append(answered if after.answered else "a question after it was NOT answered")
    if after.answered:
        lines.append("the memory is unchanged by it" if after.unchanged else "the memory was CHANGED by it")
    return lines


def recommendations(report: CapacityReport) -> list[str]:
    """What to set, given this video and this machine."""
    lines: list[str] = []
    fps, per_frame = report.video_fps, report.bytes_per_frame
    if fps:
        lines.append(f"an hour of this video takes {bytes_text(round(per_frame * fps * HOUR_S))} of memory_bytes")
        if report.fps < fps:
            stride = math.ceil(fps / (report.fps * _RATE_MARGIN))
            lines.append(
                f"the video has {fps:.3g} frames a second, this machine takes {report.fps:.3g}: keep every "
                f"{stride}. frame (stride = {stride}), or encode them smaller (encode_size)"
            )
    if "positions" in (report.prediction.limit, report.end):
        lines.append("the model's positions end before the memory does: keep fewer frames, or reset in time")
    if math.prod(report.footprint.encoded_size) > MEGAPIXEL:
        half = _size_text((report.footprint.encoded_size[0] // 2, report.footprint.encoded_size[1] // 2))
        lines.append(f"encoded at {half} each frame would take a quarter of the memory and less than that of the time")
    return lines


def _per_megapixel(report: CapacityReport, size: tuple[int, int]) -> float:
    return report.bytes_per_frame / (math.prod(size) / MEGAPIXEL)


def _slowdown(rounds: Sequence[Round]) -> list[str]:
    """How the rate has changed with the length of the memory, where there are whole rounds enough to tell."""
    sizes = [each.num_frames - before.num_frames for before, each in itertools.pairwise(rounds)]
    whole = [each for each, size in zip(rounds[1:], sizes, strict=True) if size == rounds[0].num_frames]
    if len(whole) < 2:
        return []
    first, last = whole[0], whole[-1]
    return [
        f"from {first.num_tokens} to {last.num_tokens} tokens the rate went from {first.fps:.3g} to "
        f"{last.fps:.3g} frames a second"
    ]


def _vram(vram: Vram) -> list[str]:
    names = {
        "torch_peak_bytes": "allocated at the peak",
        "torch_reserved_bytes": "reserved",
        "activations_peak_bytes": "workspace",
        "free_bytes": "still free",
    }
    known = {text: getattr(vram, field) for field, text in names.items()}
    parts = [f"{text} {bytes_text(value)}" for text, value in known.items() if isinstance(value, int)]
    return [f"device memory: weights {bytes_text(vram.weights_bytes)}, {', '.join(parts)}"] if parts else []


def _size_text(size: tuple[int, int]) -> str:
    return "{}x{}".format(*size)
