from pathlib import Path
from typing import Any

import msgspec
import pytest
from clips import write_clip
from commands import onlooker
from fakes import FakeEngine
from nodes import running_node
from records import node_stats, stream_stats

from onlooker.protocol.messages import Answer, AnswerTiming, FrameCounters, Provenance, QuestionCounters
from onlooker.tools import demo
from onlooker.tools.demo import (
    ABOUT_THE_CLIP,
    Asked,
    check_bytes,
    check_end,
    check_frames,
    check_telemetry,
    check_traces,
)
from onlooker.tools.node_process import NodeProcessError
from onlooker.tools.node_process import running_node as running_process
from onlooker.tools.playback import Played
from onlooker.tools.video import read_video
from onlooker.tools.watch import View


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> demo.Report:
    clip = write_clip(tmp_path_factory.mktemp("demo") / "clip.mp4", 10)
    with FakeEngine() as engine, running_node(engine, streams=[{"name": "demo"}], telemetry__period_s=0.1) as node:
        return demo.play_and_ask(clip, ABOUT_THE_CLIP, node.endpoints)


def test_everything_holds_with_a_node_that_keeps_its_promises(report: demo.Report) -> None:
    failed = [(check.promise, check.figures) for check in report.checks if not check.held]
    # The words of a fake engine are no answers.
    assert [promise for promise, _ in failed] == ["the answers are right"], failed
    assert report.stream.frames.encoded == report.played.sent == 10


def test_its_questions_are_asked_the_first_before_all_is_seen(report: demo.Report) -> None:
    assert [each.question for each in report.asked] == [question.text for question in ABOUT_THE_CLIP]
    assert report.asked[0].reply.memory.num_frames < report.asked[1].reply.memory.num_frames == 10
    assert report.asked[2].answer in report.asked[2].options


def test_the_clip_shows_each_thing_for_a_while(tmp_path: Path) -> None:
    frames = list(read_video(str(demo.make_clip(tmp_path / "shapes.mp4"))))
    assert len(frames) == len(demo.THINGS) * demo.SHOW_S * demo.CLIP_FPS


def asked(unchanged: bool = True, answer: str = "red") -> Asked:
    memory = Provenance(
        num_tokens=8,
        num_frames=2,
        from_ns=0,
        until_ns=1,
        until_seq=1,
        ts_kind="media",
        fingerprint_before="a",
        fingerprint_after="a" if unchanged else "b",
        unchanged=unchanged,
    )
    timing = AnswerTiming(queue_ms=0, prefill_ms=0, first_token_ms=1, decode_ms=0, total_ms=1)
    reply = Answer(text="x", finish="stop", num_prompt_tokens=1, num_answer_tokens=1, memory=memory, timing=timing)
    return Asked(question="?", options=(), wanted="red", answer=answer, while_playing=False, reply=reply)


def counters(**changes: Any) -> FrameCounters:
    facts: dict[str, Any] = {"received": 12, "kept": 11, "encoded": 10, "pending": 0, "padded": 0, "gaps": 0}
    facts["dropped"] = {"sampled_out": 1, "memory_full": 1}
    return FrameCounters(**facts | changes)


PLAYED = Played(
    stream="gate",
    source="x.mp4",
    sent=12,
    sent_bytes=1,
    loops=1,
    seconds=1,
    fps=1,
    max_lag_ms=0,
    broken=0,
    node=None,
)


@pytest.mark.parametrize(
    ("changes", "held"),
    [({}, True), ({"received": 11}, False), ({"encoded": 9}, False), ({"encoded": 9, "pending": 1}, False)],
    ids=["all", "one never came", "one is unaccounted for", "one is pending"],
)
def test_a_frame_that_is_unaccounted_for_fails_the_demo(changes: dict[str, Any], held: bool) -> None:
    assert check_frames(PLAYED, stream_stats(frames=counters(**changes))).held is held


@pytest.mark.parametrize(("logical_bytes", "held"), [(16_000, True), (16_001, False), (0, False)])
def test_bytes_that_are_not_those_of_the_tokens_fail_the_demo(logical_bytes: int, held: bool) -> None:
    stats = stream_stats()
    cache = msgspec.structs.replace(stats.cache, logical_bytes=logical_bytes)
    assert check_bytes(msgspec.structs.replace(stats, cache=cache)).held is held


def test_what_is_right_depends_on_what_was_seen() -> None:
    *truths, when = [question.truth for question in ABOUT_THE_CLIP]
    answers = [[truth(demo.things_seen(num)) for truth in truths if truth] for num in (4, 8, 9, 24)]
    assert answers[0] == answers[1] == ["red", "a red circle", "a red circle"]
    assert answers[2] == ["blue", "a red circle, a blue square", "a blue square"]
    assert answers[3] == ["green", "a red circle, a blue square, a green triangle", "a green triangle"]
    assert when is not None and when(demo.things_seen(24)) == "at 2 seconds"


def test_a_wrong_answer_fails_the_demo() -> None:
    assert demo.check_answers([asked(), asked()]).held
    wrong = demo.check_answers([asked(), asked(answer="blue")])
    assert not wrong.held and "not 'blue' but 'red'" in wrong.figures


def test_a_memory_that_changed_fails_the_demo() -> None:
    view = View("")
    view.take(node_stats(), 0.0)
    assert check_traces([asked(True), asked(True)], view).held
    assert not check_traces([asked(True), asked(False)], view).held


def test_a_trace_that_only_telemetry_counts_fails_the_demo() -> None:
    view = View("")
    questions = QuestionCounters(received=1, answered=1, failed={}, waiting=0, running=0, traces=1)
    view.take(node_stats(questions=questions), 0.0)
    assert not check_traces([asked(True)], view).held


def test_telemetry_that_says_otherwise_or_nothing_fails_the_demo() -> None:
    view = View("")
    assert not check_telemetry(stream_stats(), view).held
    view.take(stream_stats(), 0.0)
    assert check_telemetry(stream_stats(), view).held
    assert not check_telemetry(stream_stats(frames=counters()), view).held


def test_the_clip_is_kept_only_where_it_can_be(tmp_path: Path) -> None:
    nowhere = onlooker("demo", "--save", tmp_path / "none" / "clip.mp4")
    assert nowhere.status == 2 and "there is no folder" in nowhere.err
    other = onlooker("demo", "--save", tmp_path / "clip.mp4", "--video", tmp_path / "mine.mp4")
    assert other.status in (1, 2) and not list(tmp_path.iterdir())


def test_a_video_that_cannot_be_read_is_refused_before_a_node_is_started(tmp_path: Path) -> None:
    ended = onlooker("demo", "--video", tmp_path / "none.mp4")
    assert ended.status == 1
    assert "no such file" in ended.err


def test_a_node_that_cannot_start_is_an_error_with_its_log(tmp_path: Path) -> None:
    with (
        pytest.raises(NodeProcessError, match="chunk_frames"),
        running_process(["--set", "stream_defaults.chunk_frames=3"], tmp_path / "node.log"),
    ):
        raise AssertionError("it must not start")


@pytest.mark.parametrize(("end_s", "status", "held"), [(0.1, 0, True), (0.1, 1, False), (None, None, False)])
def test_a_node_that_does_not_end_well_fails_the_demo(end_s: float | None, status: int | None, held: bool) -> None:
    assert check_end(end_s, status).held is held
