import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from onlooker.tools.scene_questions import KINDS, Quiz, ask_about, ask_back, corpus, is_right, place_of, three_rounds
from onlooker.tools.scene_wordings import WORDINGS
from onlooker.tools.story import COLOURS, SHAPES, Story, Thing, make_plain_story, make_story


def times_until(end_s: float, fps: float = 2.0) -> np.ndarray:
    return np.arange(0, end_s, 1 / fps)


def quizzes(kind: str, num: int = 150, **choices) -> list[tuple[Story, np.ndarray, Quiz]]:
    """Questions of a kind about streams of all lengths."""
    rng = np.random.default_rng(1)
    asked = []
    for seed in range(num):
        story = make_story(seed, num_things=seed % 7, pairs=0.25, min_show_s=1.0)
        times_s = times_until(rng.uniform(0.5, 24))
        if quiz := ask_about(story, times_s, rng, kind=kind, **choices):
            asked.append((story, times_s, quiz))
    return asked


def answer(story: Story, times_s, kind: str, seed: int = 0) -> str | None:
    """Ask until the kind gives a question, for it may sit out at random."""
    rng = np.random.default_rng(seed)
    for _ in range(40):
        if quiz := ask_about(story, times_s, rng, kind=kind):
            return quiz.answer
    return None


def with_things(*shown: tuple[str, float, float], **changes) -> Story:
    """A story of named things from one time to another, all in the middle of the frame."""
    story = make_plain_story(0, [name for name, _, _ in shown])
    still = {"x0": 0.5, "y0": 0.5, "x1": 0.5, "y1": 0.5} | changes
    things = tuple(
        replace(thing, start_s=start_s, end_s=end_s, **still)
        for thing, (_, start_s, end_s) in zip(story.things, shown, strict=True)
    )
    return replace(story, things=things, duration_s=30.0)


