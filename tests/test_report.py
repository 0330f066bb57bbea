"""The JSON of a run becomes one page, with every figure in it, that asks nothing of anybody."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import pytest
from commands import onlooker
from page_reader import PageReader
from replies import asked, showing
from test_prediction import footprint

from onlooker.node.bench_report import NAIVE, Case, Kernel, Room, Row
from onlooker.node.bench_report import Report as BenchReport
from onlooker.node.ceilings import Ceilings
from onlooker.node.verify import Check
from onlooker.protocol.messages import StageTimings, Vram
from onlooker.tools.capacity_report import Aftermath, CapacityReport, Round
from onlooker.tools.check import Check as Promise
from onlooker.tools.exam import Report
from onlooker.tools.prediction import predict
from onlooker.tools.report import ReportError, page_of
from onlooker.tools.report_page import UNKNOWN
from onlooker.tools.score import compare, score, score_choices
from onlooker.tools.showing import Asked

HOSTILE = "<script>alert(1)</script>\"'&amp; --> $x^ </title> https://example.org/x.js \u202e"
MACHINE = {"command": "onlooker x --y", "date": "2026-01-02T03:04:05+00:00", "device": "a device", "torch": "2.99"}


def plain(document: Any) -> dict[str, Any]:
    """As it is read from a file."""
    return json.loads(msgspec.json.encode(document))


def read(document: Any) -> PageReader:
    return PageReader(page_of(plain(document), "a file").html())


def exam(*questions: Asked, held: bool = True, model: str = "a model", compares: bool = False) -> dict[str, Any]:
    showings = [showing(*questions), showing(*questions, layout="turns", chunk_frames=8)]
    if compares:
        silent = msgspec.structs.replace(showings[0], stages=StageTimings())
        showings = [silent, showings[1]]
    report = Report(
        scenario="stories",
        model=model,
        device="cpu",
        notice=None,
        score=score(showings),
        choices=score_choices(questions),
        comparison=compare(showings) if compares else [],
        storm=None,
        checks=[Promise(promise="no question left a trace", held=held, figures="4 of 4")],
        seconds=2.5,
        showings=showings,
    )
    return msgspec.to_builtins(report) | {"machine": MACHINE}


def capacity(**changes: Any) -> dict[str, Any]:
    rounds = [
        Round(
            num_chunks=num,
            num_frames=4 * num,
            num_padded=0,
            num_tokens=5 + 100 * num,
            logical_bytes=10 * (5 + 100 * num),
            resident_bytes=5000,
            seconds=2.0,
            total_s=2.0 * num,
            fps=2.0,
            stages=StageTimings(vision_ms=12.5),
            vram=Vram(device="cpu", weights_bytes=7, kv_bytes=1),
            host_rss_bytes=None,
        )
        for num in (1, 2, 3)
    ]
    took = footprint()
    report = CapacityReport(
        video="yard.mp4",
        video_fps=8.0,
        stride=1,
        node="a node",
        model="a model",
        dtype="float32",
        device="cpu",
        footprint=took,
        prediction=predict(took, capacity_tokens=305, fps=8, file_frames=None),
        rounds=rounds,
        end="memory_full",
        after=Aftermath(state="full", dropped={}, answered=True, unchanged=True, first_token_ms=3.0),
        seconds=6.0,
    )
    return msgspec.to_builtins(msgspec.structs.replace(report, **changes)) | {"machine": MACHINE}


def bench(*more: Row, model: str = "a model") -> dict[str, Any]:
    chunk, long = (Case(model, "chunk", "280x168", 4, history) for history in (0, 1000))
    token = Case(model, "first token", history=1000, num_answers=1)
    report = BenchReport(MACHINE)
    report.ceilings[model] = Ceilings(flops_per_s=2e12, bytes_per_s=3e9)
    report.rows += [
        Row(chunk, ms=26.9, limit_ms=3.69, rate=148.7, unit="frames/s"),
        Row(long, ms=31.4, limit_ms=4.77, rate=127.4, unit="frames/s"),
        Row(token, ms=4.02, note="a question of 14 tokens"),
        Row(long, NAIVE, ms=62.8),
        Row(Case(model, "first token, whole video anew", history=1000), NAIVE, ms=202.0, note="32 frames"),
        *more,
    ]
    report.rooms.append(Room(model, "640x360, 4 frames", 1_660_000, 17_200_000, 12_600_000))
    report.kernels.append(Kernel(model, "a chunk", "aten::mm", 6.29, 57, 0.28))
    return report.document()


def verified(*checks: Check) -> dict[str, Any]:
    rows = [asdict(check) | {"passed": check.passed} for check in checks]
    return {"machine": MACHINE, "checks": rows, "passed": all(check.passed for check in checks)}


LOGITS = [Check("logits", "a model", f"case {i}", value, 1e-5) for i, value in enumerate((2.5e-6, 3.5e-6, 0.0))]
DOCUMENTS = {
    "qa": exam(asked(), asked(kind="last", text="blue", num_chunks=7)),
    "compared": exam(asked(), compares=True),
    "capacity": capacity(),
    "bench": bench(),
    "verify": verified(*LOGITS, Check("bytes", "a model", "1 token", 0.0, 0.0)),
}


@pytest.fixture(scope="module")
def pages() -> dict[str, PageReader]:
    return {name: read(document) for name, document in DOCUMENTS.items()}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_page_says_what_was_run(pages: dict[str, PageReader], name: str):
    text = pages[name].text
    assert all(words in text for words in ("onlooker x --y", "2026-01-02 03:04:05 UTC", "a model", "torch 2.99"))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_page_fetches_nothing_and_runs_nothing(pages: dict[str, PageReader], name: str):
    page = pages[name]
    assert page.addresses and all(address.startswith(("#", "data:")) for address in page.addresses)
    assert not {"script", "iframe", "object", "embed", "img"} & set(page.tags)
    assert "http" not in page.text


@pytest.mark.parametrize("name", DOCUMENTS)
def test_what_a_plot_refers_to_is_its_own(pages: dict[str, PageReader], name: str):
    page = pages[name]
    assert len(page.ids) == len(set(page.ids))
    assert {address[1:] for address in page.addresses if address.startswith("#")} <= set(page.ids)


@pytest.mark.parametrize(
    ("name", "plots"),
    [
        ("qa", [("right answers, %", "chunks in the memory", "native"), ("right answers, %", "last", "turns")]),
        ("compared", [("right answers, %", "frames a chunk"), ("MB of keys",), ("ms a frame",), ("ms a question",)]),
        ("capacity", [("memory, MB", "frames in the memory", "predicted"), ("frames a second", "of the video")]),
        ("bench", [("milliseconds", "history, tokens", "280x168, 4 frames, limit", "280x168, 4 frames, naive")]),
        ("verify", [("difference", "a model", "bound, 1e-05")]),
    ],
)
def test_plots_name_their_axes_their_units_and_their_lines(
    pages: dict[str, PageReader], name: str, plots: list[tuple[str, ...]]
):
    drawn = [" ".join(words) for words in pages[name].plot_words]
    assert len(drawn) == len(plots)
    assert all(word in words for words, wanted in zip(drawn, plots, strict=True) for word in wanted)


def test_an_exam_s_scores_are_all_there(pages: dict[str, PageReader]):
    page = pages["qa"]
    assert "All 1 checks held. 50.0% of the answers are right, 2 of 4" in page.text
    assert page.row("Right answers by kind", "first") == ["first", "100.0% 1/1", "100.0% 1/1", "100.0% 2/2"]
    assert page.row("Right answers by kind", "last") == ["last", "0.0% 0/1", "0.0% 0/1", "0.0% 0/2"]
    assert page.row("Right answers by kind", "all") == ["all", "50.0% 1/2", "50.0% 1/2", "50.0% 2/4"]
    assert page.row("Right answers by length of the memory", "5 to 8")[1:] == ["0.0% 0/1", "0.0% 0/1", "0.0% 0/2"]
    assert page.row("Checks", "held") == ["held", "no question left a trace", "4 of 4"]
    assert len(page.tables["Mistakes"]) == 1 + 2
    assert page.tables["Mistakes"][1][:4] == ["?", "red", "blue", "WRONG"]


def test_settings_stand_beside_each_other_also_where_a_time_is_unknown(pages: dict[str, PageReader]):
    title = "The same stories in every setting, frames a chunk"
    assert pages["compared"].row(title, "native", "4")[2:] == [
        *("100.0% 1/1", "40", "100", "200 B"),
        *("-", "2 ms", "10 ms"),
    ]
    assert pages["compared"].row(title, "turns", "8")[6] == "1 ms"


def test_choices_and_the_storm_are_there():
    page = read(exam(asked(options=("red", "blue"), scores=(-1.0, -2.0))))
    assert page.row("Choices, by the way to rank", "calibrated (asked)")[1] == "100.0% 1/1"
    assert page.row("Choices by place in the list", "1") == ["1", "1", "1", "p = 1"]
    assert "no place is preferred beyond chance" in page.text


def test_an_exam_that_failed_says_so_first():
    page = read(exam(asked(), held=False))
    assert "NOT held: no question left a trace. 100.0%" in page.text
    assert page.tables["Checks"][1][0] == "FAILED"


def test_a_capacity_run_shows_prediction_rounds_and_findings(pages: dict[str, PageReader]):
    page = pages["capacity"]
    assert "12 frames are remembered, 1.5 s of the video: then the memory was full" in page.text
    assert page.row("Predicted and measured", "frames") == ["frames", "12", "12"]
    assert page.row("Predicted and measured", "bytes of them") == ["bytes of them", "3.05 kB", "3.05 kB"]
    assert [row[:7] for row in page.tables["Rounds"][1:]] == [
        ["1", "4", "105", "1.05 kB", "2 s", "2", UNKNOWN],
        ["2", "8", "205", "2.05 kB", "2 s", "2", UNKNOWN],
        ["3", "12", "305", "3.05 kB", "2 s", "2", UNKNOWN],
    ]
    assert page.tables["Rounds"][1][8] == "12.5 ms"
    assert "An hour of this video takes" in page.text


@pytest.mark.parametrize(
    ("answered", "unchanged", "words"), [(False, False, "NOT answered"), (True, False, "CHANGED by a question")]
)
def test_a_node_that_fails_after_a_capacity_run_is_the_verdict(answered: bool, unchanged: bool, words: str):
    after = Aftermath(state="full", dropped={}, answered=answered, unchanged=unchanged, first_token_ms=None)
    page = page_of(plain(capacity(after=after)), "")
    assert page.verdict.held is False and words in page.verdict.text


def test_a_benchmark_s_rows_are_all_there(pages: dict[str, PageReader]):
    page = pages["bench"]
    assert page.row("Stages", "chunk", "280x168, 4 frames", "0")[3:8] == [
        "26.9 ms",
        "3.69 ms",
        "7.3x",
        "149 frames/s",
        UNKNOWN,
    ]
    assert page.row("Stages", "chunk", "280x168, 4 frames", "1000")[7:9] == ["62.8 ms", "2.0x"]
    assert page.row("Stages", "first token")[3] == "4.02 ms"
    assert page.row("Stages", "first token, whole video anew")[7:] == ["202 ms", UNKNOWN, "naive: 32 frames"]
    assert page.row("Device memory", "640x360, 4 frames")[1:5] == ["1.66 MB", "17.2 MB", "12.6 MB", UNKNOWN]
    assert page.row("Kernels of a chunk", "aten::mm") == ["aten::mm", "6.29 ms", "28%", "57"]
    assert "2 TFLOP/s" in page.text and "3 GB/s" in page.text


def test_a_part_that_failed_is_the_benchmark_s_verdict():
    page = page_of(bench(Row(Case("a model", "chunk", "1x1", 4), note="out of memory")), "")
    assert page.verdict.held is False and "out of memory" in page.verdict.text
    late = page_of(bench(Row(Case("a model", "chunk", "1x1", 4), note="left out: the time is over")), "")
    assert late.verdict.held is None


def test_every_check_is_on_the_page_and_the_worst_sums_them_up(pages: dict[str, PageReader]):
    page = pages["verify"]
    assert "All 4 checks hold" in page.text
    assert page.row("Promises", "logits") == ["logits", "a model", "3 of 3", "3.5e-06", "≤ 1e-05"]
    assert page.row("Promises", "bytes")[2:] == ["1 of 1", "0", "bit for bit"]
    assert [row[3] for row in page.tables["logits: all 3 held"][1:]] == ["2.5e-06", "3.5e-06", "0"]
    assert [row[3] for row in page.tables["bytes: all 1 held"][1:]] == ["0"]
    assert page.num_folded == 2


@pytest.mark.parametrize("value", [1.0, float("inf"), float("nan")])
def test_a_check_that_is_missed_stands_out(value: float):
    page = read(verified(*LOGITS, Check("logits", "a model", "the bad one", value, 1e-5)))
    assert "1 of 4 checks are missed" in page.text
    assert [row[2] for row in page.tables["Missed"][1:]] == ["the bad one"]
    assert page.row("Promises", "logits")[2] == "3 of 4"
    assert len(page.tables["logits: 1 of 4 missed"][1:]) == 4 and page.num_folded == 0


@pytest.mark.parametrize(
    "document",
    [
        exam(asked(wanted=HOSTILE, text=HOSTILE + "!"), model=HOSTILE),
        capacity(model=HOSTILE, video=HOSTILE, node=HOSTILE),
        bench(model=HOSTILE),
        verified(*(Check(HOSTILE, HOSTILE, HOSTILE, 1e-6 * i, 1e-5) for i in range(1, 4))),
    ],
    ids=["qa", "capacity", "bench", "verify"],
)
def test_names_and_answers_are_text_and_nothing_else(document: dict[str, Any]):
    document["machine"] = dict.fromkeys(("command", "date", "device"), HOSTILE)
    page = page_of(plain(document), "").html()
    read_page = PageReader(page)
    assert "script" not in read_page.tags
    assert read_page.tags.count("title") == 1
    assert "<script>alert(1)</script>\"'&amp; --> $x^ </title> https://example.org/x.js" in read_page.text
    assert "\u202e" not in page


def test_the_command_writes_the_page_beside_the_json(tmp_path: Path):
    (tmp_path / "run.json").write_text(json.dumps(DOCUMENTS["verify"]))
    ended = onlooker("report", tmp_path / "run.json")
    assert ended.status == 0 and "All 4 checks hold" in ended.out
    assert (tmp_path / "run.html").read_text().startswith("<!doctype html>")


def test_the_command_reads_what_another_one_prints(tmp_path: Path):
    ended = onlooker("report", "-", tmp_path / "x.html", input=json.dumps(DOCUMENTS["verify"]))
    assert ended.status == 0 and (tmp_path / "x.html").is_file()
    nameless = onlooker("report", "-", input="{}")
    assert nameless.status == 2 and "standard input has no name" in nameless.err


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("", "no JSON"),
        ("\x00", "no JSON"),
        ("[]", "no report of qa"),
        ("{}", "no report of qa"),
        ('{"checks": [{}]}', "it lacks something of a report"),
        ('{"ceilings": 3}', "it lacks something of a report"),
        ('{"showings": [], "comparison": [3]}', "it lacks something of a report"),
    ],
)
def test_what_is_no_report_is_refused_in_words(tmp_path: Path, text: str, mistake: str):
    (tmp_path / "run.json").write_text(text)
    ended = onlooker("report", tmp_path / "run.json")
    assert ended.status == 1 and mistake in ended.err
    assert not (tmp_path / "run.html").exists()


def test_a_file_that_is_not_there_is_said(tmp_path: Path):
    ended = onlooker("report", tmp_path / "none.json")
    assert ended.status == 1 and "No such file" in ended.err


def test_a_report_of_an_unknown_kind_names_its_file():
    with pytest.raises(ReportError, match=r"x\.json: no report"):
        page_of({"a": 1}, "x.json")
