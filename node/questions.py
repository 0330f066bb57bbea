"""The endpoints of the ask socket. What cannot be answered is refused here, before the engine sees it."""

from typing import Any

from ..protocol.messages import Answer, Ask, AskChoice, Choice, Empty, Hello, Provenance, Streams
from .requests import Call, Endpoint, Steps
from .state import NodeState
from .telemetry import Announce

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
        engine = self._state.ready_engine
        self._state.check_stream(call.data.stream)
        ask = self._state.limits.checked_ask(call.data)

        def steps() -> Steps[Answer]:
            answer = yield engine.ask(ask, arrived=call.arrived, deadline=call.deadline, on_delta=call.on_delta)
            self._check_trace(ask.stream, answer.memory)
            return answer

        return steps()

    def _ask_choice(self, call: Call[AskChoice]) -> Steps[Choice]:
        engine = self._state.ready_engine
        self._state.check_stream(call.data.stream)
        ask = self._state.limits.checked_choice(call.data)

        def steps() -> Steps[Choice]:
            choice = yield engine.ask_choice(ask, arrived=call.arrived, deadline=call.deadline)
            self._check_trace(ask.stream, choice.memory)
            return choice

        return steps()

    def _hello(self, call: Call[Empty]) -> Hello:
        return self._state.hello()

    def _streams(self, call: Call[Empty]) -> Streams:
        return Streams(streams=self._state.stream_stats())

    def _check_trace(self, stream: str, memory: Provenance) -> None:
        if not memory.unchanged:
            fingerprints = {"before": memory.fingerprint_before, "after": memory.fingerprint_after}
            self._announce("trace_left", "an answer changed the memory", stream=stream, **fingerprints)
