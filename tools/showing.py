"""Showing a scenario to a node over its sockets, and asking about it meanwhile.

Each script gets a stream of its own, which is removed afterwards. The times on the frames are the story's, so that a
showing is as fast as the node takes the frames, and the same at any speed.
"""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from ..protocol.camera import FramePublisher
from ..protocol.client import NodeClient
from ..protocol.errors import ErrorCode, NodeError, OnlookerError
from ..protocol.messages import UNSET, Answer, CacheInfo, Choice, StageTimings, StreamSpec, StreamStats, UnsetType
from .feed import Feed, Stamp
from .link import Link, stats_of
from .playback import STALLED_AFTER_S, StalledError
from .quantity import NS_PER_S, reasons_text
from .scenario import Keeping, Part, Query, Script, Setting
from .scene_questions import Quiz, is_right

MAX_ANSWER_TOKENS = 48  # six things, listed
NUM_ASKERS = 4  # of one client at once, by default, before the node is BUSY
POLL_S = 0.005

T = TypeVar("T")


class LostFramesError(OnlookerError):
    """Frames of a showing are not in the memory, so nobody can be asked about them."""

    def __init__(self, stats: StreamStats) -> None:
        message = f"after {stats.frames.encoded} frames stream {stats.stream} lost some: "
        message += reasons_text(stats.frames.dropped)
        if "memory_full" in stats.frames.dropped:
            message += "; give the node a larger stream_defaults.memory_bytes, or show fewer chunks"
        super().__init__(message)


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """A question, what came back, and the memory that it was asked of, before it and after it."""

    kind: str
    question: str
    wanted: str
    options: tuple[str, ...]
    right: bool
    before: CacheInfo
    after: CacheInfo
    answer: Answer
    choice: Choice | None
    age: int | None = None  # chunks since what was asked for was seen last, where that is what is measured

    @property
    def is_traceless(self) -> bool:
        """Whether the memory was the same after it, by the reply and by the node's account."""
        replies = [reply for reply in (self.answer, self.choice) if reply]
        return _extent(self.before) == _extent(self.after) and all(reply.memory.unchanged for reply in replies)


def _extent(cache: CacheInfo) -> tuple[int, ...]:
    """What chunks alone may change."""
    return cache.num_tokens, cache.logical_bytes, cache.num_chunks, cache.num_frames, cache.positions_used


class Showing(msgspec.Struct, frozen=True, kw_only=True):
    """One script, shown to the end."""

    seed: int
    setting: Setting
    asked: list[Asked]
    memory: CacheInfo
    stages: StageTimings
    num_storm: int  # questions between the chunks, beside those of the script
    num_storm_traces: int
    num_gated: int = 0  # frames


@dataclass(frozen=True, slots=True)
class Manner:
    """How a scenario is shown."""

    with_choices: bool = False  # every question is also asked as a choice
    num_storm: int = 0  # more questions after each chunk


def show(parts: Sequence[Part], node: NodeClient, link: Link, manner: Manner | None = None) -> Iterator[Showing]:
    """Show the parts of a scenario one after the other.

    Where a memory is to have a share of the bytes that everything takes, they are those of the last one before it that
    had all it wanted. Raises LostFramesError, StalledError, and the errors of the client and the publisher.
    """
    run = uuid.uuid4().hex[:8]
    whole_bytes = 0
    with ThreadPoolExecutor(NUM_ASKERS) as askers:
        for i, part in enumerate(parts):
            keeping = part.setting.keeping
            is_limited = keeping.share < 1 and not keeping.only_last  # which takes no more room than it has frames
            memory_bytes = int(keeping.share * whole_bytes) if is_limited else UNSET
            showing = _Stage(f"qa-{run}-{i}", part, node, askers, manner or Manner()).show(link, memory_bytes)
            if keeping.share == 1:
                whole_bytes = showing.memory.logical_bytes
            yield showing


