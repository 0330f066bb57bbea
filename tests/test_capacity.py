"""Capacity runs over real sockets: what was predicted, what came, and what is left behind."""

import signal
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec
import pytest
from clips import write_clip
from commands import endpoint_flags, onlooker, start_onlooker
from fakes import BYTES_PER_TOKEN, TOKENS_PER_FRAME, FakeEngine
from nodes import running_node

from onlooker.node.node import Node
from onlooker.node.options import StreamOptions
from onlooker.protocol.errors import ErrorCode, NodeError
from onlooker.protocol.messages import Forecast, Vram
from onlooker.tools import capacity
from onlooker.tools.capacity_report import CapacityReport, recommendations
from onlooker.tools.report import page_of


def run(node: Node, *arguments: object) -> Any:
    """The JSON of a run that ends well."""
    ended = onlooker("capacity", *arguments, "--json", *endpoint_flags(node, "frames", "ask", "control"))
    assert ended.status == 0, ended.err
    return ended.json


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """23 frames: five chunks of four, and one that lacks a frame."""
    return write_clip(tmp_path / "clip.mp4", 23)


def test_a_file_that_fits_is_remembered_to_its_end_with_the_last_chunk_padded(clip: Path, tmp_path: Path):
    plot = tmp_path / "plot.png"
    with FakeEngine() as engine, running_node(engine) as node:
        report = run(node, clip, "--round-chunks", "2", "--plot", plot)
        assert engine.streams() == ["front"]
    assert report["end"] == "end_of_file"
    assert [each["num_frames"] for each in report["rounds"]] == [8, 16, 23]
    last = report["rounds"][-1]
    assert (last["num_chunks"], last["num_padded"], last["num_tokens"]) == (6, 1, 24 * TOKENS_PER_FRAME)
    assert (report["prediction"]["num_frames"], report["prediction"]["limit"]) == (23, "file")
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert report["machine"]["device"] == "cpu" and "torch" not in report["machine"]  # of a node of others: unknown
    assert "23 frames are remembered" in page_of(report, "").verdict.text


def test_a_memory_that_fills_ends_the_run_where_predicted_and_the_node_goes_on(clip: Path):
    with FakeEngine(capacity_tokens=14 * TOKENS_PER_FRAME) as engine, running_node(engine) as node:
        report = run(node, clip, "--round-chunks", "2")
    last = report["rounds"][-1]
    assert (report["end"], report["prediction"]["limit"]) == ("memory_full", "memory")
    assert report["prediction"]["num_frames"] == last["num_frames"] == 12
    assert report["prediction"]["logical_bytes"] == last["logical_bytes"] == 12 * TOKENS_PER_FRAME * BYTES_PER_TOKEN
    assert report["after"]["answered"] and report["after"]["unchanged"]
    assert any("answered" in line for line in report["findings"])


def test_no_more_frames_are_sent_than_asked_for_and_only_every_nth(clip: Path):
    with FakeEngine() as engine, running_node(engine) as node:
        report = run(node, clip, "--stride", "2", "--max-frames", "8", "--round-chunks", "5")
    assert (report["end"], report["rounds"][-1]["num_frames"]) == ("frames", 8)
    assert (report["stride"], report["video_fps"]) == (2, 5.0)


