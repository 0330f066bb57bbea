"""How many of a scenario's questions were answered rightly, and whether choices lean to a place or to a length."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, TypeVar

import msgspec

from ..protocol.messages import Choice, OptionScore
from .scenario import Keeping, age_span, span_of
from .scene_questions import KINDS, Quiz, is_right
from .showing import Asked, Showing

RankBy = Literal["raw", "normalized", "calibrated"]

K = TypeVar("K")

RANKINGS: tuple[RankBy, ...] = ("raw", "normalized", "calibrated")
LENGTH_BOUNDS = (1, 2, 4, 8, 12, 16, 24, 32, 48)  # chunks; a bucket ends with each
SIGNIFICANT = 0.01


class Count(msgspec.Struct, frozen=True):
    """So many of so many."""

    num: int
    of: int

    @property
    def share(self) -> float:
        """NaN of none."""
        return self.num / self.of if self.of else math.nan

    def __str__(self) -> str:
        return f"{self.num} of {self.of}" + (f" ({self.share:.1%})" if self.of else "")


class KindScore(msgspec.Struct, frozen=True):
    """Right answers to one kind of question, by layout."""

    kind: str
    by_layout: dict[str, Count]
    all: Count


class LengthScore(msgspec.Struct, frozen=True):
    """Right answers from memories of `first` to `last` chunks, by layout."""

    first: int
    last: int
    by_layout: dict[str, Count]
    all: Count


class Score(msgspec.Struct, frozen=True):
    """Right answers in all, by kind and by length of the memory."""

    all: Count
    by_layout: dict[str, Count]
    kinds: list[KindScore]
    lengths: list[LengthScore]


def score(showings: Sequence[Showing]) -> Score:
    """Count what was answered rightly; kinds and lengths that never came are left out."""
    rows = [(showing, asked) for showing in showings for asked in showing.asked]
    kinds = _grouped(rows, lambda row: row[1].kind)
    lengths = _grouped(rows, lambda row: span_of(row[1].before.num_chunks, LENGTH_BOUNDS))
    return Score(
        _right(rows),
        _by_layout(rows),
        [KindScore(kind, _by_layout(kinds[kind]), _right(kinds[kind])) for kind in KINDS if kind in kinds],
        [LengthScore(first, last, _by_layout(its), _right(its)) for (first, last), its in sorted(lengths.items())],
    )


_Row = tuple[Showing, Asked]


def _grouped(rows: Iterable[_Row], key: Callable[[_Row], K]) -> dict[K, list[_Row]]:
    groups: dict[K, list[_Row]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return groups


def _right(rows: Sequence[_Row]) -> Count:
    return Count(sum(asked.right for _, asked in rows), len(rows))


def _by_layout(rows: Sequence[_Row]) -> dict[str, Count]:
    layouts = _grouped(rows, lambda row: row[0].setting.layout)
    return {layout: _right(layouts[layout]) for layout in sorted(layouts)}


# Choices


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """An option's place in the list: how often it was chosen, and how often the right one stood there."""

    index: int
    chosen: int
    right: int
    p: float  # of so large a difference by chance alone


class Lean(msgspec.Struct, frozen=True, kw_only=True):
    """Wrong choices under one way to rank: how many were shorter than the right option, how many longer (in tokens),
    and how many would be, were the wrong option picked blindly from those on offer."""

    rank_by: RankBy
    right: Count
    agreeing: Count  # with the free answer
    num_shorter: int
    shorter_expected: float
    shorter_p: float
    num_longer: int
    longer_expected: float
    longer_p: float

    @property
    def statement(self) -> str:
        """What the figures say, or that they are too few to say it."""
        num_wrong = self.right.of - self.right.num
        if num_wrong < 10:
            return f"{num_wrong} wrong: too few to tell"
        for word, num, expected, p in (
            ("shorter", self.num_shorter, self.shorter_expected, self.shorter_p),
            ("longer", self.num_longer, self.longer_expected, self.longer_p),
        ):
            if p < SIGNIFICANT and num > expected:
                return f"leans to {word} options"
        return "no lean beyond chance"


