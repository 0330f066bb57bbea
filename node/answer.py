"""A free answer while it grows: question prefill, then a token per decode step."""

import time
from collections.abc import Callable, Sequence

import numpy as np
from msgspec import UNSET
from torch import Tensor

from ..protocol.messages import Answer, AnswerTiming, Ask
from .branch import Branch
from .decoding import TextStream, TokenChooser
from .model import VisionLanguageModel
from .passes import DecodeStep, Place


class GrowingAnswer:
    """One question being answered. `start` once, then `decode` with others until `finish` is set."""

    def __init__(
        self,
        model: VisionLanguageModel,
        branch: Branch,
        request: Ask,
        *,
        arrived: float,
        on_delta: Callable[[str], None] | None = None,
    ) -> None:
        """`arrived` is the request's arrival, `time.monotonic()` seconds."""
        self.branch = branch
        self.request = request
        self.snapshot = branch.snapshot
        self.finish: str | None = None
        self._model = model
        self._arrived = arrived
        self._on_delta = on_delta
        self._ids: list[int] = []
        self._text = TextStream(model.tokenizer, request.stop)
        self._chooser = TokenChooser(
            temperature=request.temperature,
            top_p=request.top_p,
            seed=None if request.seed is UNSET else request.seed,
        )
        self._ends = end_tokens(model)

    def start(self) -> None:
        """Prefill the question and choose the first token. Raises NodeError TOO_LARGE."""
        self._started = time.monotonic()
        span = self.branch.memory.layout.question(self.snapshot.layout, self.request.question)
        self.branch.require_room(len(span) + self.request.max_new_tokens)
        self._num_prompt_tokens = len(span)
        logits = self.branch.prefill(span)
        self.accept(logits)
        self._first_token = time.monotonic()

    @property
    def newest_token(self) -> int:
        return self._ids[-1]

    def accept(self, logits: Tensor, likeliest: int | None = None) -> None:
        """Choose the next token from logits (vocabulary,), and pass on the text that it makes certain.

        `likeliest` is the largest one's index, if it is known already.
        """
        token = self._chooser.choose(self._ids, logits, likeliest)
        if token in self._ends:
            self._end("stop")
            return
        self._ids.append(token)
        self._say(self._text.push(token))
        if self._text.is_stopped:
            self._end("stop")
        elif len(self._ids) >= self.request.max_new_tokens:
            self._end("length")

    def _end(self, finish: str) -> None:
        self._say(self._text.finish())
        self.finish = finish

    def _say(self, delta: str) -> None:
        if delta and self._on_delta is not None:
            self._on_delta(delta)

    def result(self) -> Answer:
        """The finished answer, with the proof taken now."""
        assert self.finish is not None
        return Answer(
            text=self._text.text,
            finish=self.finish,  # type: ignore[arg-type]
            num_prompt_tokens=self._num_prompt_tokens,
            num_answer_tokens=len(self._ids),
            memory=self.branch.provenance(self.snapshot),
            timing=timed(self._arrived, self._started, self._first_token),
            notice=self._model.notice or UNSET,
        )


def timed(arrived: float, started: float, first_token: float) -> AnswerTiming:
    """Where the time of a question went that ends now; all in `time.monotonic()` seconds."""
    ended = time.monotonic()
    return AnswerTiming(
        queue_ms=(started - arrived) * 1e3,
        prefill_ms=(first_token - started) * 1e3,
        first_token_ms=(first_token - arrived) * 1e3,
        decode_ms=(ended - first_token) * 1e3,
        total_ms=(ended - arrived) * 1e3,
    )


def decode(model: VisionLanguageModel, answers: Sequence[GrowingAnswer]) -> Tensor:
    """One decode step for all of them together; returns logits (num_answers, vocabulary) for each to `accept`.

    The logits are valid until the next step.
    """
    return decode_tokens(model, [(answer.newest_token, answer.branch) for answer in answers])


def decode_tokens(model: VisionLanguageModel, tokens: Sequence[tuple[int, Branch]]) -> Tensor:
    """Like `decode`, for the token that each branch goes on with."""
    rows = [branch.step(token) for token, branch in tokens]
    steps = tokens[0][1].steps
    logits = None if steps is None else steps.decode(rows)
    if logits is not None:
        return logits
    positions = np.array([[row.position] for row in rows])
    ids = np.array([[row.token] for row in rows])
    step = DecodeStep([Place(row.memory, row.own, row.aside) for row in rows])
    return model.logits(model.read_batch(ids, positions, step)[:, 0])


def end_tokens(model: VisionLanguageModel) -> frozenset[int]:
    """Token ids at which an answer is over."""
    ids = model.generation_config.eos_token_id
    listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
    own = model.tokenizer.eos_token_id
    return frozenset(listed) | (frozenset() if own is None else {own})