def test_the_video_and_the_stride_may_come_from_the_environment(clip: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VIDEO_PATH", str(clip))
    monkeypatch.setenv("FRAME_STRIDE", "3")
    with FakeEngine() as engine, running_node(engine) as node:
        report = run(node)
    assert (report["video"], report["stride"], report["rounds"][-1]["num_frames"]) == ("clip.mp4", 3, 8)


def test_the_report_for_people_shows_what_was_predicted_beside_what_came(clip: Path):
    with FakeEngine() as engine, running_node(engine) as node:
        ended = onlooker("capacity", clip, *endpoint_flags(node, "frames", "ask", "control"))
    assert ended.status == 0
    assert all(word in ended.out for word in ("predicted", "measured", "Findings", "megapixel", "Recommendations"))
    assert "predicted:" in ended.err and "6 chunks, 23 frames" in ended.err


def test_with_less_free_memory_than_it_seemed_a_smaller_one_is_reserved(clip: Path):
    class ScarceEngine(FakeEngine):
        def add_stream(self, options: StreamOptions) -> Future[Forecast]:
            if options.memory_bytes > 900_000_000:
                refused: Future[Forecast] = Future()
                refused.set_exception(NodeError(ErrorCode.OUT_OF_MEMORY, "that much is not free"))
                return refused
            return super().add_stream(options)

    with ScarceEngine() as engine, running_node(engine, stream_defaults__memory_bytes="1MB") as node:
        assert run(node, clip)["rounds"][-1]["num_frames"] == 23
        flags = endpoint_flags(node, "frames", "ask", "control")
        asked_for = onlooker("capacity", clip, "--memory", "1GB", *flags)
    assert asked_for.status == 1 and "that much is not free" in asked_for.err


def test_a_memory_too_small_for_one_chunk_is_said_and_leaves_no_stream(clip: Path):
    with FakeEngine(capacity_tokens=2 * TOKENS_PER_FRAME) as engine, running_node(engine) as node:
        ended = onlooker("capacity", clip, *endpoint_flags(node, "frames", "ask", "control"))
        assert engine.streams() == ["front"]
    assert ended.status == 1
    assert "the node did not take the first chunks" in ended.err and "memory_full" in ended.err


def test_ctrl_c_reports_what_came_so_far(clip: Path):
    with FakeEngine() as engine, running_node(engine) as node:
        engine.encode_s = 0.2
        flags = ("--round-chunks", "1", "--json", *endpoint_flags(node, "frames", "ask", "control"))
        with start_onlooker("capacity", clip, *flags) as command:
            assert command.stderr is not None
            while "4 frames: " not in (line := command.stderr.readline()):
                assert line
            command.send_signal(signal.SIGINT)
            out, err = command.communicate(timeout=20)
        assert engine.streams() == ["front"]
    assert command.returncode == 130, err
    assert msgspec.json.decode(out)["end"] == "interrupted"


@pytest.mark.parametrize(
    "arguments",
    [("--memory", "much"), ("--encode-size", "640"), ("--chunk-frames", "x"), ("--stride", "0")],
)
def test_a_mistake_in_the_arguments_is_told_before_a_node_is_asked(clip: Path, arguments: tuple[str, str]):
    assert onlooker("capacity", clip, *arguments).status == 2


def test_a_node_of_sizes_that_nobody_published_says_which_there_are(clip: Path):
    ended = onlooker("capacity", clip, "--config", "qwen9", "--device", "cpu")
    assert ended.status == 1
    assert "qwen2.5-vl-3b" in ended.err


def test_a_model_and_sizes_are_not_given_both(clip: Path):
    assert onlooker("capacity", clip, "--config", "qwen2.5-vl-3b", "--model", "builtin").status == 2


def test_a_plot_into_no_folder_is_refused_before_anything_is_measured(clip: Path, tmp_path: Path):
    ended = onlooker("capacity", clip, "--plot", tmp_path / "none" / "x.png")
    assert ended.status == 1
    assert "there is no folder" in ended.err


def test_a_machine_slower_than_the_video_is_told_to_keep_fewer_frames(clip: Path):
    with FakeEngine() as engine, running_node(engine) as node:
        report = msgspec.convert(run(node, clip), CapacityReport)
    slow = msgspec.structs.replace(report.last, total_s=report.last.num_frames / 2.0)
    lines = recommendations(msgspec.structs.replace(report, rounds=[slow]))
    assert any("stride = 7" in line for line in lines)  # 10 frames a second, of which it takes 2 less a fifth
    assert not any("stride" in line for line in recommendations(report))


def test_what_a_card_reports_is_among_the_findings(clip: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(capacity, "VRAM_PERIOD_S", 0.01)
    vram = Vram(device="cuda:0", weights_bytes=7, kv_bytes=1, torch_peak_bytes=9_000_000_000, free_bytes=10**9)
    with FakeEngine() as engine, running_node(engine) as node:
        engine.vram = lambda: vram  # type: ignore[method-assign]
        report = run(node, clip, "--memory", "1MB")
    assert any("allocated at the peak 9 GB" in line for line in report["findings"])
