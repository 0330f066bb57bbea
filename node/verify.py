"""The exactness gate: what the memory promises, checked against transformers' own attention.

    python -m onlooker.node.verify                  small random models of every family, made on the spot
    python -m onlooker.node.verify --model PATH     the given checkpoint, in float32
    python -m onlooker.node.verify --answers        greedy answers too, word for word

Seven promises: chunk by chunk equals one pass over the whole prompt; what a memory has not forgotten, and what is left
of chunks whose tokens were dropped, equals one pass in which the rest is masked; positions that have moved equal the
same states encoded there; a question, however it ends, leaves no trace, bit for bit; bytes are tokens x bytes per token
and lie in the storage reserved for them; questions answered together are answered as they would be alone. Prints a
table, exits 1 on a miss.
"""

import argparse
import itertools
import json
import math
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from ..protocol.messages import Ask, RetentionName
from .adapter import FAMILIES
from .answer import GrowingAnswer, decode
from .branch import Branch, Scratch
from .chunk import CHUNK_FRAMES, Chunk, Picture
from .layout import Span
from .machine import machine
from .memory import StreamMemory
from .model import VisionLanguageModel, load_model, resolve_device, use_few_threads
from .native_answers import compare_answers
from .options import StreamOptions
from .passes import Prefill
from .random_checkpoint import write_checkpoint
from .reference import (
    FRAME_NS,
    Film,
    OnePass,
    encoded_elsewhere,
    read_at_once,
    see_at_once,
    what_is_new,
    whole_prompt,
)

_NUM_FRAMES = 24  # a multiple of every chunk size
_GRIDS = ((2, 3), (4, 3))  # merged tokens (rows, columns) of the two resolutions
_QUESTION = "What did you see first, and what came after it?"
_SLOT_TOKENS = 128
_FORGETTING_TOKENS = {"native": 80, "turns": 100}  # too few for all frames, in every family
# Above one of them a token is dropped: the one that rounding is farthest from.
_SIMILARITIES = (0.98, 0.95, 0.9, 0.8, 0.6)

BOUND = 1e-5  # float32 sums in another order, by the largest figure where that is over 1


class LoadError(Exception):
    """A checkpoint that was named cannot be had."""


@dataclass(frozen=True, slots=True)
class Check:
    """One promise, measured."""

    promise: str
    model: str
    case: str
    value: float
    bound: float  # 0: bit for bit

    @property
    def passed(self) -> bool:
        return self.value <= self.bound  # NaN never passes


def verify(model: VisionLanguageModel, bound: float = BOUND) -> Iterator[Check]:
    """All checks on one model, which should be float32; `bound` is for the largest difference, see `_distance`."""
    for grid in _GRIDS:
        for layout in ("native", "turns"):
            for chunk_frames in CHUNK_FRAMES:
                yield from _one_pass(model, layout, chunk_frames, grid, bound)
    for layout in ("native", "turns"):
        for retention in ("window", "thin"):
            yield from _forgetting(model, layout, retention, bound)
    for layout in ("native", "turns"):
        yield from _dropping(model, layout, bound)
        yield from _moving(model, layout, bound)
        yield from _no_trace(model, layout)
    yield from _bytes(model)
    yield from _together(model, bound)


# ------------------------------------------------------------------------------------ one pass = chunks


def _one_pass(
    model: VisionLanguageModel, layout: str, chunk_frames: int, grid: tuple[int, int], bound: float
) -> Iterator[Check]:
    case = f"{layout}, {chunk_frames} frames a chunk, {grid[0]}x{grid[1]} tokens"
    film = Film(_frames(model, grid), grid, layout, chunk_frames)
    memory = _memory(model, layout, chunk_frames)
    for chunk in _chunks(film.frames, chunk_frames):
        memory.append(chunk)
    span = whole_prompt(model, film, _QUESTION)
    rows = np.arange(memory.now.num_tokens)
    if len(span) != len(rows) + len(_question(memory)):
        yield Check("chunks = one pass, logits", model.name, case, math.inf, bound)
        return
    yield from _compared("chunks = one pass", case, model, memory, read_at_once(model, span, film), rows, bound)


