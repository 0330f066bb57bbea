"""A fake engine that knows the script: right answers without a model."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Self

import msgspec
from fakes import FakeEngine
from nodes import running_node

from onlooker.protocol.messages import Answer, Ask
from onlooker.tools.qa import Sockets
from onlooker.tools.scenario import Part


class Oracle(FakeEngine):
    """Answers the questions of a scenario from its scripts, and any other question with its own words.

    The last part of a stream's name says which part of the scenario it shows. `spoil` may change an answer on its way.
    """

    def __init__(
        self, parts: Sequence[Part], spoil: Callable[[str], str] = lambda answer: answer, **settings: Any
    ) -> None:
        super().__init__(**settings)
        self._parts = parts
        self._spoil = spoil

    def __enter__(self) -> Self:
        return self

    def ask(self, request: Ask, **arguments: Any) -> Future[Answer]:
        script = self._parts[int(request.stream.rpartition("-")[2])].script
        moment = self.cache_info(request.stream).num_frames, request.question
        known = {(query.num_frames, query.quiz.question): query.quiz.answer for query in script.queries}
        answer = self._spoil(known[moment]) if moment in known else request.question
        return super().ask(msgspec.structs.replace(request, question=answer), **arguments)


@contextmanager
def running_oracle(parts: Sequence[Part], **settings: Any) -> Iterator[Sockets]:
    """The sockets of a node around an oracle, for the time of a `with`."""
    with Oracle(parts, **settings) as engine, running_node(engine) as node:
        yield Sockets(*(node.endpoints[name] for name in Sockets._fields))
