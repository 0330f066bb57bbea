import colorsys
import math

import av
import msgspec
import numpy as np
import pytest

from onlooker.tools.scenes import (
    degrade,
    draw,
    make_plain_story,
    make_story,
    pack,
    pixel_grid,
    quantise,
    read_clip,
    read_truth,
    render,
    write_clip,
)
from onlooker.tools.story import COLOURS, REACH, SHAPES, Thing

# In squares of the radius.
AREAS = {
    "circle": math.pi * 0.92**2,
    "square": 1.48**2,
    "triangle": 3 * math.sqrt(3) * 0.53**2,
    "star": 1.1226 * REACH**2,
    "cross": 8 * 0.96 * 0.31 - 4 * 0.31**2,
    "diamond": 2 * 0.66 * 1.04,
}


def middle_of(thing: Thing) -> float:
    return (thing.start_s + thing.end_s) / 2


def patch_at(frame: np.ndarray, place: tuple[float, float]) -> np.ndarray:
    height, width = frame.shape[:2]
    x, y = int(place[0] * width), int(place[1] * height)
    return frame[y - 1 : y + 2, x - 1 : x + 2].reshape(-1, 3).mean(axis=0)


def named(rgb: np.ndarray) -> str:
    """The colour whose shades are nearest in hue; what has hardly any is white."""
    hue, saturation, _ = colorsys.rgb_to_hsv(*(rgb / 255))
    if saturation < 0.35:
        return "white"
    gaps = {}
    for name, shades in COLOURS.items():
        if name != "white":
            ends = [end for shade in shades for end in shade.hue]
            gaps[name] = abs((hue * 360 - (min(ends) + max(ends)) / 2 + 180) % 360 - 180)
    return min(gaps, key=gaps.__getitem__)


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_pixels_at_the_centre_of_a_thing_have_its_colour(split):
    for seed in range(40):
        story = make_story(seed, split=split)
        times_s = [middle_of(thing) for thing in story.things]
        frames = degrade(render(story, times_s, (112, 112)), np.random.default_rng(seed), 60)
        for thing, frame, time_s in zip(story.things, frames, times_s, strict=True):
            assert named(patch_at(frame, thing.position_at(time_s))) == thing.colour


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_covers_its_own_area_and_nothing_beyond_its_reach(shape):
    story = make_plain_story(3, [f"white {shape}"])
    thing = story.things[0]
    arrays = pack([story], [[0.5]])
    there = draw(np, arrays, pixel_grid(400), pixel_grid(400))[0].mean(axis=-1)
    arrays.visible[:] = 0
    without = draw(np, arrays, pixel_grid(400), pixel_grid(400))[0].mean(axis=-1)
    changed = np.abs(there - without) > 0.15
    assert changed.mean() == pytest.approx(AREAS[shape] * thing.radius**2, rel=0.06)
    rows, columns = np.nonzero(changed)
    reach = np.hypot(columns / 400 - thing.x0, rows / 400 - thing.y0).max()
    assert reach <= REACH * thing.radius + story.blur + 0.005


def test_a_circle_is_round_in_a_wide_frame():
    story = make_plain_story(0, ["white circle"])
    frame = render(story, [0.5], (320, 120))[0]
    empty = render(story, [9.0], (320, 120))[0]
    rows, columns = np.nonzero(np.abs(frame.astype(int) - empty).sum(axis=-1) > 150)
    assert np.ptp(rows) == pytest.approx(np.ptp(columns), abs=3)
    assert np.ptp(rows) == pytest.approx(2 * 0.92 * story.things[0].radius * 120, abs=4)


def test_frames_have_the_size_that_was_asked_for():
    frames = render(make_story(0), np.arange(0, 5, 0.5), (64, 48))
    assert frames.shape == (10, 48, 64, 3) and frames.dtype == np.uint8


def test_the_same_call_gives_the_same_pixels():
    story = next(story for story in map(make_story, range(9)) if story.noise > 0.01)
    times_s = np.arange(0, 6, 0.5)
    frames = render(story, times_s, (56, 56))
    assert np.array_equal(frames, render(story, times_s, (56, 56)))
    other = render(story, times_s, (56, 56), noise_seed=99)
    assert not np.array_equal(frames, other)
    assert np.abs(frames.astype(int) - other).mean() < 30


