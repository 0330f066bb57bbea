"""An exam: a scenario shown to a node, its answers scored, and what must hold of its memory checked.

plan = Plan("rounds", rounds_scenario(0, 1, Setting("native", 2)), min_accuracy=1.0)
report = examine(plan, client, link)
report.held, report.score.all
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import msgspec
from msgspec import UNSET

from ..protocol.client import NodeClient
from ..protocol.messages import CacheInfo
from .check import Check
from .link import Link
from .scenario import Part
from .score import ChoiceScore, Count, RecallScore, Score, SettingScore, compare, score, score_choices, score_recall
from .showing import Asked, Manner, Showing, show

Track = Callable[[Iterator[Showing], int], Iterable[Showing]]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is shown, how it is asked, and what share of the answers has to be right."""

    scenario: str
    parts: Sequence[Part]
    with_choices: bool = False
    num_storm: int = 0  # further questions after each chunk, in a second showing of everything
    min_accuracy: float = 0.0
    compares: bool = False  # the parts are the same scripts in several settings
    forgets: bool = False  # the settings are ways to keep, which is what is compared


class Storm(msgspec.Struct, frozen=True, kw_only=True):
    """The second showing, with many more questions between the chunks, against the first."""

    num_questions: int
    num_traces: int
    same_answers: Count
    same_memories: Count  # by the fingerprints of the memories that were asked
    score: Score


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything an exam found out."""

    scenario: str
    model: str
    device: str
    notice: str | None
    score: Score
    choices: ChoiceScore | None
    comparison: list[SettingScore]
    storm: Storm | None
    checks: list[Check]
    seconds: float
    showings: list[Showing]
    recall: list[RecallScore] = []

    @property
    def held(self) -> bool:
        return all(check.held for check in self.checks)

    @property
    def asked(self) -> list[Asked]:
        return [asked for showing in self.showings for asked in showing.asked]


def as_it_comes(showings: Iterator[Showing], num: int) -> Iterable[Showing]:
    """Tell nobody how far it is."""
    return showings


def examine(plan: Plan, node: NodeClient, link: Link, track: Track = as_it_comes) -> Report:
    """Show the plan's parts to a node, twice if there is to be a storm, and score what it says.

    `track` goes through the showings, and may tell how far they are. Raises as `show` does.
    """
    started = time.monotonic()
    manner = Manner(with_choices=plan.with_choices)
    showings = list(track(show(plan.parts, node, link, manner), len(plan.parts)))
    storm = None
    if plan.num_storm:
        stormy = show(plan.parts, node, link, Manner(num_storm=plan.num_storm))
        storm = _storm(showings, list(track(stormy, len(plan.parts))))
    hello, scored = node.hello(), score(showings)
    checks = [check_traces(showings)]
    checks += [check_room(showings)] if plan.forgets else [check_growth(showings), check_bytes(showings)]
    if plan.min_accuracy:
        checks.insert(0, check_answers(scored.all, plan.min_accuracy))
    return Report(
        scenario=plan.scenario,
        model=hello.model,
        device=hello.device,
        notice=None if hello.notice is UNSET else hello.notice,
        score=scored,
        choices=score_choices(asked for showing in showings for asked in showing.asked),
        comparison=compare(showings) if plan.compares else [],
        storm=storm,
        checks=[*checks, *([] if storm is None else [check_storm(storm)])],
        seconds=time.monotonic() - started,
        showings=showings,
        recall=score_recall(showings) if plan.forgets else [],
    )


def _storm(calm: Sequence[Showing], stormy: Sequence[Showing]) -> Storm:
    pairs = [pair for one, other in zip(calm, stormy, strict=True) for pair in zip(one.asked, other.asked, strict=True)]
    same_answers = sum(a.answer.text == b.answer.text for a, b in pairs)
    same_memories = sum(a.answer.memory.fingerprint_before == b.answer.memory.fingerprint_before for a, b in pairs)
    return Storm(
        num_questions=sum(showing.num_storm for showing in stormy),
        num_traces=sum(showing.num_storm_traces + sum(not a.is_traceless for a in showing.asked) for showing in stormy),
        same_answers=Count(same_answers, len(pairs)),
        same_memories=Count(same_memories, len(pairs)),
        score=score(stormy),
    )


def check_answers(right: Count, min_accuracy: float) -> Check:
    """Whether enough of the answers are right."""
    promise = "every answer is right" if min_accuracy == 1 else f"at least {min_accuracy:.4g} of the answers are right"
    return Check(promise=promise, held=right.of > 0 and right.share >= min_accuracy, figures=str(right))


def check_traces(showings: Sequence[Showing]) -> Check:
    """Whether the memory was the same after each question as before it, by the replies and by the node's account."""
    asked = [each for showing in showings for each in showing.asked]
    unchanged = Count(sum(each.is_traceless for each in asked), len(asked))
    figures = f"memory unchanged by {unchanged.num} of {unchanged.of} questions"
    return Check(promise="no question left a trace", held=unchanged.num == unchanged.of, figures=figures)