class ChoiceScore(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the questions that were also asked as choices."""

    rank_by: RankBy
    places: list[Place]
    leans: list[Lean]

    @property
    def is_place_neutral(self) -> bool:
        """Whether no place was preferred beyond chance, over all places together."""
        return min((place.p for place in self.places), default=1.0) * len(self.places) >= SIGNIFICANT


def score_choices(asked: Iterable[Asked]) -> ChoiceScore | None:
    """Count the choices under every way to rank; None where nothing was asked as a choice."""
    chosen = [(each, each.choice) for each in asked if each.choice is not None]
    if not chosen:
        return None
    num_places = max(len(each.options) for each, _ in chosen)
    return ChoiceScore(
        rank_by=chosen[0][1].rank_by,
        places=[_place(chosen, index) for index in range(num_places)],
        leans=[_lean(chosen, rank_by) for rank_by in RANKINGS],
    )


_Chosen = Sequence[tuple[Asked, Choice]]


def _place(chosen: _Chosen, index: int) -> Place:
    here = [choice.index == index for _, choice in chosen]
    right = [each.options.index(each.wanted) == index for each, _ in chosen]
    # The choices that were right say nothing about the place: the wrong ones went there, or away from there.
    num_to = sum(a and not b for a, b in zip(here, right, strict=True))
    num_away = sum(b and not a for a, b in zip(here, right, strict=True))
    return Place(index=index, chosen=sum(here), right=sum(right), p=sign_test(num_to, num_away))


def _lean(chosen: _Chosen, rank_by: RankBy) -> Lean:
    num_right = num_agreeing = num_shorter = num_longer = 0
    shorter, longer = [], []  # chance of each if a wrong option were picked blindly
    for asked, choice in chosen:
        best = max(choice.scores, key=lambda option: getattr(option, rank_by))
        num_agreeing += is_right(Quiz(asked.kind, "", best.option, ()), asked.answer.text)
        if best.option == asked.wanted:
            num_right += 1
            continue
        length = _length_of(choice.scores, asked.wanted)
        others = [option.num_tokens for option in choice.scores if option.option != asked.wanted]
        shorter.append(sum(other < length for other in others) / len(others))
        longer.append(sum(other > length for other in others) / len(others))
        num_shorter += best.num_tokens < length
        num_longer += best.num_tokens > length
    return Lean(
        rank_by=rank_by,
        right=Count(num_right, len(chosen)),
        agreeing=Count(num_agreeing, len(chosen)),
        num_shorter=num_shorter,
        shorter_expected=sum(shorter),
        shorter_p=surprise(num_shorter, shorter),
        num_longer=num_longer,
        longer_expected=sum(longer),
        longer_p=surprise(num_longer, longer),
    )


def _length_of(scores: Sequence[OptionScore], option: str) -> int:
    return next(score.num_tokens for score in scores if score.option == option)


def sign_test(num_a: int, num_b: int) -> float:
    """Chance of so uneven a split, either way, if both were equally likely."""
    num = num_a + num_b
    tail = sum(math.comb(num, k) for k in range(min(num_a, num_b) + 1)) / 2**num
    return min(1.0, 2 * tail)


def surprise(num: int, chances: Sequence[float]) -> float:
    """Chance of a count so far from its expectation, either way, if it sums trials of these chances (normal)."""
    variance = sum(chance * (1 - chance) for chance in chances)
    if variance == 0:
        return 1.0
    return math.erfc(abs(num - sum(chances)) / math.sqrt(2 * variance))


# Settings against each other


class SettingScore(msgspec.Struct, frozen=True, kw_only=True):
    """One setting's part of a comparison; means over its showings and their questions."""

    layout: str
    chunk_frames: int
    right: Count
    frames: float
    tokens: float
    logical_bytes: float
    encode_ms: float  # a frame, on the node: preprocessing, vision tower, prefill
    first_token_ms: float
    answer_ms: float


def compare(showings: Sequence[Showing]) -> list[SettingScore]:
    """A row for each setting, in the order in which they were shown."""
    settings = list(dict.fromkeys(showing.setting for showing in showings))
    return [_setting_score([showing for showing in showings if showing.setting == setting]) for setting in settings]


def _setting_score(showings: Sequence[Showing]) -> SettingScore:
    setting = showings[0].setting
    asked = [each for showing in showings for each in showing.asked]
    timings = [each.answer.timing for each in asked]
    return SettingScore(
        layout=setting.layout,
        chunk_frames=setting.chunk_frames,
        right=Count(sum(each.right for each in asked), len(asked)),
        frames=_mean(showing.memory.num_frames for showing in showings),
        tokens=_mean(showing.memory.num_tokens for showing in showings),
        logical_bytes=_mean(showing.memory.logical_bytes for showing in showings),
        encode_ms=_mean(encode_ms(showing) for showing in showings),
        first_token_ms=_mean(timing.first_token_ms for timing in timings),
        answer_ms=_mean(timing.total_ms for timing in timings),
    )


def encode_ms(showing: Showing) -> float:
    """Milliseconds a frame on the node, over the last chunks; NaN where the node does not say."""
    stages = showing.stages
    parts = [stages.preprocess_ms, stages.vision_ms, stages.prefill_ms]
    known = [part for part in parts if isinstance(part, float)]
    return sum(known) / showing.setting.chunk_frames if len(known) == len(parts) else math.nan


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else math.nan


# Ways to keep against each other


class AgeScore(msgspec.Struct, frozen=True):
    """Right answers about what was seen last `first` to `last` chunks ago."""

    first: int
    last: int
    right: Count


class RecallScore(msgspec.Struct, frozen=True, kw_only=True):
    """What one way to keep remembers; memories are those at the ends of its showings, in the mean."""

    layout: str
    keeping: Keeping
    right: Count
    ages: list[AgeScore]
    logical_bytes: float
    seconds: float  # between the oldest and the newest frame that are left
    gated_frames: float
    dropped_tokens: float


def score_recall(showings: Sequence[Showing]) -> list[RecallScore]:
    """A row for each layout and way to keep, in the order in which they were shown."""
    groups: dict[tuple[str, Keeping], list[Showing]] = defaultdict(list)
    for showing in showings:
        groups[showing.setting.layout, showing.setting.keeping].append(showing)
    return [_recall_score(layout, keeping, its) for (layout, keeping), its in groups.items()]


def _recall_score(layout: str, keeping: Keeping, showings: Sequence[Showing]) -> RecallScore:
    rows = [(showing, asked) for showing in showings for asked in showing.asked if asked.age is not None]
    ages = _grouped(rows, lambda row: age_span(row[1].age or 0))
    memories = [showing.memory for showing in showings]
    return RecallScore(
        layout=layout,
        keeping=keeping,
        right=_right(rows),
        ages=[AgeScore(first, last, _right(its)) for (first, last), its in sorted(ages.items())],
        logical_bytes=_mean(memory.logical_bytes for memory in memories),
        seconds=_mean(memory.seconds or 0.0 for memory in memories),
        gated_frames=_mean(showing.num_gated for showing in showings),
        dropped_tokens=_mean(memory.num_dropped_tokens for memory in memories),
    )