def test_sensor_noise_has_the_strength_of_the_story():
    grey = np.full((4, 60, 60, 3), 0.5, np.float32)
    noise = np.array([0, 0.01, 0.02, 0.03], np.float32)
    frames = quantise(grey, noise, np.random.default_rng(0))
    assert frames.reshape(4, -1).std(axis=1) == pytest.approx(255 * noise, abs=0.3)


def test_a_thing_is_drawn_exactly_while_it_is_visible():
    story = make_plain_story(2, ["red star"], show_s=1.0)
    arrays = pack([story], [[0.0, 0.999, 1.0, 5.0]])
    assert arrays.visible[:, 0].tolist() == [1, 1, 0, 0]
    frames = render(story, [0.0, 0.999, 1.0, 5.0], (56, 56)).astype(int)
    assert np.abs(frames[1] - frames[2]).max() > 80
    assert np.abs(frames[2] - frames[3]).max() < 70


def test_stories_pack_one_after_the_other():
    stories = [make_story(0), make_story(1, num_things=0), make_story(2, num_things=1)]
    times = [[0.0, 3.0], [1.0], [2.0, 4.0, 6.0]]
    together = pack(stories, times)
    assert len(together) == 6
    grid = pixel_grid(28)
    apart = [draw(np, pack([story], [times_s]), grid, grid) for story, times_s in zip(stories, times, strict=True)]
    np.testing.assert_allclose(draw(np, together, grid, grid), np.concatenate(apart), atol=1e-6)


def test_torch_draws_what_numpy_draws():
    torch = pytest.importorskip("torch")
    stories = [make_story(seed, split="test" if seed % 2 else "train", pairs=0.4) for seed in range(12)]
    arrays = pack(stories, [np.arange(0, 24, 1.7)] * len(stories))
    rows, columns = pixel_grid(48), pixel_grid(64)
    by_numpy = draw(np, arrays, rows, columns)
    tensors = arrays.mapped(lambda array: torch.from_numpy(np.array(array)))
    by_torch = draw(torch, tensors, torch.from_numpy(rows), torch.from_numpy(columns))
    assert by_numpy.shape == tuple(by_torch.shape)
    assert np.abs(by_numpy - by_torch.numpy()).max() <= 1e-4


def test_jpeg_changes_frames_a_little_and_the_more_the_lower_its_quality():
    frames = render(make_story(4), np.arange(0, 4, 0.5), (112, 112))
    rng = np.random.default_rng(0)
    assert np.array_equal(degrade(frames, rng, None), frames)
    fine, coarse = (np.abs(degrade(frames, rng, q).astype(int) - frames).mean() for q in (95, 30))
    assert 0 < fine < coarse < 12
    assert np.abs(degrade(frames, rng, None, noise=0.05).astype(int) - frames).mean() > 4


@pytest.fixture
def clip_path(tmp_path):
    return tmp_path / "hall.mp4"


def test_a_clip_shows_its_story_and_has_the_truth_beside_it(clip_path):
    story = make_story(11, duration_s=4, num_things=2, min_show_s=1)
    clip = write_clip(story, clip_path, fps=6, size=(160, 120))
    with av.open(str(clip_path)) as film:
        decoded = [frame for frame in film.decode(video=0)]
    assert read_truth(clip_path) == story
    assert read_clip(clip_path.with_suffix(".json")) == clip
    assert len(decoded) == len(clip.times_s) == 24
    assert [frame.time for frame in decoded] == pytest.approx(clip.times_s, abs=1e-3)
    filmed = np.stack([frame.to_ndarray(format="rgb24") for frame in decoded])
    assert np.abs(filmed.astype(int) - render(story, clip.times_s, (160, 120))).mean() < 12


def test_a_truth_that_is_none_is_refused(clip_path):
    clip_path.with_suffix(".json").write_text('{"story": {"seed": 1}}')
    with pytest.raises(msgspec.DecodeError):
        read_truth(clip_path)
