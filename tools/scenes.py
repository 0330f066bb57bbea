"""A synthetic camera: coloured shapes that come, move and go before a muted background, with the truth about them.

A `Story` says what happens; `render` turns moments of it into pictures. The drawing itself (`pack`, then `draw`) uses
only functions that numpy and torch name alike, so one renderer serves a laptop's CPU and a training run's GPU.

    story = make_story(7, duration_s=20, num_things=4)
    frames = render(story, np.arange(0, 20, 0.5), (112, 112))  # uint8, (40, 112, 112, 3)
"""

import colorsys
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import av

Split = Literal["train", "test"]
Rgb = tuple[float, float, float]  # 0..1
Floats = npt.NDArray[np.float32]

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
BACKGROUNDS = ("flat", "gradient", "stripes", "checker", "noise")

MIN_RADIUS = 0.12
MAX_RADIUS = 0.30
MAX_PAIR_RADIUS = 0.20  # two at once share the frame
MAX_VISIBLE = 2
MIN_TRAVEL = 0.30  # of the frame, from one end of a path to the other
MIN_SPEED = 0.10  # of the frame per second, unless a thing has to stay longer than its path lasts
REACH = 1.06  # no part of a shape is farther from its centre than this many radii
NUM_WAVES = 4  # a background is a sum of so many plane waves, cut off to make edges
MIN_CONTRAST = 0.42  # distance in RGB between a thing and both colours of its background
FRAMES_AT_ONCE = 8  # rendered together: their planes still fit into a core's cache


class Shade(NamedTuple):
    """A box of shades: hue in degrees, saturation and value in 0..1, each from a low to a high end."""

    hue: tuple[float, float]
    saturation: tuple[float, float]
    value: tuple[float, float]


class Shades(NamedTuple):
    """The shades of one colour name: those trained on, and others that people call by the same name."""

    train: Shade
    test: Shade


COLOURS: dict[str, Shades] = {
    "red": Shades(
        Shade((-6, 2), (0.85, 1.0), (0.78, 1.0)),
        Shade((3, 7), (0.85, 1.0), (0.78, 1.0)),
    ),
    "orange": Shades(
        Shade((25, 31), (0.88, 1.0), (0.95, 1.0)),
        Shade((32, 35), (0.88, 1.0), (0.95, 1.0)),
    ),
    "yellow": Shades(
        Shade((54, 59), (0.80, 1.0), (0.94, 1.0)),
        Shade((51, 53), (0.80, 1.0), (0.94, 1.0)),
    ),
    "green": Shades(
        Shade((105, 128), (0.75, 1.0), (0.60, 0.90)),
        Shade((129, 142), (0.75, 1.0), (0.60, 0.90)),
    ),
    "cyan": Shades(
        Shade((177, 184), (0.75, 1.0), (0.88, 1.0)),
        Shade((185, 190), (0.75, 1.0), (0.88, 1.0)),
    ),
    "blue": Shades(
        Shade((222, 238), (0.80, 1.0), (0.75, 1.0)),
        Shade((214, 221), (0.80, 1.0), (0.75, 1.0)),
    ),
    "purple": Shades(
        Shade((276, 290), (0.65, 0.95), (0.68, 0.92)),
        Shade((270, 275), (0.65, 0.95), (0.68, 0.92)),
    ),
    "white": Shades(
        Shade((0, 360), (0.0, 0.03), (0.95, 1.0)),
        Shade((0, 360), (0.04, 0.07), (0.95, 1.0)),
    ),
}

# How far a shape may be turned, in degrees. A square on its corner would be a diamond.
_MAX_TURN = {"circle": 0.0, "square": 12.0, "triangle": 180.0, "star": 180.0, "cross": 15.0, "diamond": 12.0}

PLACES = ("left", "right", "top", "bottom", "middle")
DIRECTIONS = ("left", "right", "up", "down")


@dataclass(frozen=True, slots=True)
class Thing:
    """One appearance of a coloured shape, from `start_s` up to and without `end_s`.

    The centre goes evenly from (x0, y0) to (x1, y1), fractions of the width and of the height; the radius is a
    fraction of the shorter side, the angle in radians.
    """

    shape: str
    colour: str
    rgb: Rgb
    radius: float
    angle: float
    start_s: float
    end_s: float
    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def name(self) -> str:
        """Colour and shape, as in "red circle"."""
        return f"{self.colour} {self.shape}"

    @property
    def direction(self) -> str | None:
        """One of DIRECTIONS, or None when it stands still."""
        across, down = self.x1 - self.x0, self.y1 - self.y0
        if across == down == 0:
            return None
        if abs(across) > abs(down):
            return "right" if across > 0 else "left"
        return "down" if down > 0 else "up"

    def is_visible(self, time_s: float) -> bool:
        """Whether a frame taken then shows it."""
        return self.start_s <= time_s < self.end_s

    def position_at(self, time_s: float) -> tuple[float, float]:
        """Where its centre is then, as fractions of width and height."""
        done = min(max((time_s - self.start_s) / (self.end_s - self.start_s), 0.0), 1.0)
        return self.x0 + done * (self.x1 - self.x0), self.y0 + done * (self.y1 - self.y0)


