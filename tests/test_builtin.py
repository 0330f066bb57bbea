"""The built-in model sees: asked over real sockets, with the node as it is shipped."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from nodes import running_node

from onlooker.node.engine import load_engine
from onlooker.node.layout import LAYOUTS, LayoutState, NativeLayout, Patches, Span
from onlooker.node.model import VisionLanguageModel, load_model
from onlooker.node.native_answers import QUESTIONS, draw_shapes, native_answers, stream_answers
from onlooker.node.reference import Film
from onlooker.tools.exam import Plan, Report
from onlooker.tools.qa import Sockets, examine_at
from onlooker.tools.scenario import Part, Query, Setting, rounds_scenario, stories_scenario
from onlooker.tools.scene_questions import ask_about

SETTINGS = (Setting("native", 4), Setting("turns", 4))


@pytest.fixture(scope="module")
def sockets() -> Iterator[Sockets]:
    engine = load_engine(device="cpu")
    with running_node(engine) as node:
        yield Sockets(*(node.endpoints[name] for name in Sockets._fields))
    engine.close()


def mistakes(report: Report) -> list[tuple[str, str, str]]:
    return [(each.question, each.wanted, each.answer.text) for each in report.asked if not each.right]


@pytest.mark.parametrize("setting", [Setting("native", 2), Setting("turns", 2), Setting("native", 1)], ids=str)
def test_the_three_rounds_are_answered_rightly(sockets: Sockets, setting: Setting):
    report = examine_at(sockets, Plan("rounds", rounds_scenario(0, 2, setting), min_accuracy=1.0))
    assert report.held, mistakes(report)


def test_stories_are_answered_rightly_and_a_storm_of_questions_changes_nothing(sockets: Sockets):
    plan = Plan("stories", stories_scenario(1, 6, [1, 3, 6], 8, SETTINGS), min_accuracy=0.9, num_storm=2)
    report = examine_at(sockets, plan)
    assert report.held, (report.checks, mistakes(report))


def at_the_end(part: Part, kind: str, num_questions: int) -> Part:
    """The same frames, and after the last of them questions of one kind, as many as this story has something for."""
    script, rng = part.script, np.random.default_rng(part.script.seed)
    drawn = [ask_about(script.story, script.times_s, rng, kind=kind, phrasings="test") for _ in range(num_questions)]
    queries = tuple(Query(script.num_frames, quiz) for quiz in drawn if quiz)
    return part._replace(script=replace(script, queries=queries))


@pytest.mark.parametrize("kind", ["seen_x", "visible_x"])
def test_yes_and_no_are_said_rightly(sockets: Sockets, kind: str):
    parts = [at_the_end(part, kind, 8) for part in stories_scenario(2, 4, [2, 6], 1, SETTINGS)]
    report = examine_at(sockets, Plan("stories", parts, min_accuracy=0.9))
    assert {each.wanted for each in report.asked} == {"yes", "no"}
    assert report.held, (report.checks, mistakes(report))


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    return load_model("builtin", dtype="float32", device="cpu")


def film(model: VisionLanguageModel) -> Film:
    return Film(draw_shapes(model, 24, seed=0), (4, 4), "native", 4)


def test_its_answers_from_memory_are_those_of_transformers(model: VisionLanguageModel):
    assert stream_answers(model, film(model), QUESTIONS) == native_answers(model, film(model), QUESTIONS)


class LateLayout(NativeLayout):
    """Every chunk but the first far too late."""

    def extend(self, state: LayoutState, patches: Patches) -> tuple[Span, LayoutState]:
        span, after = super().extend(state, patches)
        return replace(span, positions=span.positions + (0 if state.is_empty else 40)), after


def test_positions_that_are_wrong_change_its_words(model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(LAYOUTS, "native", LateLayout)
    assert stream_answers(model, film(model), QUESTIONS) != native_answers(model, film(model), QUESTIONS)
