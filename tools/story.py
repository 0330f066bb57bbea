"""What happens before a synthetic camera: coloured shapes that come, move and go before a muted background.

story = make_story(7, duration_s=20, num_things=4)
[thing.name for thing in story.things]  # "red circle", ...
"""

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Split = Literal["train", "test"]
Rgb = tuple[float, float, float]  # 0..1

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

    def gain_at(self, time_s: npt.ArrayLike) -> npt.NDArray[np.float32]:
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


def make_camera_story(seed: int, *, split: Split, duration_s: float, fps: float) -> Story:
    """A story for a camera of so many frames a second: what appears is there for two frames at least.

    Up to eight things, seldom none; with or without empty stretches between them.
    """
    rng = np.random.default_rng([7, seed])
    show_s = float(rng.choice([2, 4, 6], p=[0.25, 0.4, 0.35])) / fps
    gap_s = float(rng.choice([0, 1, 3])) / fps
    if duration_s < show_s + gap_s:
        show_s, gap_s = 2 / fps, 0.0
    room = int(duration_s / (show_s + gap_s) + 1e-6)
    fewest = 0 if rng.random() < 0.08 else min(1, room)
    num_things = int(rng.integers(fewest, min(8, room) + 1))
    # Times jitter: the last frame may be early by a hair.
    show_s = min(show_s, (1 - 1e-6) * duration_s / max(1, num_things) - gap_s)
    return make_story(seed, split=split, duration_s=duration_s, num_things=num_things, min_show_s=show_s, gap_s=gap_s)


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
    test = split == "test"
    if kind == "gradient":
        cycles = rng.uniform(0.40, 0.50) if test else rng.uniform(0.25, 0.38)
        return (_wave(1.0, cycles, heading, phase),), 1.0
    if kind == "noise":
        cycles = rng.uniform(1.7, 2.2, NUM_WAVES) if test else rng.uniform(0.6, 1.6, NUM_WAVES)
        headings, phases = rng.uniform(0, 2 * math.pi, (2, NUM_WAVES))
        return tuple(_wave(0.45, *each) for each in zip(cycles, headings, phases, strict=True)), 1.0
    cycles = rng.uniform(5.2, 6.5) if test else rng.choice([rng.uniform(2.0, 5.0), rng.uniform(6.8, 9.0)])
    if kind == "stripes":
        return (_wave(1.0, cycles, heading, phase),), float(rng.uniform(1.5, 5.0))
    # A checker: two waves across each other, their sum cut off. Its fields stand on their corners to both.
    cycles /= math.sqrt(2)
    both = _wave(0.5, cycles, heading, phase), _wave(0.5, cycles, heading + math.pi / 2, phase)
    return both, float(rng.uniform(3.0, 8.0))


def _wave(amplitude: float, cycles: float, heading: float, phase: float) -> Wave:
    return Wave(amplitude, float(cycles * math.cos(heading)), float(cycles * math.sin(heading)), float(phase))


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