class Wave(NamedTuple):
    """A plane wave over the frame: cycles across the width and down the height, phase in radians."""

    amplitude: float
    cycles_x: float
    cycles_y: float
    phase: float


@dataclass(frozen=True, slots=True)
class Background:
    """Two muted colours mixed by a sum of waves: `sharpness` 1 keeps it smooth, more cuts it into bands or fields."""

    kind: str
    colours: tuple[Rgb, Rgb]
    waves: tuple[Wave, ...]
    sharpness: float


@dataclass(frozen=True, slots=True)
class Light:
    """The light on the whole frame: its strength drifts with time, falls off to one side, and has a tint."""

    gain: float
    drift: float
    period_s: float
    phase: float
    tint: Rgb
    slope_x: float
    slope_y: float

    def gain_at(self, time_s: npt.ArrayLike) -> Floats:
        """What every colour is multiplied with at these times."""
        turns = np.asarray(time_s, np.float64) / self.period_s
        return (self.gain + self.drift * np.sin(2 * math.pi * turns + self.phase)).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Story:
    """All that happens before one camera; `things` in order of appearance.

    `noise` is the standard deviation of the sensor noise (1 is full scale), `blur` the width of an edge as a
    fraction of the shorter side.
    """

    seed: int
    split: Split
    things: tuple[Thing, ...]
    duration_s: float
    background: Background
    light: Light
    noise: float
    blur: float


def make_story(
    seed: int,
    *,
    split: Split = "train",
    duration_s: float = 24.0,
    num_things: int = 5,
    min_show_s: float = 1.5,
    gap_s: float = 0.5,
    pairs: float = 0.15,
    moving: float = 0.35,
    returning: float = 0.12,
) -> Story:
    """Invent a story; the same arguments give the same story.

    `num_things` appearances, each for `min_show_s` or longer, with empty stretches of `gap_s` or longer between
    them. `pairs`, `moving` and `returning` are the shares of two at once, of moving things, and of things that
    were there before. Raises ValueError when all that does not fit into `duration_s`.
    """
    if min_show_s <= 0 or gap_s < 0 or num_things < 0:
        raise ValueError(f"times and counts cannot be negative, got {num_things=} {min_show_s=} {gap_s=}")
    rng = np.random.default_rng([split == "test", seed])
    spans = _scene_spans(rng, _scene_sizes(rng, num_things, pairs), duration_s, min_show_s, gap_s)
    looks = _looks(rng, split, spans, returning)
    things: list[Thing] = []
    for span in spans:
        num = len(span.shows_s)
        place = _place_pair if num == 2 else _place_one
        things += place(rng, looks[len(things) : len(things) + num], span, moving, min_show_s)
    return _story(rng, seed, split, things, duration_s)


def make_plain_story(seed: int, names: Sequence[str], *, show_s: float = 1.0, split: Split = "train") -> Story:
    """Show named things ("red circle") one after the other, each `show_s` long and still, without gaps.

    Raises ValueError for a name that is no colour and shape.
    """
    rng = np.random.default_rng([4, split == "test", seed])
    things: list[Thing] = []
    for i, name in enumerate(names):
        colour, _, shape = name.partition(" ")
        if colour not in COLOURS or shape not in SHAPES:
            raise ValueError(f"a thing is a colour and a shape, as in 'red circle', got {name!r}")
        look = _Look(shape, colour, _shade(rng, getattr(COLOURS[colour], split)))
        things += _place_one(rng, [look], _Span(((i * show_s, (i + 1) * show_s),)), 0.0, show_s)
    return _story(rng, seed, split, things, len(names) * show_s)


def _story(rng: np.random.Generator, seed: int, split: Split, things: list[Thing], duration_s: float) -> Story:
    """Put things before a background, in a light, before a camera."""
    return Story(
        seed=seed,
        split=split,
        things=tuple(things),
        duration_s=duration_s,
        background=_background(rng, split, [thing.rgb for thing in things]),
        light=_light(rng),
        noise=float(rng.uniform(0.0, 0.035)),
        blur=float(rng.uniform(0.0, 0.015)),
    )


class _Span(NamedTuple):
    """When one or two things are shown together: (start_s, end_s) of each."""

    shows_s: tuple[tuple[float, float], ...]


