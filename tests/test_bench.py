"""The benchmark measures what it says, and goes on when a part of it cannot."""

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FAMILIES, Checkpoints, memory
from checkpoints import chunk as some_chunk

from onlooker.node import bench
from onlooker.node.bench import Plan, Subject, main
from onlooker.node.bench_engine import Setting, fill, history_rows
from onlooker.node.bench_naive import NaiveBench
from onlooker.node.bench_report import NAIVE, Case, Row, growth, row_text, table_text
from onlooker.node.ceilings import Ceilings
from onlooker.node.workload import Work
from onlooker.tools.report import page_of

SETTING = Setting((112, 84), None, 4)


@dataclass(frozen=True)
class Ended:
    status: int
    out: str
    document: dict[str, Any]
    plot: Path

    def rows(self, stage: str, way: str = "onlooker") -> list[dict[str, Any]]:
        return [row for row in self.document["rows"] if (row["stage"], row["way"]) == (stage, way)]


@pytest.fixture(scope="module", autouse=True)
def ceilings() -> Iterator[None]:
    """Not measured here, by each run anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "measure_ceilings", lambda device, dtype: Ceilings(1e11, 1e10))
        yield


@pytest.fixture(scope="module")
def ended(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """One whole run on a tiny model."""
    folder = tmp_path_factory.mktemp("bench")
    arguments = ["--model", str(checkpoints.path("qwen2_5_vl")), "--device", "cpu", "--size", "112x84"]
    arguments += ["--history", "0,64,256", "--wire", "10", "--budget-s", "40", "--profile"]
    arguments += ["--json", str(folder / "bench.json"), "--plot", str(folder / "bench.png")]
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "_ROW_S", 0.05)
        status = main(arguments)
    document = json.loads((folder / "bench.json").read_text())
    return Ended(status, out.getvalue(), document, folder / "bench.png")


def test_every_part_is_measured_and_none_fails(ended: Ended):
    assert ended.status == 0
    missing = [row for row in ended.document["rows"] if row["ms"] is None and row["rate"] is None]
    # On a tiny model it may be less than what two prefills differ by.
    assert [(row["stage"], row["note"]) for row in missing if row["stage"] != "attention over history"] == []
    ours = {row["stage"] for row in ended.document["rows"] if row["way"] == "onlooker"}
    assert ours == {
        *("load", "warm-up"),
        *("preprocess", "vision tower", "prefill", "attention over history", "chunk", "chunks in a row"),
        *("chunks while 8 are asked", "tokens while encoding", "first token", "decoded token", "snapshot + restore"),
        *("over the wire, jpeg", "first token, over the wire"),
    }
    naive = {row["stage"] for row in ended.document["rows"] if row["way"] == "naive"}
    assert naive >= {"preprocess", "vision tower", "prefill", "chunk", "first token", "decoded token"}
    assert naive >= {"snapshot + restore", "first token, whole video anew"}


def test_a_chunk_is_measured_over_every_history_and_a_token_over_every_memory(ended: Ended):
    assert [row["history"] for row in ended.rows("chunk")] == [0, 64, 256]
    assert [(row["history"], row["num_answers"]) for row in ended.rows("decoded token")] == [
        *((64, 1), (64, 8)),
        *((256, 1), (256, 8)),
    ]


def test_rates_and_ratios_follow_from_the_times(ended: Ended):
    for row in ended.rows("chunk"):
        assert row["rate"] == pytest.approx(4 / row["ms"] * 1e3)
        assert row["ratio"] == pytest.approx(row["ms"] / row["limit_ms"])
    ceilings = next(iter(ended.document["ceilings"].values()))
    (vision,) = ended.rows("vision tower")
    assert vision["limit_ms"] == pytest.approx(
        max(vision["flops"] / ceilings["flops_per_s"], vision["num_bytes"] / ceilings["bytes_per_s"]) * 1e3
    )


def test_every_frame_sent_over_the_wire_is_encoded(ended: Ended):
    (wire,) = ended.rows("over the wire, jpeg")
    assert "10 frames of 112x84 sent" in wire["note"] and "10 encoded as 112x84" in wire["note"]
    assert wire["rate"] == pytest.approx(10 / wire["ms"] * 1e3)


def test_the_memory_of_the_device_is_told_by_component(ended: Ended):
    (room,) = ended.document["rooms"]
    assert room["weights_bytes"] > 0 and room["arena_bytes"] > 0 and room["scratch_bytes"] > 0
    assert room["torch_peak_bytes"] is None


def test_the_profile_tells_what_ran_longest_in_a_chunk_and_in_an_answer(ended: Ended):
    kernels = ended.document["kernels"]
    assert {kernel["of"].split(" over ")[0] for kernel in kernels} == {
        "a chunk",
        "a question and 17 tokens of its answer",
    }
    assert all(kernel["ms"] > 0 and 0 < kernel["share"] <= 1 for kernel in kernels)
    assert "aten::" in ended.out


def test_the_json_says_what_was_run_and_makes_a_page(ended: Ended):
    assert ended.document["machine"]["command"].startswith("onlooker bench --model")
    page = page_of(ended.document, "")
    assert page.verdict.held is None and "a chunk of" in page.verdict.text


def test_the_table_holds_every_stage_and_the_plot_is_a_picture(ended: Ended):
    assert all(row["stage"] in ended.out for row in ended.document["rows"])
    assert ended.plot.read_bytes().startswith(b"\x89PNG")


def test_what_does_not_fit_is_a_row_and_the_rest_goes_on(checkpoints: Checkpoints, tmp_path: Path):
    arguments = ["--model", str(checkpoints.path("qwen2_5_vl")), "--device", "cpu", "--size", "112x84", "--wire", "0"]
    file = tmp_path / "bench.json"
    assert main([*arguments, "--history", f"0,{10**13}", "--budget-s", "20", "--json", str(file)]) == 1
    rows = json.loads(file.read_text())["rows"]
    assert any("OUT_OF_MEMORY" in row["note"] or "cannot reserve" in row["note"] for row in rows)
    assert any(row["way"] == "naive" and row["ms"] for row in rows)


def test_nothing_is_measured_once_the_time_is_over(checkpoints: Checkpoints, tmp_path: Path):
    file = tmp_path / "bench.json"
    main(
        ["--model", str(checkpoints.path("qwen2_5_vl")), "--device", "cpu", "--budget-s", "0.001", "--json", str(file)]
    )
    rows = json.loads(file.read_text())["rows"]
    notes = {row["note"] for row in rows if row["stage"] not in ("load", "warm-up")}
    assert notes == {"left out: the time is over"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("--size", "1920"),
        ("--size", "0x5"),
        ("--chunk-frames", "3"),
        ("--history", "-1"),
        ("--budget-s", "0"),
        ("--wire-encoding", "bmp"),
        ("--device", "gpu"),
        ("--json", "no-such-folder/x.json"),
        ("--plot", "no-such-folder/x.png"),
    ],
)
def test_a_mistake_in_the_arguments_is_told_at_once(arguments: tuple[str, str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as error:
        main(list(arguments))
    assert error.value.code == 2
    assert arguments[1].removeprefix("-") in capsys.readouterr().err


@pytest.mark.parametrize("family", FAMILIES)
def test_a_filled_memory_holds_as_many_tokens_and_takes_chunks(checkpoints: Checkpoints, family: str):
    model = checkpoints.model(family)
    stream = memory(model)
    fill(stream, 100)
    assert (stream.info().num_tokens, stream.info().num_frames) == (100, 1)
    keys, _ = stream.extent(stream.now).rows(0)
    assert keys.std() == pytest.approx(1, rel=0.1)
    factor = model.geometry.factor
    assert stream.append(some_chunk(1, factor=factor)).num_tokens == stream.now.num_tokens - 100


@pytest.mark.parametrize("family", FAMILIES)
def test_the_naive_way_reads_a_chunk_over_its_history_and_takes_it_back(checkpoints: Checkpoints, family: str):
    network = Subject(str(checkpoints.path(family)), False, "cpu", "auto").load_network(torch.float32, "sdpa")
    naive = NaiveBench(network, family, checkpoints.model(family).geometry)
    rows = [*naive.chunk(SETTING, 32), *naive.token(32, 8), *naive.first_token(32), *naive.whole_video(SETTING, 32)]
    assert all(row.way == NAIVE and row.ms for row in rows)
    (snapshot,) = naive.snapshot(32)
    assert snapshot.num_bytes == 32 * checkpoints.model(family).kv_shape.bytes_per_token


@pytest.mark.parametrize("num", [1, 2, 8])
def test_the_naive_way_takes_chunks_of_every_size(checkpoints: Checkpoints, num: int):
    network = Subject(str(checkpoints.path("qwen3_vl")), False, "cpu", "auto").load_network(torch.float32, "eager")
    naive = NaiveBench(network, "x", checkpoints.model("qwen3_vl").geometry)
    setting = Setting((112, 84), None, num)
    (whole,) = naive.whole_video(setting, 100)
    assert whole.ms and naive.chunk(setting, 0)
    assert whole.num_tokens == naive.num_chunk_tokens(setting) * (100 // naive.num_chunk_tokens(setting))


def test_a_naive_cache_is_as_long_after_a_chunk_as_before(checkpoints: Checkpoints):
    network = Subject(str(checkpoints.path("qwen2_vl")), False, "cpu", "auto").load_network(torch.float32, "sdpa")
    naive = NaiveBench(network, "x", checkpoints.model("qwen2_vl").geometry)
    cache = naive._cache(16)
    naive._append(cache, naive._noise(1, 4))
    assert cache.get_seq_length() == 16


# The report


def row(
    stage: str, ms: float | None, *, history: int = 0, flops: int = 0, way: str = "onlooker", note: str = ""
) -> Row:
    return Row(Case("m", stage, "28x28", 4, history), way, ms=ms, flops=flops, note=note)


def test_growth_compares_the_measured_time_with_the_operations():
    (grown,) = growth([row("chunk", 10, history=100, flops=5), row("chunk", 30, history=900, flops=10)])
    assert (grown.short, grown.measured, grown.by_operations) == (100, 3.0, 2.0)


def test_the_naive_way_stands_beside_ours():
    line = table_text([row("chunk", 10), row("chunk", 40, way=NAIVE)]).splitlines()[1]
    assert line.split()[-2:] == ["ms", "4.0x"]


def test_attention_over_a_history_is_what_a_prefill_takes_more_with_it():
    rows = [row("prefill", 10, flops=5), row("prefill", 30, history=9, flops=25), row("prefill", 8, history=3, flops=6)]
    past, lost = history_rows(rows, Ceilings(1000, 1000))
    assert (past.case.history, past.ms, past.flops, past.limit_ms) == (9, 20, 20, 20)
    assert lost.ms is None and "noise" in lost.note


def test_a_part_whose_module_is_missing_is_left_out_and_fails_nothing(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "onlooker.node.bench_wire", None)
    arguments = ["--model", str(checkpoints.path("qwen2_5_vl")), "--device", "cpu", "--size", "112x84", "--quick"]
    assert main([*arguments, "--history", "0", "--naive", "off", "--budget-s", "10"]) == 0
    out = capsys.readouterr().out
    assert "left out: the module onlooker.node.bench_wire is missing" in out
    assert "chunks in a row" not in out and "prefill" in out


def test_what_only_the_naive_way_does_and_what_failed_is_in_the_table_too():
    text = table_text([row("chunk", None, note="out of memory"), row("again", 3, way=NAIVE)])
    assert "out of memory" in text and "naive: again" in text


def test_a_limit_is_the_sum_of_steps_that_follow_each_other():
    limited = row("chunk", 10).limited(Ceilings(1000, 1000), Work(flops=1), Work(num_bytes=4))
    assert (limited.limit_ms, limited.ratio) == (5.0, 2.0)


@pytest.mark.parametrize(("ms", "text"), [(0.0005, "0.5 us"), (2.345, "2.35 ms"), (1234.5, "1234 ms"), (None, "-")])
def test_times_are_read_without_exponents(ms: float | None, text: str):
    assert text in row_text(row("chunk", ms))


def test_the_frames_over_the_wire_are_those_of_the_fewest_pixels():
    small = Setting((1920, 1080), (392, 224), 4)
    assert Plan((SETTING, small, Setting((640, 360), None, 4)), (0,), 1, (), None).wire_setting is SETTING