def _compared(
    promise: str,
    case: str,
    model: VisionLanguageModel,
    memory: StreamMemory,
    one_pass: OnePass,
    rows: np.ndarray,
    bound: float,
) -> Iterator[Check]:
    """A memory against the rows (num_tokens,) of a pass that should be its own, and what a question makes of both."""
    question, extent = _question(memory), memory.extent(memory.now)
    streamed = model.logits(model.read(question, Prefill([extent])))
    gap = _distance(streamed, one_pass.logits[-len(question) :])
    yield Check(f"{promise}, logits", model.name, case, gap, bound)
    its = torch.from_numpy(rows).to(model.device)
    gaps = [
        _distance(mine, theirs[its])
        for layer in range(model.kv_shape.num_layers)
        for mine, theirs in zip(extent.rows(layer), one_pass.rows(layer), strict=True)
    ]
    yield Check(f"{promise}, K and V", model.name, case, max(gaps), bound)


def _question(memory: StreamMemory) -> Span:
    return memory.layout.question(memory.now.layout, _QUESTION)


# --------------------------------------------------------------------------- forgetting, dropping, moving


def _forgetting(model: VisionLanguageModel, layout: str, retention: RetentionName, bound: float) -> Iterator[Check]:
    """A memory too small for the film, against one pass in which no token sees what was forgotten before it came."""
    film = Film(_frames(model, _GRIDS[0]), _GRIDS[0], layout, 2)
    memory = _memory(model, layout, 2, retention, _FORGETTING_TOKENS[layout])
    lengths, held = _fed(memory, _chunks(film.frames, 2))
    case = f"{layout}, {retention}: {len(held[-1])} of {len(held)} chunks are left"
    if len(held[-1]) == len(held):
        yield Check("forgetting = one pass, masked, logits", model.name, case, math.inf, bound)
        return
    visible = _visible([*lengths, len(_question(memory))], memory.now.num_anchor, [*held, held[-1]])
    one_pass = read_at_once(model, whole_prompt(model, film, _QUESTION), film, visible)
    rows = np.flatnonzero(visible[-1, : sum(lengths)])
    yield from _compared("forgetting = one pass, masked", case, model, memory, one_pass, rows, bound)


def _fed(memory: StreamMemory, chunks: Iterable[Chunk]) -> tuple[list[int], list[list[int]]]:
    """How many tokens each chunk has, and which chunks the memory held with it."""
    lengths, held = [], []
    for chunk in chunks:
        lengths.append(memory.append(chunk).num_tokens)
        held.append([record.number for record in memory.ledger.records])
    return lengths, held


def _dropping(model: VisionLanguageModel, layout: str, bound: float) -> Iterator[Check]:
    """A scene that mostly stands still, against one pass in which nobody sees the tokens that say nothing new."""
    grid = _GRIDS[0]
    film = Film(_scene(model, grid), grid, layout, 4)
    features, num_places = see_at_once(model, film).embeds, grid[0] * grid[1]
    choices = [(*what_is_new(features, num_places, drop), drop) for drop in _SIMILARITIES]
    is_new, _, drop = max(choices, key=lambda choice: (not choice[0].all(), choice[1]))
    memory = _memory(model, layout, 4, drop=drop)
    _fed(memory, _chunks(film.frames, 4))
    case = f"{layout}, drop {drop}: {is_new.sum()} of {len(is_new)} tokens are left"
    span = whole_prompt(model, film, _QUESTION)
    stays = ~span.visual
    stays[span.visual] = is_new
    rows = np.flatnonzero(stays[: -len(_question(memory))])
    if is_new.all() or len(rows) != memory.now.num_tokens:
        yield Check("dropping = one pass, masked, logits", model.name, case, math.inf, bound)
        return
    visible = np.tri(len(span), dtype=bool) & (stays | np.eye(len(span), dtype=bool))
    one_pass = read_at_once(model, span, film, visible)
    yield from _compared("dropping = one pass, masked", case, model, memory, one_pass, rows, bound)