class _Look(NamedTuple):
    shape: str
    colour: str
    rgb: Rgb


def _scene_sizes(rng: np.random.Generator, num_things: int, pairs: float) -> list[int]:
    sizes: list[int] = []
    while (left := num_things - sum(sizes)) > 0:
        sizes.append(2 if left >= 2 and rng.random() < pairs else 1)
    return sizes


def _scene_spans(
    rng: np.random.Generator, sizes: list[int], duration_s: float, min_show_s: float, gap_s: float
) -> list[_Span]:
    """Share the time among scenes and the gaps before, between and after them."""
    least_s = np.array([1.5 * min_show_s if size == 2 else min_show_s for size in sizes])
    num_gaps = max(len(sizes) - 1, 0)
    spare_s = duration_s - least_s.sum() - num_gaps * gap_s
    if spare_s < 0:
        raise ValueError(
            f"{sum(sizes)} things of {min_show_s} s with gaps of {gap_s} s need {duration_s - spare_s:.1f} s, "
            f"got {duration_s} s"
        )
    if not sizes:
        return []
    # Before, scene, gap, scene, gap, ..., scene, after. A gap often stays at its least: then scenes cut hard.
    weights = rng.exponential(size=2 * len(sizes) + 1)
    weights[0::2] *= rng.random(len(sizes) + 1) < 0.5
    lengths_s = weights * (spare_s / weights.sum())
    lengths_s[1::2] += least_s
    lengths_s[2:-1:2] += gap_s
    ends_s = np.cumsum(lengths_s)
    return [
        _pair_span(rng, ends_s[2 * i], ends_s[2 * i + 1]) if size == 2 else _Span(((ends_s[2 * i], ends_s[2 * i + 1]),))
        for i, size in enumerate(sizes)
    ]


def _pair_span(rng: np.random.Generator, start_s: float, end_s: float) -> _Span:
    """Two that overlap, the second one later in most cases; each gets two thirds of the time or more."""
    length_s = end_s - start_s
    late = 0.0 if rng.random() < 0.3 else rng.uniform(0.25, 1 / 3)
    until = rng.uniform(2 / 3, 1.0) if rng.random() < 0.6 else 1.0
    return _Span(((start_s, start_s + until * length_s), (start_s + late * length_s, end_s)))


def _looks(rng: np.random.Generator, split: Split, spans: list[_Span], returning: float) -> list[_Look]:
    """Shape and colour of every appearance: mostly new ones, and never one that is, or just was, there."""
    looks: list[_Look] = []
    for i, span in enumerate(spans):
        num_near = len(span.shows_s) + (len(spans[i - 1].shows_s) if i else 0)
        scene: list[_Look] = []
        for _ in span.shows_s:
            near = (looks + scene)[-num_near:]
            earlier = [look for look in looks if look not in near]
            if earlier and rng.random() < returning:
                scene.append(earlier[rng.integers(len(earlier))])
            else:
                scene.append(_new_look(rng, split, looks + scene))
        looks += scene
    return looks


def _new_look(rng: np.random.Generator, split: Split, before: list[_Look]) -> _Look:
    """A pair not shown before, often with the shape or the colour of one that was."""
    taken = {(look.shape, look.colour) for look in before}
    names = tuple(COLOURS)
    free = len(taken) < len(SHAPES) * len(names)
    while True:
        shape, colour = SHAPES[rng.integers(len(SHAPES))], names[rng.integers(len(names))]
        if before and (choice := rng.random()) < 0.35:
            other = before[rng.integers(len(before))]
            shape, colour = (other.shape, colour) if choice < 0.175 else (shape, other.colour)
        if (shape, colour) not in taken or (not free and (shape, colour) != before[-1][:2]):
            return _Look(shape, colour, _shade(rng, getattr(COLOURS[colour], split)))


def _shade(rng: np.random.Generator, shade: Shade) -> Rgb:
    hue, saturation, value = (rng.uniform(*ends) for ends in shade)
    return colorsys.hsv_to_rgb(hue / 360 % 1.0, saturation, value)


def _place_one(
    rng: np.random.Generator, looks: list[_Look], span: _Span, moving: float, min_show_s: float
) -> list[Thing]:
    radius = rng.uniform(MIN_RADIUS, MAX_RADIUS)
    margin = REACH * radius
    ((start_s, end_s),) = span.shows_s
    if rng.random() >= moving:
        x, y = _still_place(rng, margin)
        return [_thing(rng, looks[0], radius, (start_s, end_s), (x, y), (x, y))]
    room = 1 - 2 * margin
    travel = rng.uniform(min(MIN_TRAVEL, room), room)
    begin = margin + rng.uniform(0, room - travel)
    across = rng.uniform(margin, 1 - margin)
    return [_mover(rng, looks[0], radius, (start_s, end_s), begin, travel, across, rng.random() < 0.5, min_show_s)]


