"""What is shown to a node, and what it is asked meanwhile: scripts made from held-out stories, the same for a seed."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from ..protocol.messages import RetentionName
from .scene_questions import KINDS, Quiz, ask_about, ask_back, three_rounds
from .scenes import FRAMES_AT_ONCE, render
from .story import Story, make_camera_story, make_story

Layout = Literal["native", "turns"]

LAYOUTS: tuple[Layout, ...] = ("native", "turns")
CHUNK_FRAMES = (1, 2, 4, 6, 8)
CAMERA_SIZES = ((320, 240), (320, 180), (240, 240), (240, 320), (180, 320))  # width, height

ROUND_FRAMES = 2
JITTER = 0.02  # of a frame's time

# A fixed camera, before which now and then something is, and half of the time nothing.
FIXED_FPS = 2.0
FIXED_SHOW_CHUNKS = 2  # or longer
FIXED_GAP_CHUNKS = 3
MAX_FIXED_THINGS = 6
MIN_RECALL_CHUNKS = 16  # so that a share of their memory holds more than a chunk
OPENING_CHUNKS = 2  # the opening of the prompt takes the room of so many

AGE_BOUNDS = (0, 4, 8, 16, 24, 32, 48)  # chunks; a span of ages ends with each


class Keeping(msgspec.Struct, frozen=True):
    """What of a stream its memory takes in, and what of that stays."""

    name: str
    retention: RetentionName = "stop"
    gate: float = 0.0  # grey levels
    drop: float = 1.0  # cosine similarity
    share: float = 1.0  # of the bytes that everything takes
    only_last: bool = False  # the last frames that have room are all that the model is shown

    @property
    def leaves_out(self) -> set[str]:
        """Why frames are dropped that the memory is not meant to take in."""
        reasons = {"gated"} if self.gate else set()
        is_filled = self.share < 1 and self.retention == "stop" and not self.only_last
        return reasons | {"memory_full"} if is_filled else reasons

    def last_frames(self, num_frames: int, chunk_frames: int) -> int:
        """Of so many frames, those that the model is shown anew with each chunk; 0: none anew."""
        num_chunks = max(1, int(self.share * num_frames) // chunk_frames - OPENING_CHUNKS)
        return num_chunks * chunk_frames if self.only_last else 0


ROOM = 1 / 4
EVERYTHING = Keeping("everything")
KEEPINGS = (
    EVERYTHING,
    Keeping("stop", share=ROOM),
    Keeping("window", "window", share=ROOM),
    Keeping("thin", "thin", share=ROOM),
    Keeping("gate + window", "window", gate=10.0, share=ROOM),
    Keeping("drop + window", "window", drop=0.95, share=ROOM),
    Keeping("gate + drop + thin", "thin", gate=10.0, drop=0.95, share=ROOM),
    Keeping("last frames", share=ROOM, only_last=True),
)


class Setting(msgspec.Struct, frozen=True):
    """How a stream is encoded."""

    layout: Layout
    chunk_frames: int
    keeping: Keeping = EVERYTHING

    @property
    def has_clock(self) -> bool:
        """Whether every model can tell the time: within one open video it is in the positions."""
        return self.layout == "native" and self.chunk_frames > 1

    def __str__(self) -> str:
        return f"{self.layout}, {self.chunk_frames} frames a chunk"


class Query(NamedTuple):
    """A question, and after how many frames it is asked."""

    num_frames: int
    quiz: Quiz
    age: int | None = None  # chunks since what it asks for was seen last, where that is what is measured


@dataclass(frozen=True, slots=True)
class Script:
    """Frames of one story, and the questions about them, oldest first."""

    seed: int
    story: Story
    times_s: tuple[float, ...]
    size: tuple[int, int]  # width, height
    queries: tuple[Query, ...]

    @property
    def num_frames(self) -> int:
        return len(self.times_s)

    def pictures(self) -> Iterator[npt.NDArray[np.uint8]]:
        """Each frame, uint8, RGB, (height, width, 3)."""
        for start in range(0, self.num_frames, FRAMES_AT_ONCE):
            times_s = self.times_s[start : start + FRAMES_AT_ONCE]
            yield from render(self.story, times_s, self.size, noise_seed=self.seed + start)

    def storm(self, num_frames: int, num_questions: int) -> list[Quiz]:
        """More questions after so many frames, of any kind."""
        rng = np.random.default_rng([6, self.seed, num_frames])
        shown_s = self.times_s[:num_frames]
        drawn = (ask_about(self.story, shown_s, rng, phrasings="test") for _ in itertools.count())
        return list(itertools.islice((quiz for quiz in drawn if quiz), num_questions))


class Part(NamedTuple):
    """One showing of a scenario: a script, in a setting."""

    script: Script
    setting: Setting


def rounds_scenario(seed: int, num_times: int, setting: Setting) -> list[Part]:
    """Three rounds of two frames and a question, so many times with seeds that follow each other.

    Raises ValueError for a setting whose chunks are longer than a round.
    """
    if setting.chunk_frames not in (1, ROUND_FRAMES):
        raise ValueError(f"a round has {ROUND_FRAMES} frames: chunks of {setting.chunk_frames} would wait for more")
    return [Part(_rounds_script(seed + i), setting) for i in range(num_times)]


def _rounds_script(seed: int) -> Script:
    rounds = list(three_rounds(seed))
    ends = itertools.accumulate(len(each.times_s) for each in rounds)
    return Script(
        seed=seed,
        story=rounds[0].story,
        times_s=tuple(time_s for each in rounds for time_s in each.times_s),
        size=CAMERA_SIZES[seed % len(CAMERA_SIZES)],
        queries=tuple(Query(end, each.quiz) for end, each in zip(ends, rounds, strict=True)),
    )


def stories_scenario(
    seed: int, num_streams: int, lengths: Sequence[int], num_questions: int, settings: Sequence[Setting]
) -> list[Part]:
    """Streams of one story each; lengths (in chunks) and settings take turns, and each kind comes about as often."""
    asked: dict[Layout, Counter[str]] = defaultdict(Counter)
    parts = []
    for i, setting in zip(range(num_streams), itertools.cycle(settings), strict=False):
        # Settings change from stream to stream, lengths once every setting had its turn.
        num_chunks = lengths[i // len(settings) % len(lengths)]
        script = _story_script(
            _story_seed(seed, i),
            num_chunks * setting.chunk_frames,
            setting.chunk_frames,
            num_questions,
            asked[setting.layout],
            has_clock=setting.has_clock,
        )
        parts.append(Part(script, setting))
    return parts


def comparison(
    seed: int, num_streams: int, num_frames: Sequence[int], num_questions: int, settings: Sequence[Setting]
) -> list[Part]:
    """The same scripts in every setting, with questions where a chunk ends in all of them.

    Raises ValueError for a number of frames that is no multiple of every chunk's.
    """
    step = math.lcm(*(setting.chunk_frames for setting in settings))
    for num in num_frames:
        if num % step:
            raise ValueError(f"{num} frames are no whole chunks in every setting: a multiple of {step} would be")
    has_clock = all(setting.has_clock for setting in settings)
    asked: Counter[str] = Counter()
    scripts = [
        _story_script(_story_seed(seed, i), num, step, num_questions, asked, has_clock=has_clock)
        for i, num in zip(range(num_streams), itertools.cycle(num_frames), strict=False)
    ]
    return [Part(script, setting) for setting in settings for script in scripts]


def _story_seed(seed: int, index: int) -> int:
    return 100_000 * seed + index


def _story_script(
    seed: int, num_frames: int, step: int, num_questions: int, asked: Counter[str], *, has_clock: bool
) -> Script:
    """A held-out story with questions after multiples of `step` frames, the kinds that `asked` has least of first."""
    rng = np.random.default_rng([5, seed])
    fps = float(rng.choice([1.0, 2.0, 4.0, 8.0], p=[0.2, 0.45, 0.25, 0.1]))
    times_s = (np.arange(num_frames) + rng.uniform(-JITTER, JITTER, num_frames)) / fps
    times_s -= times_s[0]
    story = make_camera_story(seed, split="test", duration_s=float(times_s[-1]) + 1 / fps, fps=fps)
    queries = []
    for moment in np.sort(rng.integers(1, num_frames // step + 1, num_questions)).tolist():
        shown_s = times_s[: moment * step]
        for kind in sorted(KINDS, key=lambda kind: (asked[kind], rng.random())):
            quiz = ask_about(story, shown_s, rng, kind=kind, clock=has_clock, phrasings="test")
            if quiz is not None:
                asked[kind] += 1
                queries.append(Query(moment * step, quiz))
                break
    size = CAMERA_SIZES[int(rng.integers(len(CAMERA_SIZES)))]
    return Script(seed, story, tuple(times_s.tolist()), size, tuple(queries))


def recall(
    seed: int, num_streams: int, lengths: Sequence[int], num_questions: int, settings: Sequence[Setting]
) -> list[Part]:
    """The same fixed cameras in every setting, asked in the later half of each about things of all ages equally often.

    Each script is shown in all settings before the next one. The lengths are in chunks, of one size in all settings.
    Raises ValueError for one that is too short to forget anything.
    """
    if min(lengths) < MIN_RECALL_CHUNKS:
        raise ValueError(f"{min(lengths)} chunks are too few to forget some: {MIN_RECALL_CHUNKS} would do")
    size = settings[0].chunk_frames
    asked: Counter[tuple[int, int]] = Counter()
    scripts = [
        _recall_script(_story_seed(seed, i), num_chunks, size, num_questions, asked)
        for i, num_chunks in zip(range(num_streams), itertools.cycle(lengths), strict=False)
    ]
    return [Part(script, setting) for script in scripts for setting in settings]


def _recall_script(
    seed: int, num_chunks: int, size: int, num_questions: int, asked: Counter[tuple[int, int]]
) -> Script:
    """A question after each of some chunks, about a thing of the age that `asked` has least of."""
    rng = np.random.default_rng([8, seed])
    times_s = np.arange(num_chunks * size) / FIXED_FPS
    chunk_s = size / FIXED_FPS
    story = make_story(
        seed,
        split="test",
        duration_s=num_chunks * chunk_s,
        num_things=min(MAX_FIXED_THINGS, num_chunks // (FIXED_SHOW_CHUNKS + FIXED_GAP_CHUNKS)),
        min_show_s=FIXED_SHOW_CHUNKS * chunk_s,
        gap_s=FIXED_GAP_CHUNKS * chunk_s,
        returning=0.0,
    )
    late = np.arange(num_chunks // 2, num_chunks) + 1
    queries = []
    for moment in np.sort(rng.permutation(late)[:num_questions]).tolist():
        num_frames = moment * size
        known = ask_back(story, times_s[:num_frames], rng, phrasings="test")
        ages = [each.num_frames_ago // size for each in known]
        if known:
            i = min(range(len(known)), key=lambda i: (asked[age_span(ages[i])], rng.random()))
            asked[age_span(ages[i])] += 1
            queries.append(Query(num_frames, known[i].quiz, ages[i]))
    size_px = CAMERA_SIZES[int(rng.integers(len(CAMERA_SIZES)))]
    return Script(seed, story, tuple(times_s.tolist()), size_px, tuple(queries))


def age_span(age: int) -> tuple[int, int]:
    """The first and the last age, in chunks, of those that are counted together with this one."""
    return span_of(age, AGE_BOUNDS, 0)


def span_of(num: int, bounds: Sequence[int], first: int = 1) -> tuple[int, int]:
    """The first and the last number of the span that a number is in; beyond the bounds, spans double."""
    for last in bounds:
        if num <= last:
            return first, last
        first = last + 1
    doubled = bounds[-1]
    while num > 2 * doubled:
        doubled *= 2
    return doubled + 1, 2 * doubled