def seen_in(story: Story, times_s: np.ndarray) -> list[Thing]:
    return [thing for thing in story.things if any(thing.is_visible(time_s) for time_s in times_s)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_up_and_has_its_answer_among_the_options_once(kind):
    asked = quizzes(kind)
    assert len(asked) >= 15
    for _, _, quiz in asked:
        assert quiz.kind == kind
        assert sum(is_right(quiz, option) for option in quiz.options) == 1
        assert quiz.options.count(quiz.answer) == 1
        assert len(quiz.options) == (2 if kind in ("seen_x", "visible_x") else 4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_right_option_has_no_favourite_place(kind):
    places = Counter(quiz.options.index(quiz.answer) for _, _, quiz in quizzes(kind, 400))
    num_options = 2 if kind in ("seen_x", "visible_x") else 4
    assert min(places[i] for i in range(num_options)) > 0.5 * places.total() / num_options


def test_without_a_kind_all_kinds_are_asked():
    rng = np.random.default_rng(2)
    stories = [make_story(seed, num_things=seed % 6) for seed in range(60)]
    quizzes = [ask_about(story, times_until(rng.uniform(1, 24)), rng) for story in stories for _ in range(15)]
    asked = Counter(quiz.kind for quiz in quizzes if quiz)
    assert set(asked) == set(KINDS) and min(asked.values()) > 0.02 * len(quizzes)


def test_the_same_generator_asks_the_same():
    story, times_s = make_story(1), times_until(10)
    assert ask_about(story, times_s, np.random.default_rng(3)) == ask_about(story, times_s, np.random.default_rng(3))


@pytest.mark.parametrize("kind", ["seen_x", "visible_x"])
def test_yes_and_no_are_right_equally_often(kind):
    answers = Counter(quiz.answer for _, _, quiz in quizzes(kind, 800))
    assert 0.4 < answers["yes"] / answers.total() < 0.6


def test_yes_and_no_are_true():
    for kind in ("seen_x", "visible_x"):
        for story, times_s, quiz in quizzes(kind, 300):
            shown = seen_in(story, times_s if kind == "seen_x" else times_s[-1:])
            words = set(re.findall(r"\w+", quiz.question))
            wanted = words & {*COLOURS, *SHAPES}
            assert (quiz.answer == "yes") == any(wanted <= {t.colour, t.shape} for t in shown)


def test_no_is_often_a_near_miss():
    near = total = 0
    for story, times_s, quiz in quizzes("seen_x", 300):
        words = set(re.findall(r"\w+", quiz.question)) & {*COLOURS, *SHAPES}
        if quiz.answer == "no" and len(words) == 2:
            total += 1
            near += any(words & {t.colour, t.shape} for t in seen_in(story, times_s))
    assert near > 0.6 * total > 30


def test_colour_and_shape_are_those_of_the_only_thing_in_view():
    for kind, field in (("colour_now", "colour"), ("shape_now", "shape")):
        for story, times_s, quiz in quizzes(kind):
            (thing,) = seen_in(story, times_s[-1:])
            assert quiz.answer == getattr(thing, field)


def test_two_in_view_are_named_from_left_to_right():
    story = with_things(("red circle", 0, 9), ("orange star", 1, 9))
    right, left = (replace(thing, x0=x, x1=x) for thing, x in zip(story.things, (0.75, 0.25), strict=True))
    story = replace(story, things=(right, left))
    assert answer(story, times_until(5), "what_now") == "an orange star and a red circle"
    assert answer(story, times_until(5), "colour_now") is None
    assert answer(story, times_until(0.9), "what_now") == "a red circle"


def test_a_frame_with_nothing_in_it_shows_nothing():
    story = with_things(("red circle", 1, 2))
    assert answer(story, times_until(6), "what_now") == "nothing"
    assert answer(story, times_until(6), "nothing") is None
    assert answer(story, times_until(0.9), "nothing") == "nothing yet"
    assert answer(story, times_until(0.9), "how_many") == "0"
    assert answer(story, times_until(0.9), "first") is None


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ((0.25, 0.5), "left"),
        ((0.8, 0.55), "right"),
        ((0.5, 0.2), "top"),
        ((0.45, 0.75), "bottom"),
        ((0.52, 0.47), "middle"),
        ((0.25, 0.3), None),
        ((0.4, 0.5), None),
    ],
)
def test_a_place_has_a_name_only_where_nobody_would_argue(place, name):
    assert place_of(*place) == name


def test_order_is_that_of_the_frames_shown():
    story = with_things(("red circle", 0, 1), ("blue square", 2, 3), ("green star", 3, 4))
    assert answer(story, times_until(9), "first") == "a red circle"
    assert answer(story, times_until(9), "last") == "a green star"
    assert answer(story, times_until(9), "all_in_order") == "a red circle, a blue square, a green star"
    assert answer(story, times_until(2.9), "all_in_order") == "a red circle, a blue square"
    assert answer(story, [1.5, 2.5], "first") == "a blue square"
    assert answer(story, times_until(9), "how_many") == "3"


def test_after_and_before_name_the_neighbour_or_nothing():
    order = ["red circle", "blue square", "green star"]
    story = with_things(*((name, float(i), i + 1.0) for i, name in enumerate(order)))
    rng = np.random.default_rng(0)
    for kind, step, end in (("after_x", 1, "nothing yet"), ("before_x", -1, "nothing")):
        found = {}
        for _ in range(60):
            if quiz := ask_about(story, times_until(5), rng, kind=kind):
                (x,) = (i for i, name in enumerate(order) if name in quiz.question)
                found[x] = quiz.answer
        beside = {i: f"a {order[i + step]}" if 0 <= i + step < 3 else end for i in range(3)}
        assert found == beside


def test_what_began_together_is_not_put_in_order():
    story = with_things(("red circle", 0, 5), ("blue square", 0.1, 5))
    assert all(answer(story, [0.3, 1.0], kind) is None for kind in ("first", "last", "all_in_order", "after_x"))
    assert answer(story, [0.0, 1.0], "first") == "a red circle"


