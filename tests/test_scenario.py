"""Scripts are the same for a seed, held out from training, and fair to every kind of question."""

from collections import Counter

import numpy as np
import pytest

from onlooker.tools.scenario import (
    KEEPINGS,
    LAYOUTS,
    Part,
    Setting,
    age_span,
    comparison,
    recall,
    rounds_scenario,
    stories_scenario,
)
from onlooker.tools.scene_questions import KINDS, ask_about
from onlooker.tools.story import SHAPES

SETTINGS = [Setting(layout, 4) for layout in LAYOUTS]


def stories(num: int = 60, seed: int = 0, lengths: tuple[int, ...] = (1, 6, 24)) -> list[Part]:
    return stories_scenario(seed, num, lengths, 8, SETTINGS)


def test_a_seed_is_a_scenario():
    assert stories(4) == stories(4)
    assert stories(4) != stories(4, seed=1)
    assert rounds_scenario(3, 2, Setting("native", 2)) == rounds_scenario(3, 2, Setting("native", 2))


def test_the_rounds_are_two_frames_and_a_question_three_times():
    first, second = rounds_scenario(5, 2, Setting("native", 2))
    assert [query.num_frames for query in first.script.queries] == [2, 4, 6]
    assert [query.quiz.answer for query in first.script.queries] == [
        "red",
        "a red circle, a blue square",
        "a green triangle",
    ]
    assert first.script.times_s == (0, 0.5, 1, 1.5, 2, 2.5)
    assert (first.script.seed, second.script.seed) == (5, 6)


def test_a_round_cannot_be_encoded_in_chunks_longer_than_it():
    with pytest.raises(ValueError, match="2 frames"):
        rounds_scenario(0, 1, Setting("native", 4))


def test_questions_are_asked_where_a_chunk_ends():
    for script, setting in stories():
        moments = [query.num_frames for query in script.queries]
        assert moments == sorted(moments)
        assert all(0 < moment <= script.num_frames for moment in moments)
        assert all(moment % setting.chunk_frames == 0 for moment in moments)


def test_lengths_and_layouts_take_turns():
    shown = [(part.setting.layout, part.script.num_frames) for part in stories(6)]
    assert shown == [(layout, 4 * length) for length in (1, 6, 24) for layout in LAYOUTS]


def test_every_kind_of_question_comes_about_as_often_in_each_layout():
    asked = Counter((part.setting.layout, query.quiz.kind) for part in stories(120) for query in part.script.queries)
    for layout in LAYOUTS:
        nums = [asked[layout, kind] for kind in KINDS if kind not in ("when_x", "nothing")]
        assert max(nums) - min(nums) <= 3
        assert asked[layout, "nothing"] > 0


def test_only_a_stream_with_a_clock_is_asked_for_the_time():
    with_clock = {part.setting for part in stories(120) for query in part.script.queries if query.quiz.kind == "when_x"}
    assert with_clock == {Setting("native", 4)}
    assert not Setting("native", 1).has_clock


def test_stories_and_words_are_none_that_were_trained_on():
    rng = np.random.default_rng(0)
    trained = {
        quiz.question
        for part in stories(20)
        for _ in range(20)
        if (quiz := ask_about(part.script.story, part.script.times_s, rng, phrasings="train"))
    }
    held_out = {query.quiz.question for part in stories(40) for query in part.script.queries}
    assert not trained & held_out
    assert all(
        part.script.story.split == "test" for part in [*stories(10), *rounds_scenario(0, 1, Setting("turns", 1))]
    )


def test_everything_that_happens_is_shown():
    for script, _ in stories(40):
        for thing in script.story.things:
            assert thing.shape in SHAPES
            assert any(thing.is_visible(time_s) for time_s in script.times_s)


def test_a_comparison_shows_the_same_scripts_in_every_setting():
    settings = [Setting("native", size) for size in (1, 2, 4, 6, 8)]
    parts = comparison(0, 3, [24, 48], 4, settings)
    scripts = [[part.script for part in parts if part.setting == setting] for setting in settings]
    assert all(each == scripts[0] for each in scripts)
    assert [script.num_frames for script in scripts[0]] == [24, 48, 24]
    assert all(query.num_frames % 24 == 0 for script in scripts[0] for query in script.queries)


def test_a_comparison_of_lengths_that_leave_part_of_a_chunk_is_refused():
    with pytest.raises(ValueError, match="multiple of 24"):
        comparison(0, 1, [16], 1, [Setting("native", 6), Setting("native", 8)])


def test_pictures_are_the_same_whenever_they_are_drawn():
    script = stories(3)[2].script
    pictures = list(script.pictures())
    assert len(pictures) == script.num_frames == 24
    assert {picture.shape for picture in pictures} == {(script.size[1], script.size[0], 3)}
    assert all((a == b).all() for a, b in zip(pictures, script.pictures(), strict=True))


def test_a_storm_has_as_many_questions_as_it_is_to_have_and_the_same_ones_again():
    script = stories(1)[0].script
    assert len(script.storm(4, 20)) == 20
    assert script.storm(4, 20) == script.storm(4, 20)
    assert script.storm(4, 0) == []


KEPT = [Setting("native", 2, keeping) for keeping in KEEPINGS]


def test_every_way_to_keep_is_shown_the_same_and_asked_the_same():
    parts = recall(0, 2, [24], 6, KEPT)
    assert [part.setting.keeping for part in parts] == [*KEEPINGS, *KEEPINGS]
    assert [part.script for part in parts] == [parts[0].script] * len(KEPT) + [parts[-1].script] * len(KEPT)
    assert parts[0].script != parts[-1].script


def test_the_age_of_a_question_is_how_many_chunks_ago_the_thing_was_seen():
    for script, _ in recall(3, 20, [32], 8, KEPT[:1]):
        for num_frames, quiz, age in script.queries:
            shape = next(shape for shape in SHAPES if shape in quiz.question)
            things = [thing for thing in script.story.things if thing.shape == shape]
            seen = [(i, thing) for i in range(num_frames) for thing in things if thing.is_visible(script.times_s[i])]
            assert {thing.colour for _, thing in seen} == {quiz.answer}
            assert age == (num_frames - 1 - seen[-1][0]) // 2


def test_all_ages_are_asked_about_equally_often_and_late():
    scripts = [part.script for part in recall(0, 60, [48], 12, KEPT[:1])]
    queries = [query for script in scripts for query in script.queries]
    nums = Counter(age_span(query.age or 0) for query in queries)
    assert list(sorted(nums)) == [(0, 0), (1, 4), (5, 8), (9, 16), (17, 24), (25, 32), (33, 48)]
    assert max(nums.values()) < 1.5 * min(nums.values())
    assert min(query.num_frames for query in queries) > 48


def test_a_fixed_camera_sees_nothing_for_a_good_part_of_the_time():
    for script, _ in recall(0, 20, [48], 1, KEPT[:1]):
        is_busy = [any(thing.is_visible(time_s) for thing in script.story.things) for time_s in script.times_s]
        assert 0.2 < sum(is_busy) / len(is_busy) < 0.8


def test_the_last_frames_are_those_that_have_room_beside_the_opening():
    last = next(keeping for keeping in KEEPINGS if keeping.only_last)
    assert last.last_frames(96, 2) == 20
    assert last.last_frames(128, 8) == 16
    assert not any(keeping.last_frames(96, 2) for keeping in KEEPINGS if keeping is not last)


def test_a_stream_that_is_too_short_to_forget_anything_is_refused():
    with pytest.raises(ValueError, match="16 would do"):
        recall(0, 1, [48, 8], 1, KEPT)
