"""The endpoints of the ask socket. What cannot be answered is refused here, before the engine sees it."""

import math
from collections.abc import Sequence
from typing import Any

import msgspec

from ..protocol.errors import ErrorCode, NodeError
from ..protocol.messages import Answer, Ask, AskChoice, Choice, Empty, Hello, Provenance, Streams
from .requests import Call, Endpoint, Steps
from .state import NodeState
from .telemetry import Announce

# What a request that leaves the field out decodes to.
DEFAULT_MAX_NEW_TOKENS = Ask(stream="", question="").max_new_tokens
MIN_RETRY_MS = 100
MAX_RETRY_MS = 10_000
DEFAULT_RETRY_MS = 500  # before the first answer


class Questions:
    """Answers questions through the engine, within the node's limits."""

    def __init__(self, state: NodeState, announce: Announce) -> None:
        self._state = state
        self._announce = announce

    def endpoints(self) -> dict[str, Endpoint[Any]]:
        return {
            "ask": Endpoint(Ask, self._ask, is_cancellable=True),
            "ask_choice": Endpoint(AskChoice, self._ask_choice, is_cancellable=True),
            "hello": Endpoint(Empty, self._hello),
            "streams": Endpoint(Empty, self._streams),
        }

    def retry_after_ms(self) -> int:
        """When one of the open questions is likely to be done."""
        mean_ms = self._state.engine.question_counters().mean_total_ms
        return max(MIN_RETRY_MS, min(MAX_RETRY_MS, round(mean_ms))) if mean_ms else DEFAULT_RETRY_MS

    def _ask(self, call: Call[Ask]) -> Steps[Answer]:
        ask, engine = call.data, self._state.ready_engine
        self._state.check_stream(ask.stream)
        self._check_question(ask.question)
        ask = self._bounded(ask)
        for name in ("temperature", "top_p"):
            if not math.isfinite(getattr(ask, name)):  # a NaN passes every comparison of the decoder
                raise _bad(name, f"a finite number, got {getattr(ask, name)}")

        def steps() -> Steps[Answer]:
            answer = yield engine.ask(ask, arrived=call.arrived, deadline=call.deadline, on_delta=call.on_delta)
            self._check_trace(ask.stream, answer.memory)
            return answer

        return steps()

    def _ask_choice(self, call: Call[AskChoice]) -> Steps[Choice]:
        ask, engine = call.data, self._state.ready_engine
        self._state.check_stream(ask.stream)
        self._check_question(ask.question)
        self._check_options(ask.options)

        def steps() -> Steps[Choice]:
            choice = yield engine.ask_choice(ask, arrived=call.arrived, deadline=call.deadline)
            self._check_trace(ask.stream, choice.memory)
            return choice

        return steps()

    def _hello(self, call: Call[Empty]) -> Hello:
        return self._state.hello()

    def _streams(self, call: Call[Empty]) -> Streams:
        return Streams(streams=self._state.stream_stats())

    def _bounded(self, ask: Ask) -> Ask:
        """Hold the length of an answer within the limit; who named no length gets what there is."""
        limit = self._state.limits.max_new_tokens
        if ask.max_new_tokens <= limit:
            return ask
        if ask.max_new_tokens == DEFAULT_MAX_NEW_TOKENS:
            return msgspec.structs.replace(ask, max_new_tokens=limit)
        raise _bad("max_new_tokens", f"at most {limit}, got {ask.max_new_tokens}")

    def _check_question(self, question: str) -> None:
        if not question.strip():
            raise _bad("question", "more than white space")
        limit = self._state.limits.max_question_chars
        if len(question) > limit:
            raise NodeError(
                ErrorCode.TOO_LARGE,
                f"a question has at most {limit} characters, got {len(question)}",
                details={"max_question_chars": limit},
            )

    def _check_options(self, options: Sequence[str]) -> None:
        limits = self._state.limits
        if len(options) > limits.max_options:
            raise NodeError(
                ErrorCode.TOO_LARGE,
                f"at most {limits.max_options} options can be compared, got {len(options)}",
                details={"max_options": limits.max_options},
            )
        for n, option in enumerate(options):
            if not option.strip():
                raise _bad(f"options[{n}]", "more than white space")
            if option in options[:n]:
                raise _bad(f"options[{n}]", f"different from the others, got {option[:80]!r} again")
        num_chars = sum(map(len, options))
        if num_chars > limits.max_question_chars:
            raise NodeError(
                ErrorCode.TOO_LARGE,
                f"all options have at most {limits.max_question_chars} characters together, got {num_chars}",
                details={"max_question_chars": limits.max_question_chars},
            )

    def _check_trace(self, stream: str, memory: Provenance) -> None:
        if not memory.unchanged:
            fingerprints = {"before": memory.fingerprint_before, "after": memory.fingerprint_after}
            self._announce("trace_left", "an answer changed the memory", stream=stream, **fingerprints)


def _bad(field: str, expected: str) -> NodeError:
    return NodeError(ErrorCode.BAD_REQUEST, f"{field} must be {expected}", details={"path": f"$.data.{field}"})