def _still_place(rng: np.random.Generator, margin: float) -> tuple[float, float]:
    """Mostly a place that has a name, else anywhere."""
    if rng.random() < 0.25:
        return rng.uniform(margin, 1 - margin), rng.uniform(margin, 1 - margin)
    place = PLACES[rng.integers(len(PLACES))]
    aside = rng.uniform(-0.05, 0.05)
    if place == "middle":
        return 0.5 + aside, 0.5 + rng.uniform(-0.05, 0.05)
    edge = rng.uniform(margin, max(margin, 0.35))
    along = edge if place in ("left", "top") else 1 - edge
    return (along, 0.5 + aside) if place in ("left", "right") else (0.5 + aside, along)


def _place_pair(
    rng: np.random.Generator, looks: list[_Look], span: _Span, moving: float, min_show_s: float
) -> list[Thing]:
    """Each in its own half, left and right or top and bottom; a moving one stays in its half."""
    upright = rng.random() < 0.5  # one above the other
    swap = rng.random() < 0.5
    things = []
    for i, (look, show_s) in enumerate(zip(looks, span.shows_s, strict=True)):
        radius = rng.uniform(MIN_RADIUS, MAX_PAIR_RADIUS)
        margin = REACH * radius
        half = rng.uniform(margin, 0.49 - radius)
        half = 1 - half if (i == 1) != swap else half
        if rng.random() < moving:
            room = 1 - 2 * margin
            travel = rng.uniform(min(MIN_TRAVEL, room), room)
            begin = margin + rng.uniform(0, room - travel)
            things.append(_mover(rng, look, radius, show_s, begin, travel, half, upright, min_show_s))
        else:
            along = rng.uniform(margin, 1 - margin)
            place = (along, half) if upright else (half, along)
            things.append(_thing(rng, look, radius, show_s, place, place))
    return things


def _mover(
    rng: np.random.Generator,
    look: _Look,
    radius: float,
    show_s: tuple[float, float],
    begin: float,
    travel: float,
    across: float,
    level: bool,
    min_show_s: float,
) -> Thing:
    """A thing on a straight path, level or upright, either way; gone early where it would have to creep."""
    start_s, end_s = show_s
    end_s = min(end_s, start_s + max(travel / MIN_SPEED, min_show_s))
    ends = (begin, begin + travel) if rng.random() < 0.5 else (begin + travel, begin)
    first, last = ((end, across) if level else (across, end) for end in ends)
    return _thing(rng, look, radius, (start_s, end_s), first, last)


def _thing(
    rng: np.random.Generator,
    look: _Look,
    radius: float,
    show_s: tuple[float, float],
    first: tuple[float, float],
    last: tuple[float, float],
) -> Thing:
    turn = math.radians(_MAX_TURN[look.shape])
    return Thing(
        *look,
        radius=float(radius),
        angle=float(rng.uniform(-turn, turn)),
        start_s=float(show_s[0]),
        end_s=float(show_s[1]),
        x0=float(first[0]),
        y0=float(first[1]),
        x1=float(last[0]),
        y1=float(last[1]),
    )


def _background(rng: np.random.Generator, split: Split, rgbs: list[Rgb]) -> Background:
    kind = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    colours = _muted_colours(rng, split, rgbs)
    if kind == "flat":
        return Background(kind, (colours[0], colours[0]), (), 1.0)
    waves, sharpness = _waves(rng, split, kind)
    return Background(kind, colours, waves, sharpness)


def _muted_colours(rng: np.random.Generator, split: Split, rgbs: list[Rgb]) -> tuple[Rgb, Rgb]:
    """Two dull colours of like hue that stand off from every thing of the story.

    The hues of the two splits lie in different sixths of the colour circle.
    """
    num = 32
    sixth = 2 * rng.integers(3, size=num) + (split == "test")
    hue = (sixth + rng.random(num)) / 6
    saturation = rng.uniform(0.0, 0.28, num)
    value = rng.uniform(0.06, 0.70, num)
    other = np.clip(value + rng.uniform(0.05, 0.20, num) * rng.choice([-1.0, 1.0], num), 0.04, 0.74)
    pairs = np.array(
        [
            [colorsys.hsv_to_rgb(h, s, v), colorsys.hsv_to_rgb(h, s, w)]
            for h, s, v, w in zip(hue, saturation, value, other, strict=True)
        ]
    )  # (num, 2, 3)
    best = 0
    if rgbs:
        gaps = np.linalg.norm(pairs[:, :, None] - np.array(rgbs), axis=-1).min(axis=(1, 2))
        far = np.flatnonzero(gaps >= MIN_CONTRAST)
        best = int(far[0]) if len(far) else int(gaps.argmax())
    first, second = pairs[best].tolist()
    return (first[0], first[1], first[2]), (second[0], second[1], second[2])


