"""Training batches: synthetic streams as the engine would lay them out, with questions branching off them.

A row is one stream, chunk after chunk, followed by its questions. Every question sees the stream up to the
chunk after which it is asked, and itself, but no other question: what a branch sees in the engine. Ids and
positions come from the node's own layouts, so the model is trained on exactly what it will be given.
"""

import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from ..node.layout import LAYOUTS, Format, LayoutState, Patches, Span
from ..tools.scene_questions import KINDS, Quiz, Seen, ask_about
from ..tools.scenes import pack
from ..tools.story import COLOURS, SHAPES, Split, Story, Thing, make_camera_story

# Merged tokens (rows, columns) of the encode sizes that a camera of usual shape gets; see the processor config.
GRIDS = ((4, 4), (3, 5), (3, 4), (5, 3), (4, 3))
CHUNK_FRAMES = np.array([1, 2, 4, 6, 8])
CHUNK_ODDS = np.array([0.15, 0.2, 0.35, 0.1, 0.2])
NATIVE_ODDS = 0.6
IGNORE = -100
# What visual tokens are to know of the past, and with how many classes: see `past_of`.
MAX_SECONDS, MAX_THINGS = 200, 9
PAST = {
    "shape before": len(SHAPES) + 1,
    "colour before": len(COLOURS) + 1,
    "tens": MAX_SECONDS // 10,
    "ones": 10,
    "number": MAX_THINGS,
}


@dataclass(frozen=True, slots=True)
class Plan:
    """How hard the streams of a batch may be; training widens it step by step."""

    tokens: int = 96_000  # a batch, over all rows
    max_patches: int = 48
    min_patches: int = 1
    num_questions: int = 16  # a stream
    kinds: tuple[str, ...] = tuple(KINDS)
    max_rows: int = 96


class Shape(NamedTuple):
    """What all rows of a batch have in common."""

    layout: str
    chunk_frames: int
    num_chunks: int
    grid: tuple[int, int]

    @property
    def num_frames(self) -> int:
        return self.chunk_frames * self.num_chunks

    @property
    def num_patches(self) -> int:
        return self.num_frames // self.frames_per_patch

    @property
    def frames_per_patch(self) -> int:
        return 1 if self.chunk_frames == 1 else 2

    @property
    def has_clock(self) -> bool:
        """Whether positions tell the time."""
        return self.layout == "native" and self.chunk_frames > 1


class Batch(NamedTuple):
    """One batch as arrays; b rows of s tokens, of which the first `num_stream` are the stream."""

    shape: Shape
    scenes: Any  # SceneArrays over b * num_frames frames
    ids: np.ndarray  # (b, s) int64
    positions: np.ndarray  # (3, b, s) int64
    visual: np.ndarray  # (s,) bool, the same in every row
    branch: np.ndarray  # (b, s) int16: 0 for the stream, then one number for each question
    limit: np.ndarray  # (b, s) int32: how many tokens of the stream are visible
    labels: np.ndarray  # (b, s) int64: the next token where an answer is to be learned, else IGNORE
    kinds: np.ndarray  # (b, s) int16: index into KINDS where there is a label, else -1
    truth: np.ndarray  # (b, num_patches, rows * columns, 7) what covers each visual token; see `_truth`
    past: np.ndarray  # (b, num_patches, rows * columns, len(PAST)) int64: what was before it; see `past_of`


class Streams(IterableDataset):
    """Endless random batches, different in every worker; what they ask for may be changed while workers run."""

    def __init__(self, form: Format, seed: int, plans: Sequence[Plan]) -> None:
        self._form = form
        self._seed = seed
        self._plans = plans
        self.current = multiprocessing.Value("i", 0)  # which of the plans
        self.odds = multiprocessing.Array("d", [1.0] * len(KINDS))  # how often each kind is asked, relatively

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        """Batches, each with the number of its plan."""
        worker = get_worker_info()
        rng = np.random.default_rng([self._seed, worker.id if worker else 0])
        while True:
            number = self.current.value
            yield number, make_batch(self._form, rng, self._plans[number], odds=self.odds[:])