def test_the_last_to_come_is_not_asked_for_while_an_earlier_one_outlasts_it():
    story = with_things(("red circle", 0, 9), ("blue square", 1, 2))
    assert answer(story, times_until(1.9), "last") == "a blue square"
    assert answer(story, times_until(4), "last") is None


def test_what_came_twice_is_listed_once_and_is_no_landmark():
    story = with_things(("red circle", 0, 1), ("blue square", 1, 2), ("red circle", 2, 3))
    assert answer(story, times_until(9), "all_in_order") == "a red circle, a blue square"
    assert answer(story, times_until(9), "how_many") == "2"
    assert answer(story, times_until(9), "last") == "a red circle"
    rng = np.random.default_rng(0)
    for kind in ("after_x", "before_x", "when_x"):
        for _ in range(20):
            quiz = ask_about(story, times_until(9), rng, kind=kind)
            assert quiz is not None and "blue square" in quiz.question


def test_seconds_count_from_the_first_frame():
    story = with_things(("red circle", 14.0, 20))
    assert answer(story, times_until(20), "when_x") == "at 14 seconds"
    assert answer(story, 10 + times_until(8), "when_x") == "at 4 seconds"
    assert answer(story, [13.0, 14.0], "when_x") == "at 1 second"
    assert answer(story, [14.01 - 3, 14.0], "when_x") == "at 3 seconds"  # a few milliseconds early
    assert ask_about(story, times_until(20), np.random.default_rng(0), kind="when_x", clock=False) is None


@pytest.mark.parametrize(
    ("ends", "motion"),
    [
        ({"x0": 0.2, "x1": 0.8}, "moving right"),
        ({"x0": 0.8, "x1": 0.2}, "moving left"),
        ({"y0": 0.2, "y1": 0.8}, "moving down"),
        ({"y0": 0.8, "y1": 0.2}, "moving up"),
        ({}, "still"),
    ],
)
def test_motion_is_what_the_frames_show(ends, motion):
    story = with_things(("red circle", 1, 5), **ends)
    assert answer(story, times_until(4), "motion_now") == motion
    assert answer(story, [0.0, 2.0], "motion_now") is None  # one frame shows no motion
    assert answer(story, times_until(8), "motion_now") is None


def test_the_colour_of_a_shape_is_asked_only_where_it_had_one():
    story = with_things(("red star", 0, 1), ("blue star", 1, 2), ("green cross", 2, 3))
    rng = np.random.default_rng(0)
    for _ in range(20):
        quiz = ask_about(story, times_until(5), rng, kind="colour_of_shape")
        assert quiz is not None and (quiz.answer, "cross" in quiz.question) == ("green", True)
    assert answer(story, times_until(0.9), "colour_of_shape") == "red"


def test_without_a_frame_there_is_nothing_to_ask():
    with pytest.raises(ValueError, match="no frame"):
        ask_about(make_story(0), [], np.random.default_rng(0))


def test_every_kind_has_enough_wordings_and_the_held_out_ones_are_new():
    assert {form.removesuffix(" of x") for form in WORDINGS} == set(KINDS) - {"nothing"}
    for train, test in WORDINGS.values():
        assert len(set(train)) >= 6 and len(set(test)) >= 2
        assert not set(train) & set(test)


def test_no_wording_asks_for_two_things():
    texts = [text for wording in WORDINGS.values() for text in (*wording.train, *wording.test)]
    assert len(texts) == len(set(texts))


def test_held_out_wordings_use_only_words_that_are_trained():
    def words(which: int) -> set[str]:
        return {
            word for wording in WORDINGS.values() for text in wording[which] for word in re.findall(r"[\w{}]+", text)
        }

    assert words(1) <= words(0)


