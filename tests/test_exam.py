"""An exam holds with a node that keeps its promises, and says which promise another one broke."""

import io
import itertools
from typing import Any

import msgspec
import pytest
from oracle import running_oracle
from replies import asked
from rich.console import Console

from onlooker.protocol.messages import StageTimings
from onlooker.tools.exam import (
    Plan,
    Report,
    Storm,
    check_answers,
    check_bytes,
    check_growth,
    check_room,
    check_storm,
    check_traces,
)
from onlooker.tools.exam_tables import questions_table
from onlooker.tools.qa import examine_at
from onlooker.tools.scenario import EVERYTHING, Keeping, Setting, comparison, recall, rounds_scenario, stories_scenario
from onlooker.tools.score import Count, compare, score
from onlooker.tools.showing import Showing

ROUNDS = Plan("rounds", rounds_scenario(0, 2, Setting("native", 2)), min_accuracy=1.0)
STORIES = Plan("stories", stories_scenario(0, 2, [2, 4], 5, [Setting("native", 2), Setting("turns", 4)]))


def examined(plan: Plan, **settings: Any) -> Report:
    with running_oracle(plan.parts, **settings) as sockets:
        return examine_at(sockets, plan)


@pytest.fixture(scope="module")
def rounds() -> Report:
    return examined(ROUNDS)


def test_a_node_that_knows_everything_passes(rounds: Report):
    assert rounds.held, rounds.checks
    assert len(rounds.checks) == 4
    assert rounds.score.all == Count(6, 6)
    assert (rounds.model, rounds.device) == ("fake", "cpu")
    assert [asked.before.num_frames for asked in rounds.asked] == [2, 4, 6, 2, 4, 6]


def test_the_table_of_answers_breaks_no_word_on_80_columns():
    wordy = msgspec.structs.replace(
        asked(wanted="a triangle", text="a blue triangle", num_chunks=61),
        question="Which shape came second, after the square?",
    )
    console = Console(width=80, file=io.StringIO())
    console.print(questions_table("Questions and answers", [wordy]))
    shown = console.file.getvalue().split()  # type: ignore[attr-defined]
    assert {"triangle", "question", "second,", "square?", "1.22", "kB", "unchanged"} <= set(shown)


def test_a_node_that_knows_little_fails_by_its_answers_alone():
    report = examined(ROUNDS, spoil=lambda answer: answer.replace("circle", "square"))
    assert [check.promise for check in report.checks if not check.held] == ["every answer is right"]
    assert report.score.all == Count(4, 6)


def test_the_share_of_right_answers_that_is_asked_for_decides():
    assert check_answers(Count(9, 10), 0.9).held
    assert not check_answers(Count(8, 10), 0.9).held
    assert not check_answers(Count(0, 0), 0.9).held


def test_stories_are_scored_and_need_no_share_unless_one_is_asked_for():
    report = examined(STORIES, spoil=lambda answer: "nothing")
    assert report.held
    assert report.score.all.of == 10
    assert set(report.score.by_layout) == {"native", "turns"}
    assert report.comparison == [] and report.choices is None and report.storm is None


def test_a_storm_that_changes_nothing_holds():
    report = examined(Plan("stories", STORIES.parts, num_storm=3))
    assert report.storm is not None and report.held
    assert report.storm.num_questions == 3 * sum(showing.memory.num_chunks for showing in report.showings) > 0
    assert report.storm.same_answers == report.storm.same_memories == Count(10, 10)
    assert report.storm.score == report.score


def test_answers_that_change_when_there_is_a_storm_are_found():
    count = itertools.count()
    report = examined(Plan("rounds", ROUNDS.parts, num_storm=2), spoil=lambda answer: f"{answer} {next(count)}")
    assert [check.promise for check in report.checks if not check.held] == ["a storm of questions changes nothing"]


def test_a_comparison_has_a_row_for_each_setting():
    settings = [Setting("native", 1), Setting("native", 4)]
    report = examined(Plan("stories", comparison(0, 2, [4], 3, settings), compares=True))
    assert [(row.layout, row.chunk_frames) for row in report.comparison] == [("native", 1), ("native", 4)]
    assert all(row.right == Count(6, 6) and row.frames == 4 for row in report.comparison)
    assert all(row.encode_ms == 6.0 / row.chunk_frames for row in report.comparison)


def test_ways_to_keep_are_compared_by_age():
    window = Keeping("window", "window", share=0.25)
    settings = [Setting("native", 2, keeping) for keeping in (EVERYTHING, window)]
    report = examined(Plan("stories", recall(0, 2, [16], 3, settings), forgets=True))
    assert report.held, report.checks
    assert [row.keeping for row in report.recall] == [EVERYTHING, window]
    assert all(row.right == Count(6, 6) and sum(age.right.of for age in row.ages) == 6 for row in report.recall)
    smaller = msgspec.structs.replace(report.showings[1].memory, resident_bytes=1)
    cramped = msgspec.structs.replace(report.showings[1], memory=smaller)
    assert not check_room([cramped]).held
    assert not check_room([report.showings[1], cramped]).held


def test_choices_are_scored_where_they_were_asked_for():
    report = examined(Plan("rounds", ROUNDS.parts, with_choices=True))
    assert report.choices is not None
    assert [lean.right.of for lean in report.choices.leans] == [6, 6, 6]


def test_a_report_survives_json(rounds: Report):
    assert msgspec.json.decode(msgspec.json.encode(rounds), type=Report) == rounds


# The checks, on a showing that was tampered with


def tampered(report: Report, index: int, **changes: Any) -> list[Showing]:
    """The first showing, with the memory of one of its questions changed."""
    showing = report.showings[0]
    asked = list(showing.asked)
    before = msgspec.structs.replace(asked[index].before, **changes)
    asked[index] = msgspec.structs.replace(asked[index], before=before)
    return [msgspec.structs.replace(showing, asked=asked)]


def test_the_checks_hold_on_what_was_not_tampered_with(rounds: Report):
    assert (
        check_traces(rounds.showings).held and check_growth(rounds.showings).held and check_bytes(rounds.showings).held
    )


def test_a_memory_that_does_not_grow_is_found(rounds: Report):
    tokens = rounds.asked[0].before.num_tokens
    assert not check_growth(tampered(rounds, 1, num_tokens=tokens)).held


def test_bytes_that_are_not_those_of_the_tokens_are_found(rounds: Report):
    assert not check_bytes(tampered(rounds, 1, logical_bytes=rounds.asked[1].before.logical_bytes + 1)).held


def test_a_trace_is_found(rounds: Report):
    assert not check_traces(tampered(rounds, 2, positions_used=0)).held


@pytest.mark.parametrize("changes", [{"num_traces": 1}, {"same_answers": Count(1, 2)}, {"same_memories": Count(1, 2)}])
def test_whatever_a_storm_changes_is_found(changes: dict[str, Any]):
    facts: dict[str, Any] = {"num_traces": 0, "same_answers": Count(2, 2), "same_memories": Count(2, 2)}
    assert check_storm(Storm(num_questions=9, score=score([]), **facts)).held
    assert not check_storm(Storm(num_questions=9, score=score([]), **facts | changes)).held


def test_stages_that_a_node_does_not_tell_are_not_invented(rounds: Report):
    silent = msgspec.structs.replace(rounds.showings[0], stages=StageTimings())
    (row,) = compare([silent])
    assert row.encode_ms != row.encode_ms
