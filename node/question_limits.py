"""What a question may ask for, and the refusals of what it may not. Checked before any engine sees it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from ..protocol.errors import ErrorCode, NodeError
from ..protocol.messages import Ask, AskChoice
from .config import Questions
from .engine_protocol import ModelInfo

# What a request that leaves the field out decodes to.
DEFAULT_MAX_NEW_TOKENS = Ask(stream="", question="?").max_new_tokens


@dataclass(frozen=True, slots=True)
class QuestionLimits:
    """The operator's bounds, or the model's where they are tighter."""

    max_new_tokens: int
    max_question_chars: int
    max_options: int

    @classmethod
    def of(cls, configured: Questions, model: ModelInfo) -> "QuestionLimits":
        return cls(
            max_new_tokens=min(configured.max_new_tokens, model.max_new_tokens),
            max_question_chars=min(configured.max_question_chars, model.max_question_chars),
            max_options=min(configured.max_options, model.max_options),
        )

    def checked_ask(self, ask: Ask) -> Ask:
        """The question as it may be asked. Raises NodeError BAD_REQUEST or TOO_LARGE."""
        self._check_question(ask.question)
        for name in ("temperature", "top_p"):
            if not math.isfinite(getattr(ask, name)):  # a NaN passes every comparison of the decoder
                raise _bad(name, f"a finite number, got {getattr(ask, name)}")
        return self._bounded(ask)

    def checked_choice(self, ask: AskChoice) -> AskChoice:
        """The question as it may be asked. Raises NodeError BAD_REQUEST or TOO_LARGE."""
        self._check_question(ask.question)
        self._check_options(ask.options)
        return ask

    def _bounded(self, ask: Ask) -> Ask:
        """Hold the length of an answer within the limit; who named no length gets what there is."""
        if ask.max_new_tokens <= self.max_new_tokens:
            return ask
        if ask.max_new_tokens == DEFAULT_MAX_NEW_TOKENS:
            return msgspec.structs.replace(ask, max_new_tokens=self.max_new_tokens)
        raise _bad("max_new_tokens", f"at most {self.max_new_tokens}, got {ask.max_new_tokens}")

    def _check_question(self, question: str) -> None:
        if not question.strip():
            raise _bad("question", "more than white space")
        limit = self.max_question_chars
        if len(question) > limit:
            raise NodeError(
                ErrorCode.TOO_LARGE,
                f"a question has at most {limit} characters, got {len(question)}",
                details={"max_question_chars": limit},
            )

    def _check_options(self, options: Sequence[str]) -> None:
        if len(options) > self.max_options:
            raise NodeError(
                ErrorCode.TOO_LARGE,
                f"at most {self.max_options} options can be compared, got {len(options)}",
                details={"max_options": self.max_options},
            )
        for n, option in enumerate(options):
            if not option.strip():
                raise _bad(f"options[{n}]", "more than white space")
            if option in options[:n]:
                raise _bad(f"options[{n}]", f"different from the others, got {option[:80]!r} again")
        num_chars = sum(map(len, options))
        if num_chars > self.max_question_chars:
            raise NodeError(
                ErrorCode.TOO_LARGE,
                f"all options have at most {self.max_question_chars} characters together, got {num_chars}",
                details={"max_question_chars": self.max_question_chars},
            )


def _bad(field: str, expected: str) -> NodeError:
    return NodeError(ErrorCode.BAD_REQUEST, f"{field} must be {expected}", details={"path": f"$.data.{field}"})