def _waves(rng: np.random.Generator, split: Split, kind: str) -> tuple[tuple[Wave, ...], float]:
    """The waves of a background and their sharpness; the splits' frequencies lie in different bands."""
    heading, phase = rng.uniform(0, 2 * math.pi, 2)
    across, down = math.cos(heading), math.sin(heading)
    test = split == "test"
    if kind == "gradient":
        cycles = rng.uniform(0.40, 0.50) if test else rng.uniform(0.25, 0.38)
        return (Wave(1.0, cycles * across, cycles * down, phase),), 1.0
    if kind == "noise":
        low, high = (1.7, 2.2) if test else (0.6, 1.6)
        headings, phases = rng.uniform(0, 2 * math.pi, (2, NUM_WAVES))
        cycles = rng.uniform(low, high, NUM_WAVES)
        return tuple(
            Wave(0.45, float(c * math.cos(h)), float(c * math.sin(h)), float(p))
            for c, h, p in zip(cycles, headings, phases, strict=True)
        ), 1.0
    cycles = rng.uniform(5.2, 6.5) if test else rng.choice([rng.uniform(2.0, 5.0), rng.uniform(6.8, 9.0)])
    if kind == "stripes":
        return (Wave(1.0, cycles * across, cycles * down, phase),), float(rng.uniform(1.5, 5.0))
    # A checker is sin(a) sin(b), which is the difference of two waves.
    cycles /= 2
    both, apart = (across - down, across + down), (across + down, down - across)
    return (
        Wave(0.5, cycles * both[0], cycles * both[1], phase),
        Wave(-0.5, cycles * apart[0], cycles * apart[1], phase),
    ), float(rng.uniform(3.0, 8.0))


def _light(rng: np.random.Generator) -> Light:
    red, green, blue = rng.uniform(0.96, 1.0, 3).tolist()
    return Light(
        gain=float(rng.uniform(0.88, 1.0)),
        drift=float(rng.uniform(0.0, 0.06)),
        period_s=float(rng.uniform(4.0, 30.0)),
        phase=float(rng.uniform(0.0, 2 * math.pi)),
        tint=(red, green, blue),
        slope_x=float(rng.uniform(-0.15, 0.15)),
        slope_y=float(rng.uniform(-0.15, 0.15)),
    )


@dataclass(frozen=True, slots=True, eq=False)
class SceneArrays:
    """A flat batch of N frames with up to K things each, as `draw` reads them: numpy or torch, all float32 but
    `shape`, which is int64 and counts in SHAPES."""

    centre: Any  # (N, K, 2) x and y as fractions of width and height
    radius: Any  # (N, K) of the shorter side
    angle: Any  # (N, K) radians
    rgb: Any  # (N, K, 3)
    shape: Any  # (N, K) int64
    visible: Any  # (N, K) 0 or 1
    ground: Any  # (N, 3) the middle of the two colours of the background
    swing: Any  # (N, 3) from the middle to the second colour
    waves: Any  # (N, NUM_WAVES, 4) amplitude, cycles across and down, phase
    sharpness: Any  # (N,)
    light: Any  # (N, 3) gain and tint
    slope: Any  # (N, 2) across and down
    noise: Any  # (N,) standard deviation; for whoever adds it, `draw` does not
    blur: Any  # (N,) of the shorter side

    def __len__(self) -> int:
        return len(self.radius)

    def mapped(self, convert: Callable[[Any], Any]) -> "SceneArrays":
        """The same batch with every array converted, as in `mapped(lambda a: torch.from_numpy(a).cuda())`."""
        return SceneArrays(*(convert(getattr(self, field.name)) for field in fields(self)))

    def part(self, frames: slice) -> "SceneArrays":
        """Some of the frames, as views."""
        return self.mapped(lambda array: array[frames])