def _moving(model: VisionLanguageModel, layout: str, bound: float) -> Iterator[Check]:
    """A memory whose positions end with a chunk, against the same states encoded where they stand by then."""
    promise, frames = "moved = encoded there", _frames(model, _GRIDS[0], 2 * _NUM_FRAMES)
    memory, chunks = _memory(model, layout, 2, "window", _FORGETTING_TOKENS[layout]), _chunks(frames, 2)
    horizon = _near_horizon(model, layout, chunks)
    with _horizon(model, horizon):
        lengths, held = _fed(memory, _until_moved(memory, chunks))
    now, question = memory.now, _question(memory)
    film = Film(frames[: 2 * len(lengths)], _GRIDS[0], layout, 2)
    span = whole_prompt(model, film, _QUESTION)
    rows, moved = _moved(memory, span.positions, lengths)
    shifts = set(span.positions[0, rows[now.num_anchor :]] - moved[0, rows[now.num_anchor :]])
    case = f"{layout}: {len(held[-1])} of {len(held)} chunks are left, {max(shifts)} positions down"
    if len(held[-1]) == 1 or len(shifts) > 1 or not max(shifts) > 0 or now.layout.next_position > horizon:
        yield Check(f"{promise}, logits", model.name, case, math.inf, bound)
        return
    visible = _visible([*lengths, len(question)], now.num_anchor, [*held, held[-1]])
    old, new = rows[: -lengths[-1]], slice(-lengths[-1] - len(question), None)
    before = read_at_once(model, span, film, visible)
    cache = encoded_elsewhere(model, before, old, span.positions[:, old], moved[:, old])
    rest = Span(span.ids[new], moved[:, new], span.visual[new], int(moved.max()) + 1)
    then = read_at_once(model, rest, film, cache=cache)
    yield from _compared(promise, case, model, memory, then, np.arange(now.num_tokens), bound)


def _near_horizon(model: VisionLanguageModel, layout: str, chunks: Sequence[Chunk]) -> int:
    """Positions of which a quarter can come back while some chunks stay; float32 tells little of hundreds more."""
    memory = _memory(model, layout, 2)
    _fed(memory, chunks[:3])  # the clock of a video is behind the size of its pictures at first
    third = memory.now.layout.next_position
    _fed(memory, chunks[3:4])
    return third + third // 3 + 6 * (memory.now.layout.next_position - third)


def _until_moved(memory: StreamMemory, chunks: Sequence[Chunk]) -> Iterator[Chunk]:
    """Chunks up to the first one, taken in before the next is asked for, with which positions went down."""
    most = 0
    for chunk in chunks:
        yield chunk
        if memory.now.layout.next_position < most:
            return
        most = memory.now.layout.next_position