def check_growth(showings: Sequence[Showing]) -> Check:
    """Whether each memory that had been shown more frames held them all, in more tokens."""
    steps = list(_steps(showings))
    grown = sum(late.num_frames > early.num_frames and late.num_tokens > early.num_tokens for early, late in steps)
    return Check(
        promise="the memory grows in between", held=grown == len(steps), figures=f"{grown} of {len(steps)} times"
    )


def check_bytes(showings: Sequence[Showing]) -> Check:
    """Whether the measured bytes are those of the tokens, and rise with them."""
    caches = [each.before for showing in showings for each in showing.asked]
    whole = sum(cache.logical_bytes == cache.num_tokens * cache.bytes_per_token > 0 for cache in caches)
    risen = all(late.logical_bytes > early.logical_bytes for early, late in _steps(showings))
    figures = f"bytes are those of the tokens {whole} of {len(caches)} times"
    return Check(promise="the bytes rise with it", held=risen and whole == len(caches), figures=figures)


def check_room(showings: Sequence[Showing]) -> Check:
    """Whether of each script all memories but the one that keeps everything had the same bytes, and took no more."""
    limited = [showing for showing in showings if showing.setting.keeping.share < 1]
    rooms: dict[tuple[int, str], set[int]] = defaultdict(set)
    for showing in limited:
        if not showing.setting.keeping.only_last:
            rooms[showing.seed, showing.setting.layout].add(showing.memory.resident_bytes)
    within = [
        asked.before.logical_bytes <= min(rooms[showing.seed, showing.setting.layout], default=0)
        for showing in limited
        for asked in showing.asked
    ]
    num_same = sum(len(sizes) == 1 for sizes in rooms.values())
    return Check(
        promise="every way to keep has the same bytes",
        held=num_same == len(rooms) and all(within),
        figures=f"one size in {num_same} of {len(rooms)} streams; within it {sum(within)} of {len(within)} times",
    )


def check_storm(storm: Storm) -> Check:
    """Whether everything was as if nobody had asked between the chunks."""
    answers, memories = storm.same_answers, storm.same_memories
    figures = (
        f"{storm.num_questions} more questions, {storm.num_traces} traces; "
        f"same answer {answers}, same memory {memories}"
    )
    held = storm.num_traces == 0 and answers.num == answers.of and memories.num == memories.of
    return Check(promise="a storm of questions changes nothing", held=held, figures=figures)


def _steps(showings: Sequence[Showing]) -> Iterator[tuple[CacheInfo, CacheInfo]]:
    """The memories of a stream at one moment it was asked about and at the next."""
    for showing in showings:
        moments = {asked.before.num_chunks: asked.before for asked in showing.asked}
        yield from itertools.pairwise(moments.values())