class _Stage:
    """One stream of a node for the time of one showing."""

    def __init__(self, stream: str, part: Part, node: NodeClient, askers: ThreadPoolExecutor, manner: Manner) -> None:
        self._stream = stream
        self._script: Script = part.script
        self._setting: Setting = part.setting
        self._keeping: Keeping = part.setting.keeping
        self._node = node
        self._askers = askers
        self._manner = manner

    def show(self, link: Link, memory_bytes: int | UnsetType) -> Showing:
        """Add the stream, show the script, and remove the stream, whatever happens."""
        setting = self._setting
        self._node.add_stream(
            StreamSpec(
                stream=self._stream,
                chunk_frames=setting.chunk_frames,
                layout=setting.layout,
                stride=1,
                gate=self._keeping.gate,
                drop=self._keeping.drop,
                retention=self._keeping.retention,
                last_frames=self._keeping.last_frames(self._script.num_frames, setting.chunk_frames),
                memory_bytes=memory_bytes,
            )
        )
        try:
            with link.open([self._stream]) as (_, (publisher,)):
                asked, storm = self._play(publisher)
                publisher.end()
            stats = stats_of(self._node, self._stream)
        finally:
            self._node.remove_stream(self._stream)
        return Showing(
            seed=self._script.seed,
            setting=setting,
            asked=asked,
            memory=stats.cache,
            stages=stats.stages,
            num_storm=len(storm),
            num_storm_traces=sum(not reply.memory.unchanged for reply in storm),
            num_gated=stats.frames.dropped.get("gated", 0),
        )

    def _play(self, publisher: FramePublisher) -> tuple[list[Asked], list[Answer | Choice]]:
        """Publish chunk by chunk, at most two on their way, and ask whenever the script says so."""
        queries = {num: list(group) for num, group in itertools.groupby(self._script.queries, lambda q: q.num_frames)}
        size, num_sent = self._setting.chunk_frames, 0
        asked: list[Asked] = []
        storm: list[Answer | Choice] = []
        feed, pictures = Feed(publisher, "rgb8"), self._script.pictures()
        while num_sent < self._script.num_frames:
            num_sent = self._send(feed, list(itertools.islice(pictures, size)), num_sent)
            due = queries.get(num_sent, [])
            is_last = num_sent == self._script.num_frames
            cache = self._wait_encoded(num_sent if due or self._manner.num_storm or is_last else num_sent - size)
            asked += self._ask_all(due, cache)
            storm += self._storm(num_sent)
        return asked, storm

    def _send(self, feed: Feed, pictures: Sequence[npt.NDArray[np.uint8]], num_sent: int) -> int:
        for i, pixels in enumerate(pictures, num_sent):
            feed.send(pixels, Stamp(round(self._script.times_s[i] * NS_PER_S), "media"))
        return num_sent + len(pictures)

    def _wait_encoded(self, num_frames: int) -> CacheInfo:
        """Wait until so many frames were in the memory or were left out, where part of a chunk may wait for more."""
        slack = self._setting.chunk_frames - 1 if self._keeping.leaves_out else 0
        newest, progressed = -1, time.monotonic()
        while (num_done := self._num_done(stats := stats_of(self._node, self._stream))) < num_frames - slack:
            if num_done > newest:
                newest, progressed = num_done, time.monotonic()
            elif time.monotonic() - progressed > STALLED_AFTER_S:
                raise StalledError(stats)
            time.sleep(POLL_S)
        return stats.cache

    def _num_done(self, stats: StreamStats) -> int:
        """How many frames the memory has had, or was not meant to have. Raises LostFramesError for any other."""
        dropped = {reason: num for reason, num in stats.frames.dropped.items() if num}
        if not dropped.keys() <= self._keeping.leaves_out:
            raise LostFramesError(stats)
        return stats.cache.num_frames + stats.cache.num_forgotten_frames + sum(dropped.values())

    def _ask_all(self, queries: Sequence[Query], before: CacheInfo) -> list[Asked]:
        """Ask what is due at the same time; the node decodes it together."""
        replies = list(self._askers.map(self._ask, [query.quiz for query in queries]))
        after = self._node.cache_info(self._stream) if queries else before
        return [
            Asked(
                kind=quiz.kind,
                question=quiz.question,
                wanted=quiz.answer,
                options=quiz.options,
                right=is_right(quiz, answer.text),
                before=before,
                after=after,
                answer=answer,
                choice=choice,
                age=age,
            )
            for (_, quiz, age), (answer, choice) in zip(queries, replies, strict=True)
        ]

    def _ask(self, quiz: Quiz) -> tuple[Answer, Choice | None]:
        return self._answer(quiz), self._choose(quiz) if self._manner.with_choices else None

    def _answer(self, quiz: Quiz) -> Answer:
        return patiently(lambda: self._node.ask(self._stream, quiz.question, max_new_tokens=MAX_ANSWER_TOKENS))

    def _choose(self, quiz: Quiz) -> Choice:
        return patiently(lambda: self._node.ask_choice(self._stream, quiz.question, quiz.options))

    def _storm(self, num_frames: int) -> list[Answer | Choice]:
        """Ask many more questions, every fourth of them a choice."""
        quizzes = self._script.storm(num_frames, self._manner.num_storm)
        ways: list[Callable[[Quiz], Answer | Choice]] = [self._answer, self._answer, self._answer, self._choose]
        turns = zip(quizzes, itertools.cycle(ways), strict=False)
        return list(self._askers.map(lambda turn: turn[1](turn[0]), turns))


def patiently(ask: Callable[[], T]) -> T:
    """Ask again while the node is busy with the questions of others, for as long as a stalled stream would get."""
    deadline = time.monotonic() + STALLED_AFTER_S
    while True:
        try:
            return ask()
        except NodeError as error:
            if error.code != ErrorCode.BUSY or time.monotonic() > deadline:
                raise
            time.sleep((error.retry_after_ms or 100) / 1000)