def pack(stories: Sequence[Story], times: Sequence[npt.ArrayLike]) -> SceneArrays:
    """Lay out the moments `times[i]` of `stories[i]`, one story after the other, for `draw`."""
    parts = [_pack_one(story, np.asarray(times_s, np.float64)) for story, times_s in zip(stories, times, strict=True)]
    names = [field.name for field in fields(SceneArrays)]
    return SceneArrays(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def _pack_one(story: Story, times_s: npt.NDArray[np.float64]) -> SceneArrays:
    num = len(times_s)
    slots, filled = _visible_things(story, times_s)
    table = _thing_table(story)[slots]  # (num, MAX_VISIBLE, 12)
    start_s, end_s = table[..., 0], table[..., 1]
    done = np.clip((times_s[:, None] - start_s) / (end_s - start_s), 0.0, 1.0)[..., None]
    shape = table[..., 11].astype(np.int64)
    first, second = np.array(story.background.colours)
    waves = np.zeros((NUM_WAVES, 4), np.float32)
    waves[: len(story.background.waves)] = np.array(story.background.waves).reshape(-1, 4)
    light = story.light.gain_at(times_s)[:, None] * np.array(story.light.tint)

    def every(value: npt.ArrayLike) -> Floats:
        value = np.asarray(value, np.float32)
        return np.broadcast_to(value, (num, *value.shape))

    return SceneArrays(
        centre=(table[..., 2:4] + done * (table[..., 4:6] - table[..., 2:4])).astype(np.float32),
        radius=table[..., 6].astype(np.float32),
        angle=table[..., 7].astype(np.float32),
        rgb=table[..., 8:11].astype(np.float32),
        shape=shape,
        visible=filled.astype(np.float32),
        ground=every((first + second) / 2),
        swing=every((second - first) / 2),
        waves=every(waves),
        sharpness=every(story.background.sharpness),
        light=light.astype(np.float32),
        slope=every((story.light.slope_x, story.light.slope_y)),
        noise=every(story.noise),
        blur=every(story.blur),
    )


def _visible_things(
    story: Story, times_s: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Which things each frame shows, in order of appearance: their indices, and whether a place is filled."""
    starts_s = np.array([thing.start_s for thing in story.things])
    ends_s = np.array([thing.end_s for thing in story.things])
    shown = (starts_s <= times_s[:, None]) & (times_s[:, None] < ends_s)  # (num, num_things)
    most = int(shown.sum(axis=1).max(initial=0))
    assert most <= MAX_VISIBLE, f"{most} things at once, drawn are {MAX_VISIBLE}"
    slots = np.argsort(~shown, axis=1, kind="stable")[:, :MAX_VISIBLE]
    filled = np.take_along_axis(shown, slots, axis=1)
    missing = MAX_VISIBLE - slots.shape[1]  # the last row of the table is an empty thing
    slots = np.pad(
        np.where(filled, slots, len(story.things)), ((0, 0), (0, missing)), constant_values=len(story.things)
    )
    return slots, np.pad(filled, ((0, 0), (0, missing)))


def _thing_table(story: Story) -> npt.NDArray[np.float64]:
    """Rows of start, end, x0, y0, x1, y1, radius, angle, red, green, blue, shape; the last one is nothing."""
    rows = [
        (t.start_s, t.end_s, t.x0, t.y0, t.x1, t.y1, t.radius, t.angle, *t.rgb, SHAPES.index(t.shape))
        for t in story.things
    ]
    return np.array([*rows, (0, 1, 0.5, 0.5, 0.5, 0.5, 0.1, 0, 0, 0, 0, 0)], np.float64)


def pixel_grid(length: int) -> Floats:
    """The centres of so many pixels, as fractions of their row or column."""
    return ((np.arange(length) + 0.5) / length).astype(np.float32)


def draw(xp: Any, arrays: SceneArrays, grid_y: Any, grid_x: Any) -> Any:
    """Draw a batch of frames: float (N, H, W, 3) in 0..1, before noise and quantisation.

    `xp` is numpy or torch, and all arrays are its own, on one device. The grids are those of `pixel_grid`. The
    result is a view of channel planes, so `moveaxis(-1, 1)` of it costs nothing. Keep it out of autocast.
    """
    light = arrays.light[:, :, None, None]
    planes = _draw_background(xp, arrays, grid_y, grid_x)  # (N, 3, H, W)
    for k in range(arrays.radius.shape[1]):
        cover = _draw_cover(xp, arrays, k, grid_y, grid_x)
        rgb = arrays.rgb[:, k, :, None, None]
        planes += cover[:, None] * (rgb - planes)
    slope_x = (grid_x - 0.5) * arrays.slope[:, 0, None]
    slope_y = (grid_y - 0.5) * arrays.slope[:, 1, None]
    falloff = (1 + slope_y)[:, :, None] + slope_x[:, None, :]
    planes *= falloff[:, None]
    planes *= light
    return xp.moveaxis(xp.clip(planes, 0.0, 1.0), 1, -1)


def _draw_background(xp: Any, arrays: SceneArrays, grid_y: Any, grid_x: Any) -> Any:
    """Mix the two colours: (N, 3, H, W).

    The sine of a sum is a sum of two products, so all waves together are one small matrix product per frame.
    """
    amplitude, cycles_x, cycles_y, phase = (arrays.waves[:, :, i, None] for i in range(4))  # (N, NUM_WAVES, 1)
    across = 2 * math.pi * cycles_x * grid_x + phase
    down = 2 * math.pi * cycles_y * grid_y
    rows = xp.concatenate((amplitude * xp.sin(down), amplitude * xp.cos(down)), 1)  # (N, 2 NUM_WAVES, H)
    columns = xp.concatenate((xp.cos(across), xp.sin(across)), 1)
    mix = xp.matmul(xp.moveaxis(rows, 1, 2), columns)  # (N, H, W)
    mix = xp.clip(mix * arrays.sharpness[:, None, None], -1.0, 1.0)
    return arrays.ground[:, :, None, None] + arrays.swing[:, :, None, None] * mix[:, None]


def _draw_cover(xp: Any, arrays: SceneArrays, k: int, grid_y: Any, grid_x: Any) -> Any:
    """How much of each pixel thing number k covers: (N, H, W) in 0..1."""
    height, width = grid_y.shape[0], grid_x.shape[0]
    short = min(height, width)
    cover = xp.zeros_like(arrays.sharpness[:, None, None] + grid_y[:, None] + grid_x)
    for index, shape in enumerate(SHAPES):
        chosen = (arrays.shape[:, k] == index) & (arrays.visible[:, k] > 0)
        if not chosen.any():
            continue
        radius = arrays.radius[chosen, k, None]
        # Distances in radii, so that one outline serves every size.
        right = (grid_x - arrays.centre[chosen, k, 0, None]) * (width / short) / radius
        below = (grid_y - arrays.centre[chosen, k, 1, None]) * (height / short) / radius
        outside = _OUTLINES[shape](xp, _Turned(xp, right, below, arrays.angle[chosen, k, None]))
        edge = 1 / short + arrays.blur[chosen, None]
        cover[chosen] = xp.clip(0.5 - outside * (radius / edge)[:, :, None], 0.0, 1.0)
    return cover


class _Turned:
    """Pixels as seen from a thing: columns and rows of distances from its centre, and its angle."""

    def __init__(self, xp: Any, right: Any, below: Any, angle: Any) -> None:
        self._right = right[:, None, :]  # (n, 1, W)
        self._below = below[:, :, None]  # (n, H, 1)
        self._cos = xp.cos(angle)[:, :, None]
        self._sin = xp.sin(angle)[:, :, None]

    def along(self, x: float, y: float) -> Any:
        """How far each pixel lies in the direction (x, y) of the thing's own axes: (n, H, W)."""
        cos, sin = self._cos, self._sin
        return self._right * (x * cos - y * sin) + self._below * (x * sin + y * cos)


def _circle(xp: Any, turned: _Turned) -> Any:
    x, y = turned.along(1, 0), turned.along(0, 1)
    return xp.sqrt(x * x + y * y) - 0.92


def _square(xp: Any, turned: _Turned) -> Any:
    return xp.maximum(xp.abs(turned.along(1, 0)), xp.abs(turned.along(0, 1))) - 0.74


def _triangle(xp: Any, turned: _Turned) -> Any:
    sides = [turned.along(math.cos(angle), math.sin(angle)) for angle in _around(3, math.pi / 2)]
    return xp.maximum(xp.maximum(sides[0], sides[1]), sides[2]) - 0.53


def _star(xp: Any, turned: _Turned) -> Any:
    """Five points: all that lies within four of the five lines, so the second largest distance counts."""
    lines = [turned.along(math.cos(angle), math.sin(angle)) for angle in _around(5, math.pi / 2)]
    largest, second = xp.maximum(lines[0], lines[1]), xp.minimum(lines[0], lines[1])
    for line in lines[2:]:
        second = xp.maximum(second, xp.minimum(largest, line))
        largest = xp.maximum(largest, line)
    return second - REACH * math.cos(math.radians(72))


def _cross(xp: Any, turned: _Turned) -> Any:
    x, y = xp.abs(turned.along(1, 0)), xp.abs(turned.along(0, 1))
    return xp.maximum(xp.maximum(x, y) - 0.96, xp.minimum(x, y) - 0.31)


def _diamond(xp: Any, turned: _Turned) -> Any:
    x, y = xp.abs(turned.along(1, 0)), xp.abs(turned.along(0, 1))
    wide, high = 0.66, 1.04
    return (x * high + y * wide - wide * high) / math.hypot(wide, high)


def _around(num: int, start: float) -> list[float]:
    return [start + 2 * math.pi * i / num for i in range(num)]


_OUTLINES: dict[str, Callable[[Any, _Turned], Any]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "diamond": _diamond,
}


def render(
    story: Story, times_s: npt.ArrayLike, size: tuple[int, int], *, noise_seed: int | None = None
) -> npt.NDArray[np.uint8]:
    """Take pictures at these times: RGB, (num, height, width, 3); `size` is width and height.

    The sensor noise is that of `noise_seed`, or of the story's seed; the same call gives the same pixels.
    """
    width, height = size
    arrays = pack([story], [times_s])
    grid_y, grid_x = pixel_grid(height), pixel_grid(width)
    rng = np.random.default_rng([2, story.seed if noise_seed is None else noise_seed])
    frames = np.empty((len(arrays), height, width, 3), np.uint8)
    for start in range(0, len(arrays), FRAMES_AT_ONCE):
        part = arrays.part(slice(start, start + FRAMES_AT_ONCE))
        drawn = draw(np, part, grid_y, grid_x)
        frames[start : start + FRAMES_AT_ONCE] = quantise(drawn, part.noise, rng)
    return frames


def quantise(drawn: Floats, noise: Floats, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Add sensor noise to pictures in 0..1, (N, H, W, 3), and round them to bytes."""
    levels = np.moveaxis(drawn, -1, 1) * np.float32(255)  # planes: long rows are what numpy is fast at
    num_values = levels[0].size
    grain = _grain(1 << max(20, (2 * num_values - 1).bit_length()))
    for frame, deviation, offset in zip(
        levels, noise, rng.integers(len(grain) - num_values, size=len(levels)), strict=True
    ):
        frame += grain[offset : offset + num_values].reshape(frame.shape) * (255 * deviation)
    levels += 0.5
    return np.moveaxis(np.clip(levels, 0, 255).astype(np.uint8), 1, -1)


@functools.cache
def _grain(num: int) -> Floats:
    """Normal noise to cut pieces from: drawing it anew for every frame would cost more than the frame."""
    return np.random.default_rng(0).standard_normal(num, np.float32)


def degrade(
    frames: npt.NDArray[np.uint8], rng: np.random.Generator, jpeg_quality: int | None, *, noise: float = 0.0
) -> npt.NDArray[np.uint8]:
    """Do to RGB frames what a camera and its link do: sensor noise, then a JPEG there and back (None: no JPEG)."""
    import cv2

    noisy = frames
    if noise:
        noisy = quantise(frames.astype(np.float32) / 255, np.full(len(frames), noise, np.float32), rng)
    if jpeg_quality is None:
        return noisy
    out = np.empty_like(frames)
    for i, frame in enumerate(noisy):
        bgr = cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2BGR)
        done, packed = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, jpeg_quality])
        assert done, f"OpenCV did not encode a frame of {frame.shape}"
        out[i] = cv2.cvtColor(cv2.imdecode(packed, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    return out


class Clip(msgspec.Struct, frozen=True):
    """The truth beside a clip: what it shows, and when each frame was taken."""

    story: Story
    size: tuple[int, int]  # width and height
    fps: float
    codec: str
    times_s: tuple[float, ...]


def write_clip(story: Story, path: str | Path, *, fps: float = 8.0, size: tuple[int, int] = (320, 240)) -> Clip:
    """Film a story to an mp4 file, with the truth as JSON beside it (`<stem>.json`)."""
    import av

    path = Path(path)
    times_s = np.arange(math.floor(story.duration_s * fps)) / fps
    with av.open(str(path), "w") as film:
        track = _add_track(film, fps, size)
        for start in range(0, len(times_s), FRAMES_AT_ONCE):
            for picture in render(story, times_s[start : start + FRAMES_AT_ONCE], size, noise_seed=start):
                film.mux(track.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        film.mux(track.encode())
        codec = track.codec_context.name
    clip = Clip(story=story, size=size, fps=fps, codec=codec, times_s=tuple(times_s.tolist()))
    path.with_suffix(".json").write_bytes(msgspec.json.format(msgspec.json.encode(clip), indent=2))
    return clip


def _add_track(film: "av.container.OutputContainer", fps: float, size: tuple[int, int]) -> "av.VideoStream":
    """A video track in the best codec that this PyAV has."""
    import av

    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    track = film.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
    track.width, track.height = size
    track.pix_fmt = "yuv420p"
    if codec == "mpeg4":
        track.bit_rate = 8 * size[0] * size[1] * max(1, round(fps)) // 20
    else:
        track.options = {"crf": "20", "preset": "veryfast"}
    return track


def read_truth(path: str | Path) -> Story:
    """The story of a clip, from the JSON beside it; `path` is that of either file.

    Raises FileNotFoundError, or msgspec.DecodeError where the file is not what `write_clip` writes.
    """
    return read_clip(path).story


def read_clip(path: str | Path) -> Clip:
    """The whole truth of a clip, from the JSON beside it."""
    return msgspec.json.decode(Path(path).with_suffix(".json").read_bytes(), type=Clip)
