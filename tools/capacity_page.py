"""The page of `onlooker capacity`: what was predicted beside what came, and every round."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from msgspec import UNSET, UnsetType

from .capacity_plot import capacity_panels
from .capacity_report import CapacityReport, Round, comparisons, findings, recommendations
from .quantity import bytes_text, ms_text, seconds_text
from .report_page import UNKNOWN, Cell, Column, Fact, Page, Plots, Sentences, Table, Tile, Verdict, machine_facts


def capacity_page(report: CapacityReport, machine: Mapping[str, str]) -> Page:
    """Needs matplotlib."""
    last, footprint = report.last, report.footprint
    return Page(
        title="capacity",
        subject=f"{report.model} on {report.device}",
        verdict=_verdict(report),
        facts=[
            Fact("video", report.video),
            Fact("model", f"{report.model}, {report.dtype}"),
            Fact("node", report.node),
            Fact("frames as received", "{}x{}".format(*footprint.received_size)),
            Fact("frames as encoded", "{}x{}".format(*footprint.encoded_size)),
            Fact("a chunk", f"{footprint.chunk_frames} frames, {footprint.tokens_per_chunk} tokens"),
            Fact("a token", f"{footprint.bytes_per_token} bytes"),
            Fact("took", seconds_text(report.seconds)),
            *machine_facts(machine),
        ],
        tiles=[
            Tile("frames remembered", str(last.num_frames), f"predicted {report.prediction.num_frames}"),
            Tile("keys and values", bytes_text(last.logical_bytes), f"of {bytes_text(last.resident_bytes)} reserved"),
            Tile(
                "a frame", bytes_text(round(report.bytes_per_frame)), f"{last.num_tokens / last.num_frames:.3g} tokens"
            ),
            Tile("rate", f"{report.fps:.3g} frames/s", f"predicted {report.prediction.fps:.3g}"),
        ],
        parts=[
            Plots("Memory and rate", capacity_panels(report)),
            _comparison_table(report),
            Sentences("Findings", [_sentence(line) for line in findings(report)]),
            Sentences("Recommendations", [_sentence(line) for line in recommendations(report)]),
            _rounds_table(report),
        ],
    )


def _verdict(report: CapacityReport) -> Verdict:
    """Bad is what must not be: a node that does not answer afterwards, or a memory that a question has changed."""
    last, after = report.last, report.after
    seconds = f", {seconds_text(last.num_frames / report.video_fps)} of the video" if report.video_fps else ""
    ends = {
        "memory_full": "then the memory was full",
        "positions": "then the model's positions were used up",
        "out_of_memory": "then the device was out of memory",
        "end_of_file": "the whole file",
        "frames": "as many as asked for",
        "interrupted": "then it was interrupted",
    }
    text = f"{last.num_frames} frames are remembered{seconds}: {ends[report.end]}"
    if not after.answered:
        return Verdict(False, f"{text}. A question after it was NOT answered")
    if not after.unchanged:
        return Verdict(False, f"{text}. The memory was CHANGED by a question after it")
    return Verdict(None, f"{text}. A question after it was answered")


def _comparison_table(report: CapacityReport) -> Table:
    columns = [Column(""), Column("predicted", True), Column("measured", True)]
    rows = [[Cell(each.figure), Cell(each.predicted), Cell(each.measured)] for each in comparisons(report)]
    return Table("Predicted and measured", columns, rows)


def _rounds_table(report: CapacityReport) -> Table:
    stages = ("decode", "preprocess", "vision", "prefill")
    names = ("chunks", "frames", "tokens", "keys and values", "took", "frames/s", *stages, "allocated, peak", "host")
    return Table(
        "Rounds",
        [Column(name, True) for name in names],
        [_round_row(each) for each in report.rounds],
        "Times of stages are those of a chunk, as the node gives them; what it does not know is left out.",
    )


def _round_row(each: Round) -> list[Cell]:
    stages = each.stages
    times = (stages.decode_ms, stages.preprocess_ms, stages.vision_ms, stages.prefill_ms)
    texts = [
        str(each.num_chunks),
        str(each.num_frames),
        str(each.num_tokens),
        bytes_text(each.logical_bytes),
        seconds_text(each.seconds),
        f"{each.fps:.3g}",
        *(_known(time, ms_text) for time in times),
        _known(each.vram.torch_peak_bytes, bytes_text),
        _known(each.host_rss_bytes, bytes_text),
    ]
    return [Cell(text) for text in texts]


def _known(value: float | UnsetType | None, text: Callable[..., str]) -> str:
    return UNKNOWN if value is UNSET or value is None else text(value)


def _sentence(line: str) -> str:
    return line[:1].upper() + line[1:]