def test_held_out_wordings_are_asked_when_wanted():
    for _, _, quiz in quizzes("when_x", 40, phrasings="test"):
        patterns = [re.escape(text).replace(r"\{x\}", r"\w+ \w+") for text in WORDINGS["when_x"].test]
        assert any(re.fullmatch(pattern, quiz.question) for pattern in patterns)


def test_the_corpus_has_every_word_that_is_asked_or_answered():
    known = {word for text in corpus() for word in re.findall(r"\w+", text)}
    for kind in KINDS:
        for _, _, quiz in quizzes(kind, 60):
            assert set(re.findall(r"\w+", f"{quiz.question} {quiz.answer}")) <= known
    assert corpus() == corpus()


@pytest.mark.parametrize("text", ["a red circle", "Red circle.", " the  red circle", "A RED CIRCLE"])
def test_case_spaces_articles_and_a_full_stop_do_not_count(text):
    assert is_right(Quiz("first", "", "a red circle", ()), text)


@pytest.mark.parametrize("text", ["", "red", "a red circle, a blue square", "a red star", "not a red circle"])
def test_anything_else_is_wrong(text):
    assert not is_right(Quiz("first", "", "a red circle", ()), text)


def test_order_counts_in_a_list_but_not_among_two_in_view():
    assert is_right(Quiz("what_now", "", "a red star and a blue star", ()), "a blue star and a red star")
    assert not is_right(Quiz("what_now", "", "a red star and a blue star", ()), "a blue star and a red star and")
    assert not is_right(Quiz("all_in_order", "", "a red star, a blue star", ()), "a blue star, a red star")


def test_three_rounds_ask_for_colour_all_and_last():
    for seed in range(5):
        rounds = list(three_rounds(seed))
        assert [r.quiz.answer for r in rounds] == ["red", "a red circle, a blue square", "a green triangle"]
        assert [r.times_s for r in rounds] == [(0, 0.5), (1, 1.5), (2, 2.5)]
        assert all(r.story == rounds[0].story and r.quiz.answer in r.quiz.options for r in rounds)
        shown = [[t.name for t in r.story.things if t.is_visible(r.times_s[1])] for r in rounds]
        assert shown == [["red circle"], ["blue square"], ["green triangle"]]
    assert next(three_rounds(0)).story != next(three_rounds(1)).story


@pytest.mark.parametrize("text", ["at 6 seconds", "at 7 seconds", "At 8 seconds.", " at 7 second "])
def test_a_time_may_be_a_second_off(text: str):
    assert is_right(Quiz("when_x", "", "at 7 seconds", ()), text)


@pytest.mark.parametrize("text", ["at 5 seconds", "at 9 seconds", "at seven seconds", "7", "at -7 seconds", "at 7"])
def test_a_time_farther_off_or_in_other_words_is_wrong(text: str):
    assert not is_right(Quiz("when_x", "", "at 7 seconds", ()), text)


def test_there_are_always_enough_wrong_seconds():
    # 1, 4 and 7 would leave none of 0 to 8 that is not right beside one of them.
    story = with_things(("red circle", 1.0, 2.0), ("blue square", 4.0, 5.0))
    for seed in range(300):
        quiz = ask_about(story, np.arange(0, 8, 0.5), np.random.default_rng(seed), kind="when_x")
        assert quiz is not None
        assert len(quiz.options) == 4


def test_colours_are_asked_for_with_how_long_ago_the_thing_was_seen():
    things = (
        ("red circle", 0, 2),
        ("blue square", 3, 4),
        ("red circle", 5, 6),
        ("green square", 7, 8),
        ("red star", 8, 20),
    )
    known = ask_back(with_things(*things), times_until(10), np.random.default_rng(0))
    assert [(each.quiz.answer, each.num_frames_ago) for each in known] == [("red", 8), ("red", 0)]
    assert ["circle" in known[0].quiz.question, "star" in known[1].quiz.question] == [True, True]
    assert ask_back(with_things(*things), times_until(0.5), np.random.default_rng(0))[0].num_frames_ago == 0
