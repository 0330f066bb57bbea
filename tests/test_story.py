import itertools

import numpy as np
import pytest

from onlooker.tools.story import (
    COLOURS,
    MAX_VISIBLE,
    MIN_CONTRAST,
    MIN_TRAVEL,
    REACH,
    SHAPES,
    Shade,
    make_camera_story,
    make_plain_story,
    make_story,
)

SEEDS = range(60)


@pytest.mark.parametrize("fps", [1.0, 2.0, 8.0])
def test_what_a_camera_story_shows_is_there_for_two_frames(fps: float):
    # A duration that jitter made a hair too short for whole frames, as often as not.
    stories = [make_camera_story(i, split="test", duration_s=(i % 40 + 2) / fps - 2e-7, fps=fps) for i in range(400)]
    shortest = min(t.end_s - t.start_s for story in stories for t in story.things)
    assert shortest > 2 / fps - 1e-5
    counts = {len(story.things) for story in stories}
    assert counts == set(range(9))


def test_the_same_seed_tells_the_same_story():
    assert make_story(5, num_things=6) == make_story(5, num_things=6)
    assert make_story(5) != make_story(6)
    assert make_story(5).things != make_story(5, split="test").things


@pytest.mark.parametrize("colour", COLOURS)
def test_the_shades_of_the_splits_are_disjoint(colour):
    train, test = COLOURS[colour]
    assert any(a[1] < b[0] or b[1] < a[0] for a, b in zip(train, test, strict=True))


@pytest.mark.parametrize("split", ["train", "test"])
def test_no_shade_has_two_names(split):
    shades = [getattr(colour, split) for name, colour in COLOURS.items() if name != "white"]
    hues = sorted(shade.hue for shade in shades)
    assert all(lower[1] + 15 <= upper[0] for lower, upper in itertools.pairwise(hues))
    assert all(shade.saturation[0] > 0.5 for shade in shades)
    assert getattr(COLOURS["white"], split).saturation[1] < 0.1
    assert isinstance(shades[0], Shade)


def test_things_come_in_order_and_within_the_story():
    for seed in SEEDS:
        story = make_story(seed, duration_s=20, num_things=7, min_show_s=1.0)
        starts_s = [thing.start_s for thing in story.things]
        assert len(starts_s) == 7 and starts_s == sorted(starts_s)
        assert all(t.start_s >= 0 and t.start_s + 0.999 < t.end_s <= 20.001 for t in story.things)


def test_at_most_two_are_visible_and_they_do_not_touch():
    num_pairs = 0
    for seed in SEEDS:
        story = make_story(seed, pairs=0.5)
        for time_s in np.arange(0, story.duration_s, 0.25):
            visible = [thing for thing in story.things if thing.is_visible(time_s)]
            assert len(visible) <= MAX_VISIBLE
            if len(visible) == 2:
                num_pairs += 1
                (xa, ya), (xb, yb) = (thing.position_at(time_s) for thing in visible)
                apart = max(abs(xa - xb), abs(ya - yb))
                assert apart > visible[0].radius + visible[1].radius
                assert visible[0].name != visible[1].name
    assert num_pairs > 100


def test_every_thing_stays_inside_the_frame():
    for seed in SEEDS:
        for thing in make_story(seed).things:
            for share in np.linspace(0, 1, 5):
                place = thing.position_at(thing.start_s + share * (thing.end_s - thing.start_s))
                assert all(REACH * thing.radius - 1e-9 <= part <= 1 - REACH * thing.radius + 1e-9 for part in place)


def test_scenes_are_as_far_apart_as_asked():
    for seed in SEEDS:
        things = make_story(seed, pairs=0.0, gap_s=0.7).things
        assert all(b.start_s - a.end_s > 0.699 for a, b in itertools.pairwise(things))


def test_moving_things_cross_a_clear_distance_one_way():
    movers = [t for seed in SEEDS for t in make_story(seed, moving=1.0).things]
    for thing in movers:
        across, down = abs(thing.x1 - thing.x0), abs(thing.y1 - thing.y0)
        assert max(across, down) > MIN_TRAVEL - 1e-9 and min(across, down) == 0
    assert {thing.direction for thing in movers} == {"left", "right", "up", "down"}
    assert all(t.direction is None for seed in SEEDS for t in make_story(seed, moving=0.0).things)


def test_things_are_mostly_new_and_sometimes_come_back():
    stories = [make_story(seed, num_things=6, returning=0.2) for seed in SEEDS]
    num_back = sum(len(story.things) - len({thing.name for thing in story.things}) for story in stories)
    assert 20 < num_back < 120
    for story in stories:
        assert all(a.name != b.name for a, b in itertools.pairwise(story.things))


def test_every_shape_and_colour_comes_equally_often():
    things = [thing for seed in range(300) for thing in make_story(seed).things]
    for field, words in (("shape", SHAPES), ("colour", tuple(COLOURS))):
        counts = [sum(getattr(thing, field) == word for thing in things) for word in words]
        assert min(counts) > 0.75 * len(things) / len(words)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_background_stands_off_from_every_thing(split):
    gaps = []
    for seed in range(200):
        story = make_story(seed, split=split)
        for ground in story.background.colours:
            gaps += [np.linalg.norm(np.subtract(ground, thing.rgb)) for thing in story.things]
    assert min(gaps) > 0.9 * MIN_CONTRAST


def test_a_stream_may_stay_empty():
    assert make_story(0, num_things=0).things == ()


def test_a_story_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"need .* s, got 5 s"):
        make_story(0, duration_s=5, num_things=4, min_show_s=2)
    with pytest.raises(ValueError, match="num_things=-1"):
        make_story(0, num_things=-1)


def test_more_things_than_there_are_names_still_make_a_story():
    story = make_story(0, duration_s=100, num_things=60, min_show_s=1, gap_s=0.1)
    assert len({thing.name for thing in story.things}) == len(SHAPES) * len(COLOURS)


def test_a_plain_story_shows_what_was_named():
    story = make_plain_story(1, ["red circle", "blue square"], show_s=2)
    assert [(t.name, t.start_s, t.end_s) for t in story.things] == [("red circle", 0, 2), ("blue square", 2, 4)]
    with pytest.raises(ValueError, match="'redcircle'"):
        make_plain_story(1, ["redcircle"])