def _moved(memory: StreamMemory, positions: np.ndarray, lengths: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens of a prompt a memory holds, and positions (3, n): of those as its ledger says, and then on."""
    num_anchor, ends, moved = memory.now.num_anchor, np.cumsum(lengths), positions.copy()
    rows, at = [np.arange(num_anchor)], np.arange(0)
    for record in memory.ledger.records:
        at = np.arange(max(num_anchor, ends[record.number] - lengths[record.number]), ends[record.number])
        across = positions[1:, at].min() - record.reach.base
        moved[:, at] -= np.array([positions[0, at[0]] - record.reach.first, across, across])[:, None]
        rows.append(at)
    moved[:, ends[-1] :] = moved[:, at].max() + 1 + np.arange(positions.shape[1] - ends[-1])
    return np.concatenate(rows), moved


@contextmanager
def _horizon(model: VisionLanguageModel, num_positions: int) -> Iterator[None]:
    """A model that was trained for so many positions."""
    text = model.config.text_config
    before, text.max_position_embeddings = text.max_position_embeddings, num_positions
    try:
        yield
    finally:
        text.max_position_embeddings = before


def _visible(lengths: Sequence[int], num_anchor: int, held: Sequence[Sequence[int]]) -> np.ndarray:
    """What each token sees: the anchor, its own chunk, and chunks held[i] if it is of chunk i; the question is last."""
    chunks = np.arange(len(lengths))
    sees = np.stack([np.isin(chunks, [*others, chunk]) for chunk, others in enumerate(held)])
    chunk_of = chunks.repeat(lengths)
    is_anchor = np.arange(len(chunk_of)) < num_anchor
    return np.tri(len(chunk_of), dtype=bool) & (sees[chunk_of][:, chunk_of] | is_anchor)


# --------------------------------------------------------------------------------------------- no trace


Ending = Callable[[VisionLanguageModel, StreamMemory, Scratch], None]


class _BrokenPass(Exception):
    """Planted in the middle of a forward pass."""


def _no_trace(model: VisionLanguageModel, layout: str) -> Iterator[Check]:
    """Chunks with questions between them, ended in every way, against the same chunks never asked about."""
    frames = _frames(model, _GRIDS[0])
    asked, never = _memory(model, layout, 4), _memory(model, layout, 4)
    scratch = Scratch(model.kv_shape, 2, _SLOT_TOKENS)
    endings = (_answer_greedily, _answer_sampled, _cancel_half_way, _fail_in_prefill, _fail_in_decode)
    middle = _InTheMiddle(model, asked, scratch, endings)
    chunks = _chunks(frames, 4)
    for i, chunk in enumerate(chunks):
        never.append(chunk)
        if i:
            endings[i % len(endings)](model, asked, scratch)
            _fail_in_chunk(model, asked, chunk)
        is_last = i == len(chunks) - 1
        asked.append(chunk, between=middle if is_last else None)
    extents = [memory.extent(memory.now) for memory in (asked, never)]
    differing = sum(
        int((mine != theirs).sum())
        for layer in range(model.kv_shape.num_layers)
        for mine, theirs in zip(*(extent.rows(layer) for extent in extents), strict=True)
    )
    case = f"{layout}: {len(endings)} ways a question ends, also in the middle of a chunk, and a chunk that fails"
    yield Check("no trace, K and V that differ", model.name, case, float(differing), 0.0)
    question = asked.layout.question(asked.now.layout, _QUESTION)
    logits = [model.logits(model.read(question, Prefill([extent]))) for extent in extents]
    yield Check("no trace, next logits", model.name, case, _distance(*logits), 0.0)
    yield Check("no trace, slots still held", model.name, case, float(2 - scratch.num_free), 0.0)
    yield Check("no trace, endings that did not run", model.name, case, float(len(middle.left)), 0.0)


class _InTheMiddle:
    """One ending after each layer, from the last two of the vision tower on: small models have three more."""

    def __init__(
        self, model: VisionLanguageModel, memory: StreamMemory, scratch: Scratch, endings: Sequence[Ending]
    ) -> None:
        self._around = (model, memory, scratch)
        self._num_before = model.config.vision_config.depth - 2
        self.left = deque(endings)

    def __call__(self) -> float:
        self._num_before -= 1
        if self._num_before < 0 and self.left:
            self.left.popleft()(*self._around)
        return 0.0


def _answer_greedily(model: VisionLanguageModel, memory: StreamMemory, scratch: Scratch) -> None:
    _run_answer(model, memory, scratch, Ask(stream="verify", question=_QUESTION, max_new_tokens=12))


def _answer_sampled(model: VisionLanguageModel, memory: StreamMemory, scratch: Scratch) -> None:
    _run_answer(
        model,
        memory,
        scratch,
        Ask(stream="verify", question=_QUESTION, max_new_tokens=12, temperature=1.5, top_p=0.9, seed=1),
    )


def _cancel_half_way(model: VisionLanguageModel, memory: StreamMemory, scratch: Scratch) -> None:
    request = Ask(stream="verify", question=_QUESTION, max_new_tokens=12)
    _run_answer(model, memory, scratch, request, max_steps=3)


def _run_answer(
    model: VisionLanguageModel, memory: StreamMemory, scratch: Scratch, request: Ask, max_steps: int = 64
) -> None:
    branch = Branch(model, memory, memory.now, scratch)
    try:
        answer = GrowingAnswer(model, branch, request, arrived=0.0)
        answer.start()
        for _ in range(max_steps):
            if answer.finish is not None:
                break
            answer.accept(decode(model, [answer])[0])
    finally:
        branch.close()


def _fail_in_prefill(model: VisionLanguageModel, memory: StreamMemory, scratch: Scratch) -> None:
    branch = Branch(model, memory, memory.now, scratch)
    try:
        with _broken_layer(model):
            branch.prefill(memory.layout.question(memory.now.layout, _QUESTION))
    finally:
        branch.close()


def _fail_in_decode(model: VisionLanguageModel, memory: StreamMemory, scratch: Scratch) -> None:
    request = Ask(stream="verify", question=_QUESTION, max_new_tokens=12)
    branch = Branch(model, memory, memory.now, scratch)
    try:
        answer = GrowingAnswer(model, branch, request, arrived=0.0)
        answer.start()
        with _broken_layer(model):
            decode(model, [answer])
    finally:
        branch.close()


def _fail_in_chunk(model: VisionLanguageModel, memory: StreamMemory, chunk: Chunk) -> None:
    with _broken_layer(model):
        memory.append(chunk)


class _broken_layer:
    """Makes the last layer of the language model raise once all layers have written."""

    def __init__(self, model: VisionLanguageModel) -> None:
        self._language = model.language
        self._sound = model.language.after
        self._num_left = model.kv_shape.num_layers

    def __enter__(self) -> None:
        self._language.after = self._break

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        self._language.after = self._sound
        assert kind is not None, "the planted failure did not happen"
        return kind is _BrokenPass

    def _break(self, *args: Any) -> Tensor:
        self._num_left -= 1
        if self._num_left == 0:
            raise _BrokenPass
        return self._sound(*args)


# ------------------------------------------------------------------------------------- bytes, together


def _bytes(model: VisionLanguageModel) -> Iterator[Check]:
    memory = _memory(model, "native", 4)
    shape, capacity = model.kv_shape, memory.info().capacity_tokens
    text = model.config.text_config
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * shape.head_dim * shape.dtype.itemsize
    worst = 0
    for chunk in _chunks(_frames(model, _GRIDS[0]), 4):
        memory.append(chunk)
        info = memory.info()
        expected = (memory.now.num_tokens * per_token, capacity * per_token)
        measured = (info.logical_bytes, info.resident_bytes)
        worst = max(worst, *(abs(a - b) for a, b in zip(measured, expected, strict=True)))
    case = f"{memory.now.num_tokens} tokens x {per_token} bytes, {capacity} reserved"
    yield Check("bytes = tokens x bytes per token = storage", model.name, case, float(worst), 0.0)


def _together(model: VisionLanguageModel, bound: float) -> Iterator[Check]:
    """Four questions, two of them asked a chunk later, decoded as one batch and each alone."""
    memory = _memory(model, "native", 4)
    chunks = _chunks(_frames(model, _GRIDS[0]), 4)
    questions = ["What colour is it?", "Is it moving?", "What came first? And last?", "left or right?"]
    memory.append(chunks[0])
    snapshots = [memory.now] * 2
    memory.append(chunks[1])
    snapshots += [memory.now] * 2

    def run(indexes: Sequence[int]) -> tuple[list[list[int]], Tensor]:
        scratch = Scratch(model.kv_shape, len(indexes), _SLOT_TOKENS)
        answers = []
        for i in indexes:
            request = Ask(stream="verify", question=questions[i], max_new_tokens=16)
            branch = Branch(model, memory, snapshots[i], scratch)
            answers.append(GrowingAnswer(model, branch, request, arrived=0.0))
            answers[-1].start()
        tokens = [[answer.newest_token] for answer in answers]
        steps = []
        for _ in range(12):
            logits = decode(model, answers)
            steps.append(logits)
            for answer, row, chosen in zip(answers, logits, tokens, strict=True):
                answer.finish = None  # go on past an end: the figures are wanted, not the words
                answer.accept(row)
                chosen.append(answer.newest_token)
        return tokens, torch.stack(steps, dim=1)

    together, batch_logits = run(range(4))
    alone = [run([i]) for i in range(4)]
    differing = sum(a != b for i in range(4) for a, b in zip(together[i], alone[i][0][0], strict=True))
    yield Check("together = alone, tokens that differ", model.name, "4 questions", float(differing), 0.0)
    gap = _distance(batch_logits, torch.cat([logits for _, logits in alone]))
    yield Check("together = alone, logits", model.name, "4 questions", gap, bound)


def verify_answers(model: VisionLanguageModel) -> Iterator[Check]:
    """Greedy answers from a memory against transformers' own to the whole prompt; the model is not used afterwards."""
    for compared in compare_answers(model):
        case = f"{compared.case}: {compared.num_same} of {compared.num} the same"
        yield Check("answers = one pass, that differ", model.name, case, compared.num - compared.num_same, 0.0)


# ---------------------------------------------------------------------------------------------- streams


def _memory(
    model: VisionLanguageModel,
    layout: str,
    chunk_frames: int,
    retention: RetentionName = "stop",
    num_tokens: int = 1024,
    drop: float | None = None,
) -> StreamMemory:
    options = StreamOptions(
        "verify",
        chunk_frames=chunk_frames,
        layout=layout,  # type: ignore[arg-type]
        min_pixels=1,
        memory_bytes=num_tokens * model.kv_shape.bytes_per_token,
        retention=retention,
        drop=drop,
    )
    return StreamMemory(model, options)


def _frames(model: VisionLanguageModel, grid: tuple[int, int], num: int = _NUM_FRAMES) -> np.ndarray:
    """Noise at a size that needs no resize: (num, height, width, 3), uint8."""
    factor = model.geometry.factor
    shape = (num, grid[0] * factor, grid[1] * factor, 3)
    return np.random.default_rng(7).integers(0, 256, shape, dtype=np.uint8)


def _scene(model: VisionLanguageModel, grid: tuple[int, int]) -> np.ndarray:
    """`_frames` of which few places change: none to three, by turns, from one temporal patch to the next."""
    noise, factor = _frames(model, grid), model.geometry.factor
    scene = np.repeat(noise[:1], len(noise), axis=0)
    for number in range(len(noise)):
        changed = np.s_[number, :factor, : number // 2 % 4 * factor]
        scene[changed] = noise[changed]
    return scene


def _chunks(frames: np.ndarray, chunk_frames: int) -> list[Chunk]:
    pictures = [Picture(pixels, seq, seq * FRAME_NS, "media", seq * FRAME_NS) for seq, pixels in enumerate(frames)]
    return [Chunk(tuple(pictures[i : i + chunk_frames])) for i in range(0, len(pictures), chunk_frames)]


def _distance(a: Tensor, reference: Tensor) -> float:
    """The largest difference; of figures over 1 by the largest one, for that is what float32 rounds by.

    A trained model's keys and logits are tens of times as large as a random one's.
    """
    reference = reference.float()
    return float((a.float() - reference).abs().max() / reference.abs().max().clamp(min=1))


def _models(names: Sequence[str], device: str) -> Iterator[VisionLanguageModel]:
    """The named checkpoints, or one random model of each family. Raises LoadError."""
    for name in names:
        try:
            model = load_model(name, dtype="float32", device=device)
        except (OSError, ValueError) as error:
            raise LoadError(f"{name} cannot be loaded: {error}") from error
        yield model
    if names:
        return
    with tempfile.TemporaryDirectory() as folder:
        for family in FAMILIES:
            path = Path(folder) / family
            write_checkpoint(path, family)
            model = load_model(str(path), dtype="float32", device=device)
            model.name = f"{family}, random"
            yield model


_HEADS = f"{'promise':<42}  {'held':<10}  {'worst':>9}  bound"


def _lines(checks: Sequence[Check], *, has_cases: bool) -> Iterator[str]:
    """A model's checks as a table: a line for each promise, and the cases that were missed, or all of them."""
    for promise in dict.fromkeys(check.promise for check in checks):
        cases = [check for check in checks if check.promise == promise]
        held = f"{sum(check.passed for check in cases)} of {len(cases)}"
        # What is no number at all is the worst.
        worst = max(cases, key=lambda check: (math.isnan(check.value), check.value))
        yield f"{promise:<42}  {held:<10}  {worst.value:>9.2g}  {_bound(worst)}"
        for check in cases:
            if has_cases or not check.passed:
                yield f"    {'ok  ' if check.passed else 'MISS'}  {check.value:>9.2g}  {check.case}"


def _bound(check: Check) -> str:
    return "bit for bit" if check.bound == 0 else f"{check.bound:.0e}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the gate."""
    parser = argparse.ArgumentParser(prog="onlooker verify", description="Check what the memory promises.")
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        help="checkpoint folder, hub id, or builtin; without it, a small random model of every family",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--bound", type=float, default=BOUND, help="a large checkpoint sums more and may need more")
    parser.add_argument("--answers", action="store_true", help="compare whole answers too, which takes a while longer")
    parser.add_argument("--cases", action="store_true", help="print every case, not only those that were missed")
    parser.add_argument(
        "--json",
        action="store_true",
        help="one JSON document instead of the table; `onlooker report` makes a page of it",
    )
    args = parser.parse_args(argv)
    try:
        device = resolve_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    transformers.logging.disable_progress_bar()
    checks: list[Check] = []
    try:
        for model in _models(args.model, device):
            use_few_threads(model)
            answers = verify_answers(model) if args.answers else ()
            its_checks = list(itertools.chain(verify(model, args.bound), answers))
            checks += its_checks
            if not args.json:
                print(f"{model.name} on {device}, float32\n{_HEADS}")
                print(*_lines(its_checks, has_cases=args.cases), "", sep="\n", flush=True)
    except LoadError as error:
        print(f"onlooker verify: {error}", file=sys.stderr)
        return 1
    missed = [check for check in checks if not check.passed]
    if args.json:
        rows = [asdict(check) | {"passed": check.passed} for check in checks]
        facts = machine(device, "onlooker verify", argv)
        print(json.dumps({"machine": facts, "checks": rows, "passed": not missed}, indent=2))
    else:
        print(f"{len(checks) - len(missed)} of {len(checks)} checks hold")
    return 1 if missed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
