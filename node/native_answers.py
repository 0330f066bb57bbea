"""What a memory answers, beside what transformers answers to the whole prompt at once: word for word the same."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ..protocol.messages import Ask
from .answer import GrowingAnswer, decode, end_tokens
from .branch import Branch, Scratch
from .chunk import CHUNK_FRAMES, Chunk, Picture
from .decoding import TextStream
from .memory import StreamMemory
from .model import VisionLanguageModel
from .options import StreamOptions
from .reference import FRAME_NS, Film, answer_greedily, read_at_once, whole_prompt

LAYOUTS = ("native", "turns")
LENGTHS = (24, 72)  # frames: multiples of every chunk size
QUESTIONS = (
    "What colour is the shape?",
    "Which shapes have you seen so far?",
    "What was the first shape?",
    "How many different things have you seen?",
    "When did the blue square appear?",
)
MAX_ANSWER_TOKENS = 32

_GRID = (4, 4)  # merged tokens
_SLOT_TOKENS = 128
_STREAM = "verify"
_COLOURS = ((210, 30, 30), (40, 60, 220), (40, 160, 50), (245, 225, 40))  # red, blue, green, yellow
_GROUND = 90


class Compared(NamedTuple):
    """How many questions about one film got the same answer both ways."""

    case: str
    num_same: int
    num: int


def compare_answers(model: VisionLanguageModel) -> Iterator[Compared]:
    """Greedy answers in every layout and chunk size, about a short film and a long one.

    Afterwards transformers' own part of the model stays set to its eager attention.
    """
    for layout in LAYOUTS:
        for chunk_frames in CHUNK_FRAMES:
            for seed, num_frames in enumerate(LENGTHS):
                film = Film(draw_shapes(model, num_frames, seed), _GRID, layout, chunk_frames)
                answers = stream_answers(model, film, QUESTIONS), native_answers(model, film, QUESTIONS)
                pairs = list(zip(*answers, strict=True))
                case = f"{layout}, {chunk_frames} frames a chunk, {num_frames} frames"
                yield Compared(case, sum(mine == theirs for mine, theirs in pairs), len(pairs))


def stream_answers(model: VisionLanguageModel, film: Film, questions: Sequence[str]) -> list[str]:
    """Answers from a memory that got the film chunk by chunk, all questions decoded together."""
    memory = _remember(model, film)
    scratch = Scratch(model.kv_shape, len(questions), _SLOT_TOKENS)
    answers = []
    for question in questions:
        branch = Branch(model, memory, memory.now, scratch)
        request = Ask(stream=_STREAM, question=question, max_new_tokens=MAX_ANSWER_TOKENS)
        answers.append(GrowingAnswer(model, branch, request, arrived=0.0))
        answers[-1].start()
    while growing := [answer for answer in answers if answer.finish is None]:
        for answer, logits in zip(growing, decode(model, growing), strict=True):
            answer.accept(logits)
    return [answer.result().text for answer in answers]


def native_answers(model: VisionLanguageModel, film: Film, questions: Sequence[str]) -> list[str]:
    """Answers of transformers' own model, each to a whole prompt that is read in one forward pass."""
    ends, texts = end_tokens(model), []
    for question in questions:
        one_pass = read_at_once(model, whole_prompt(model, film, question), film)
        text = TextStream(model.tokenizer)
        for token in answer_greedily(model, one_pass, ends, MAX_ANSWER_TOKENS):
            text.push(token)
        text.finish()
        texts.append(text.text)
    return texts


def _remember(model: VisionLanguageModel, film: Film) -> StreamMemory:
    tokens_per_patch = film.grid[0] * film.grid[1] + 32  # a stamp, or a turn's beginning and end
    options = StreamOptions(
        _STREAM,
        chunk_frames=film.chunk_frames,
        layout=film.layout,  # type: ignore[arg-type]
        min_pixels=1,
        memory_bytes=(64 + film.num_patches * tokens_per_patch) * model.kv_shape.bytes_per_token,
    )
    memory = StreamMemory(model, options)
    pictures = [Picture(pixels, seq, seq * FRAME_NS, "media", seq * FRAME_NS) for seq, pixels in enumerate(film.frames)]
    for i in range(0, len(pictures), film.chunk_frames):
        memory.append(Chunk(tuple(pictures[i : i + film.chunk_frames])))
    return memory


def draw_shapes(model: VisionLanguageModel, num_frames: int, seed: int) -> np.ndarray:
    """Discs and squares on grey, one after the other: uint8, (num_frames, height, width, 3)."""
    rng = np.random.default_rng(seed)
    height, width = (side * model.geometry.factor for side in _GRID)
    frames = np.full((num_frames, height, width, 3), _GROUND, np.uint8)
    y, x = np.mgrid[:height, :width]
    for start in range(0, num_frames, num_frames // 4):
        radius = rng.uniform(0.15, 0.25) * height
        right, below = x - rng.uniform(0.3, 0.7) * width, y - rng.uniform(0.3, 0.7) * height
        is_disc = rng.random() < 0.5
        distance = np.hypot(right, below) if is_disc else np.maximum(abs(right), abs(below))
        frames[start : start + num_frames // 4, distance <= radius] = _COLOURS[rng.integers(len(_COLOURS))]
    return frames
