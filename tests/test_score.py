"""Counts are counts, and a lean is found where there is one and only there."""

import math

import numpy as np
import pytest
from replies import asked, showing

from onlooker.tools.scenario import EVERYTHING, Keeping
from onlooker.tools.score import (
    AgeScore,
    Count,
    Lean,
    compare,
    score,
    score_choices,
    score_recall,
    sign_test,
    surprise,
)
from onlooker.tools.showing import Asked


def test_right_answers_are_counted_by_kind_layout_and_length():
    native = showing(asked(kind="first"), asked(kind="last", text="blue", num_chunks=3))
    turns = showing(asked(kind="first", num_chunks=4), layout="turns")
    counted = score([native, turns])
    assert counted.all == Count(2, 3)
    assert counted.by_layout == {"native": Count(1, 2), "turns": Count(1, 1)}
    assert {row.kind: row.all for row in counted.kinds} == {"first": Count(2, 2), "last": Count(0, 1)}
    assert [(row.first, row.last, row.all) for row in counted.lengths] == [(1, 1, Count(1, 1)), (3, 4, Count(1, 2))]


@pytest.mark.parametrize(
    ("num_chunks", "bucket"), [(1, (1, 1)), (9, (9, 12)), (48, (33, 48)), (49, (49, 96)), (400, (385, 768))]
)
def test_every_length_has_its_bucket(num_chunks: int, bucket: tuple[int, int]):
    (row,) = score([showing(asked(num_chunks=num_chunks))]).lengths
    assert (row.first, row.last) == bucket


def test_of_nothing_there_is_no_share():
    assert math.isnan(Count(0, 0).share)
    assert score([]).all == Count(0, 0)
    assert str(Count(0, 0)) == "0 of 0"
    assert str(Count(1, 8)) == "1 of 8 (12.5%)"


def test_settings_are_compared_by_their_means():
    long, short = showing(asked(), num_chunks=6), showing(asked(text="blue"), num_chunks=4)
    other = showing(asked(), chunk_frames=8)
    first, second = compare([long, short, other])
    assert (first.chunk_frames, first.right, first.frames, first.tokens) == (4, Count(1, 2), 20, 50)
    assert (first.encode_ms, first.first_token_ms, first.answer_ms) == (2.0, 2, 10)
    assert (second.chunk_frames, second.encode_ms) == (8, 1.0)


def test_what_is_still_known_is_counted_by_way_to_keep_and_age():
    thin = Keeping("thin", "thin", share=0.25)
    first = [asked(age=0), asked(age=40), asked(age=47, text="blue")]
    second = [asked(age=3), asked(age=34), asked()]  # one that is not about the past
    whole, other, left = score_recall(
        [
            showing(*first),
            showing(*first, keeping=thin, num_chunks=2, num_gated=10),
            showing(*first, layout="turns"),
            showing(*second),
            showing(*second, keeping=thin, num_chunks=4),
        ]
    )
    assert [(row.layout, row.keeping) for row in (whole, other, left)] == [
        ("native", EVERYTHING),
        ("native", thin),
        ("turns", EVERYTHING),
    ]
    ages = [AgeScore(0, 0, Count(1, 1)), AgeScore(1, 4, Count(1, 1)), AgeScore(33, 48, Count(2, 3))]
    assert whole.ages == other.ages == ages
    assert whole.right == Count(4, 5)
    assert (other.logical_bytes, other.gated_frames) == (60, 5)


# Choices


OPTIONS = ("red", "a red circle", "a red circle and a blue square", "nothing at all")


def chosen(pick: int, wanted: int, text: str = "red") -> Asked:
    """A choice among options of 1, 3, 7 and 3 words."""
    return asked(wanted=OPTIONS[wanted], text=text, options=OPTIONS, scores=np.eye(4)[pick].tolist())


def lean_of(questions: list[Asked]) -> Lean:
    scored = score_choices(questions)
    assert scored is not None
    return scored.leans[0]


def test_without_choices_there_is_no_score_of_them():
    assert score_choices([asked()]) is None


def test_right_choices_and_those_that_agree_are_counted():
    lean = lean_of([chosen(0, 0), chosen(0, 1), chosen(1, 1, text="A red circle.")])
    assert (lean.right, lean.agreeing) == (Count(2, 3), Count(3, 3))


def test_wrong_choices_that_are_always_the_shortest_lean():
    lean = lean_of([chosen(0, 1) for _ in range(20)])
    assert (lean.num_shorter, lean.num_longer) == (20, 0)
    assert lean.shorter_expected == pytest.approx(20 / 3)
    assert lean.statement == "leans to shorter options"


def test_wrong_choices_that_are_always_the_longest_lean():
    assert lean_of([chosen(2, 1) for _ in range(20)]).statement == "leans to longer options"


def test_wrong_choices_made_blindly_do_not_lean():
    picks = [(pick, wanted) for pick in range(4) for wanted in range(4) if pick != wanted]
    assert lean_of([chosen(*pair) for pair in picks * 4]).statement == "no lean beyond chance"


def test_few_wrong_choices_say_nothing():
    assert lean_of([chosen(0, 1)] * 9 + [chosen(1, 1)] * 50).statement == "9 wrong: too few to tell"


def test_a_place_that_is_chosen_whatever_is_right_is_found():
    partial = score_choices([chosen(0, wanted) for wanted in range(4)] * 8)
    assert partial is not None and not partial.is_place_neutral
    assert [(place.chosen, place.right) for place in partial.places] == [(32, 8), (0, 8), (0, 8), (0, 8)]


def test_places_of_right_choices_are_neutral_however_uneven():
    neutral = score_choices([chosen(1, 1)] * 30)
    assert neutral is not None and neutral.is_place_neutral


@pytest.mark.parametrize(("a", "b", "p"), [(0, 0, 1.0), (3, 3, 1.0), (5, 0, 0.0625), (0, 10, 2 / 1024)])
def test_the_sign_test_is_exact(a: int, b: int, p: float):
    assert sign_test(a, b) == pytest.approx(p)


def test_what_was_expected_is_no_surprise():
    assert surprise(50, [0.5] * 100) == 1.0
    assert surprise(60, [0.5] * 100) == pytest.approx(0.0455, abs=1e-3)
    assert surprise(3, [1.0] * 3) == surprise(0, []) == 1.0