def make_batch(
    form: Format, rng: np.random.Generator, plan: Plan, split: Split = "train", odds: Sequence[float] | None = None
) -> Batch:
    """One random batch within the plan's budget; `odds` say how often each of KINDS is asked, relatively."""
    odds = odds or [1.0] * len(KINDS)
    chances = {kind: chance for kind, chance in zip(KINDS, odds, strict=True) if kind in plan.kinds}
    shape = _shape(rng, plan)
    num_stream = _stream_tokens(form, shape)
    num_rows = max(4, min(plan.max_rows, plan.tokens // (num_stream + 28 * plan.num_questions)))
    rows = [_row(form, rng, plan, shape, split, chances) for _ in range(num_rows)]
    longest = -(-max(len(row.ids) for row in rows) // 8) * 8  # kernels of attention copy masks of other lengths
    return Batch(
        shape,
        pack([row.story for row in rows], [row.times_s for row in rows]),
        _padded([row.ids for row in rows], longest, 0),
        np.stack([_padded([row.positions[axis] for row in rows], longest, 0) for axis in range(3)]),
        np.append(rows[0].visual, np.zeros(longest - len(rows[0].visual), bool)),
        _padded([row.branch for row in rows], longest, -1).astype(np.int16),
        _padded([row.limit for row in rows], longest, 0).astype(np.int32),
        _padded([row.labels for row in rows], longest, IGNORE),
        _padded([row.kinds for row in rows], longest, -1).astype(np.int16),
        np.stack([_truth(row.story, row.times_s, shape) for row in rows]),
        np.stack([past_of(row.story, row.times_s, shape) for row in rows]),
    )


class _Row(NamedTuple):
    story: Story
    times_s: np.ndarray
    ids: np.ndarray
    positions: np.ndarray
    visual: np.ndarray  # the stream's part
    branch: np.ndarray
    limit: np.ndarray
    labels: np.ndarray
    kinds: np.ndarray


def _shape(rng: np.random.Generator, plan: Plan) -> Shape:
    chunk_frames = int(rng.choice(CHUNK_FRAMES, p=CHUNK_ODDS))
    patches_per_chunk = max(1, chunk_frames // 2)
    # Lengths are spread evenly on a log scale: short streams are many, long ones never absent.
    num_patches = round(np.exp(rng.uniform(np.log(plan.min_patches), np.log(plan.max_patches))))
    num_chunks = min(48, max(1, num_patches // patches_per_chunk))
    layout = "native" if rng.random() < NATIVE_ODDS else "turns"
    grid = GRIDS[int(rng.integers(len(GRIDS)))]
    return Shape(layout, chunk_frames, num_chunks, grid)


def _stream_tokens(form: Format, shape: Shape) -> int:
    overhead = 20 + (0 if shape.has_clock else 9 * shape.num_chunks)
    return shape.num_patches * shape.grid[0] * shape.grid[1] + overhead


def _row(
    form: Format, rng: np.random.Generator, plan: Plan, shape: Shape, split: Split, chances: dict[str, float]
) -> _Row:
    fps = float(rng.choice([1.0, 2.0, 4.0, 8.0], p=[0.2, 0.45, 0.25, 0.1]))
    times_s = np.arange(shape.num_frames) / fps + rng.uniform(-0.02, 0.02, shape.num_frames) / fps
    times_s -= times_s[0]
    seed = int(rng.integers(1 << 31))
    story = make_camera_story(seed, split=split, duration_s=float(times_s[-1] + 1 / fps), fps=fps)
    spans, states = lay_out(form, shape, times_s)
    stream = Span.joined(spans)
    ends = np.cumsum([len(span) for span in spans])
    branches = []
    for number in range(1, plan.num_questions + 1):
        quiz, chunk = _quiz(rng, chances, shape, story, times_s, split)
        if quiz is not None:
            branches.append(_branch(form, shape, states[chunk], quiz, number, int(ends[chunk])))
    num = len(stream)
    none = np.full(num, IGNORE)
    return _Row(
        story,
        times_s,
        np.concatenate([stream.ids, *(b.ids for b in branches)]),
        np.concatenate([stream.positions, *(b.positions for b in branches)], axis=1),
        stream.visual,
        np.concatenate([np.zeros(num, int), *(b.branch for b in branches)]),
        np.concatenate([np.arange(1, num + 1), *(b.limit for b in branches)]),
        np.concatenate([none, *(b.labels for b in branches)]),
        np.concatenate([np.full(num, -1), *(b.kinds for b in branches)]),
    )


def lay_out(form: Format, shape: Shape, times_s: np.ndarray) -> tuple[list[Span], list[LayoutState]]:
    """The span of each chunk, and the state after it, as the engine would make them."""
    layout, state = LAYOUTS[shape.layout](form), LayoutState()
    times_ns = [int(t * 1e9) for t in times_s]
    spans, states = [], []
    for start in range(0, shape.num_frames, shape.chunk_frames):
        chunk = times_ns[start : start + shape.chunk_frames]
        pairs = tuple(zip(chunk[::2], chunk[1::2] or chunk, strict=True))
        patches = Patches(*shape.grid, pairs, is_image=shape.chunk_frames == 1)
        span, state = layout.extend(state, patches)
        spans.append(span)
        states.append(state)
    return spans, states


def _quiz(
    rng: np.random.Generator,
    chances: dict[str, float],
    shape: Shape,
    story: Story,
    times_s: np.ndarray,
    split: Split,
) -> tuple[Quiz | None, int]:
    """A question of some kind, asked after a chunk where it makes sense; later chunks more often."""
    shares = np.array(list(chances.values()))
    for kind in rng.choice(list(chances), 3, replace=False, p=shares / shares.sum()):
        for _ in range(4):
            chunk = int(shape.num_chunks * np.sqrt(rng.random()))
            seen = times_s[: (chunk + 1) * shape.chunk_frames]
            quiz = ask_about(story, seen, rng, kind=str(kind), clock=shape.has_clock, phrasings=split)
            if quiz is not None:
                return quiz, chunk
    return None, 0


class _Branch(NamedTuple):
    ids: np.ndarray
    positions: np.ndarray
    branch: np.ndarray
    limit: np.ndarray
    labels: np.ndarray
    kinds: np.ndarray


def _branch(form: Format, shape: Shape, state: LayoutState, quiz: Quiz, number: int, limit: int) -> _Branch:
    """A question and its answer, teacher-forced; the end of the turn is learned but never read."""
    prompt = LAYOUTS[shape.layout](form).question(state, quiz.question)
    answer = np.array([*form.tokenize_plain(quiz.answer), *form.tokenize("<|im_end|>")])
    ids = np.concatenate([prompt.ids, answer[:-1]])
    later = np.broadcast_to(prompt.next_position + np.arange(len(answer) - 1), (3, len(answer) - 1))
    labels = np.full(len(ids), IGNORE)
    labels[len(prompt) - 1 :] = answer
    kinds = np.where(labels != IGNORE, list(KINDS).index(quiz.kind), -1)
    return _Branch(
        ids,
        np.concatenate([prompt.positions, later], axis=1),
        np.full(len(ids), number),
        np.full(len(ids), limit),
        labels,
        kinds,
    )


def _truth(story: Story, times_s: np.ndarray, shape: Shape) -> np.ndarray:
    """What covers a good part of each visual token: [is_there, shape, colour, x, y, dx, dy], all zero for nothing.

    Where two things meet it is the one drawn on top; its centre and its path are fractions of the frame's sides.
    """
    truth = np.zeros((shape.num_patches, shape.grid[0] * shape.grid[1], 7), np.float32)
    for patch, time_s in enumerate(times_s[shape.frames_per_patch - 1 :: shape.frames_per_patch]):
        for thing in story.things:
            if thing.is_visible(time_s):
                what = SHAPES.index(thing.shape), list(COLOURS).index(thing.colour)
                path = thing.x1 - thing.x0, thing.y1 - thing.y0
                truth[patch, _covered(thing, time_s, shape.grid)] = 1, *what, *thing.position_at(time_s), *path
    return truth


def past_of(story: Story, times_s: np.ndarray, shape: Shape) -> np.ndarray:
    """What the memory has to say of whatever covers each visual token; IGNORE where nothing does, or two answers fit.

    In the order of PAST: shape and colour of the thing that appeared before it (the class after the last: none did),
    the tens and the ones of the second at which it appeared, how many different things had appeared by then.
    """
    past = np.full((shape.num_patches, shape.grid[0] * shape.grid[1], len(PAST)), IGNORE)
    seen = Seen(story, times_s)
    for index, run in enumerate(seen.runs):
        said = _said_of(seen, index, shape)
        for patch in range(run.first // shape.frames_per_patch, run.last // shape.frames_per_patch + 1):
            time_s = times_s[(patch + 1) * shape.frames_per_patch - 1]
            if run.thing.is_visible(time_s):
                past[patch, _covered(run.thing, time_s, shape.grid)] = said
    return past


def _said_of(seen: Seen, index: int, shape: Shape) -> np.ndarray:
    """Of one run, by the order of PAST."""
    said = np.full(len(PAST), IGNORE)
    if not seen.is_alone(index):
        return said
    if index == 0:
        said[:2] = len(SHAPES), len(COLOURS)
    elif seen.is_alone(index - 1):
        before = seen.runs[index - 1].thing
        said[:2] = SHAPES.index(before.shape), list(COLOURS).index(before.colour)
    run = seen.runs[index]
    if shape.has_clock and (second := seen.second(run)) < MAX_SECONDS:
        said[2:4] = divmod(second, 10)
    said[4] = min(seen.names.index(run.name), MAX_THINGS - 1)
    return said


def _covered(thing: Thing, time_s: float, grid: tuple[int, int]) -> np.ndarray:
    """Which visual tokens a thing covers a good part of; (rows * columns,) bool."""
    rows, columns = grid
    half = np.array([0.5 / columns, 0.5 / rows])
    short = np.array([min(grid) / columns, min(grid) / rows])  # the shorter side in each side
    beyond = (np.abs(cell_centres(grid) - thing.position_at(time_s)) - half).clip(min=0) / short
    return np.hypot(*beyond.T) < 0.7 * thing.radius


def cell_centres(grid: tuple[int, int]) -> np.ndarray:
    """The middles (x, y) of all visual tokens' parts of the frame, row by row, as fractions of its sides."""
    y, x = np.indices(grid).reshape(2, -1)
    return np.stack([(x + 0.5) / grid[1], (y + 0.5) / grid[0]], -1)


def _padded(rows: list[np.ndarray], length: int, fill: int) -> np.ndarray:
    out = np.full((len(rows), length), fill, dtype=np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
