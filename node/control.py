"""The endpoints of the control socket: what is watched, forgotten, named and ended."""

import logging
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

from msgspec import UNSET, to_builtins

from ..protocol.errors import NodeError
from ..protocol.messages import (
    CacheInfo,
    CancelRef,
    Empty,
    Forecast,
    Hello,
    Mark,
    MarkRef,
    Marks,
    NodeStats,
    Pong,
    StreamAdded,
    StreamRef,
    Streams,
    StreamSpec,
)
from ..protocol.quantity import bytes_text
from .degradation import Degradation
from .load import check_load, with_load
from .options import StreamOptions
from .requests import Call, Endpoint, Steps
from .state import NodeState
from .telemetry import Announce

logger = logging.getLogger(__name__)


class Control:
    """Acts on the streams of a node. `cancel` ends a question, by its session and id."""

    def __init__(
        self,
        state: NodeState,
        announce: Announce,
        cancel: Callable[[str, str], Future[bool]],
        degradation: Degradation,
    ) -> None:
        self._state = state
        self._announce = announce
        self._degradation = degradation
        self._cancel_question = cancel

    def endpoints(self) -> dict[str, Endpoint[Any]]:
        return {
            "ping": Endpoint(Empty, self._ping),
            "hello": Endpoint(Empty, self._hello),
            "status": Endpoint(Empty, self._status),
            "streams": Endpoint(Empty, self._streams),
            "cache_info": Endpoint(StreamRef, self._cache_info),
            "reset": Endpoint(StreamRef, self._reset),
            "mark": Endpoint(MarkRef, self._mark),
            "rollback": Endpoint(MarkRef, self._rollback),
            "mark_delete": Endpoint(MarkRef, self._mark_delete),
            "marks": Endpoint(StreamRef, self._marks),
            "cancel": Endpoint(CancelRef, self._cancel),
            "stream_add": Endpoint(StreamSpec, self._stream_add),
            "stream_remove": Endpoint(StreamRef, self._stream_remove),
            "stream_pause": Endpoint(StreamRef, self._stream_pause),
            "stream_resume": Endpoint(StreamRef, self._stream_resume),
        }

    # Answered at once

    def _ping(self, call: Call[Empty]) -> Pong:
        return self._state.pong()

    def _hello(self, call: Call[Empty]) -> Hello:
        return self._state.hello()

    def _status(self, call: Call[Empty]) -> NodeStats:
        return self._state.stats()

    def _streams(self, call: Call[Empty]) -> Streams:
        return Streams(streams=self._state.stream_stats())

    def _cache_info(self, call: Call[StreamRef]) -> CacheInfo:
        return self._state.engine.cache_info(call.data.stream)

    def _stream_pause(self, call: Call[StreamRef]) -> Empty:
        self._state.intake.pause(call.data.stream)
        return Empty()

    def _stream_resume(self, call: Call[StreamRef]) -> Empty:
        self._state.intake.resume(call.data.stream)
        return Empty()

    # Done by the engine

    def _reset(self, call: Call[StreamRef]) -> Steps[CacheInfo]:
        stream = call.data.stream
        self._state.check_stream(stream)

        def steps() -> Steps[CacheInfo]:
            # One call for the frames on their way and the memory: both agree on what came before it.
            info = yield self._state.intake.reset(stream)
            self._announce("reset", "the memory was forgotten", stream=stream)
            return info

        return steps()

    def _mark(self, call: Call[MarkRef]) -> Steps[Mark]:
        self._state.check_stream(call.data.stream)
        return _result(lambda: self._state.engine.mark(call.data.stream, call.data.name))

    def _rollback(self, call: Call[MarkRef]) -> Steps[CacheInfo]:
        stream, name = call.data.stream, call.data.name
        self._state.check_stream(stream)

        def steps() -> Steps[CacheInfo]:
            marks = yield self._state.engine.marks(stream)
            if name not in {mark.name for mark in marks.marks}:
                yield self._state.engine.rollback(stream, name)  # refuses it, and no frame is dropped
            info = yield self._state.intake.rollback(stream, name)
            self._announce("rolled_back", f"all after mark {name} was forgotten", stream=stream, mark=name)
            return info

        return steps()

    def _mark_delete(self, call: Call[MarkRef]) -> Steps[Marks]:
        self._state.check_stream(call.data.stream)
        return _result(lambda: self._state.engine.delete_mark(call.data.stream, call.data.name))

    def _marks(self, call: Call[StreamRef]) -> Steps[Marks]:
        self._state.check_stream(call.data.stream)
        return _result(lambda: self._state.engine.marks(call.data.stream))

    def _cancel(self, call: Call[CancelRef]) -> Steps[Empty]:
        """Succeeds also when the question is not open any more: it may have been answered just now."""

        def steps() -> Steps[Empty]:
            yield self._cancel_question(call.data.session, call.data.id)
            return Empty()

        return steps()

    def _stream_add(self, call: Call[StreamSpec]) -> Steps[StreamAdded]:
        return self.add_stream(self._state.config.spec_options(call.data))

    def _stream_remove(self, call: Call[StreamRef]) -> Steps[Empty]:
        self._state.check_stream(call.data.stream)
        return self.remove_stream(call.data.stream)

    def add_stream(self, options: StreamOptions) -> Steps[StreamAdded]:
        """Reserve a stream's memory, which others may have to cede, then take in its frames; all or nothing."""
        allotment = self._state.allotment
        if allotment.ceded(options):  # nobody forgets anything for one that would then be refused
            self._check_load((yield self._state.engine.foretell(options)), options)
        yield from self._resize(partial(allotment.ceded, options))
        try:
            forecast = yield from self._take(options)
        except NodeError:
            yield from self._resize(allotment.regained)
            raise
        self._degradation.add(options)
        self._announce_added(options, forecast)
        return StreamAdded(forecast=forecast)

    def _take(self, options: StreamOptions) -> Generator[Future[Any], Any, Forecast]:
        """Begin a stream with what is left for it."""
        allotment = self._state.allotment
        granted = replace(options, min_memory_bytes=options.guaranteed_bytes, memory_bytes=allotment.take(options))
        try:
            forecast = yield from self._begin_stream(granted)
        except BaseException:
            allotment.give_back(options.name)
            raise
        allotment.keep(options.name, forecast.memory_bytes)
        return forecast

    def _announce_added(self, options: StreamOptions, forecast: Forecast) -> None:
        details = to_builtins(forecast)
        del details["footprint"]
        message = "the stream is remembered from now on"
        if forecast.memory_bytes < options.memory_bytes:
            message += (
                f", in {bytes_text(forecast.memory_bytes)} of the {bytes_text(options.memory_bytes)} that it asked for"
            )
        if forecast.load is not UNSET and forecast.load > 1:
            message += "; it asks for more of the engine's time than there is"
        self._announce("stream_added", message, stream=options.name, **details)

    def _begin_stream(self, options: StreamOptions) -> Generator[Future[Any], Any, Forecast]:
        engine, intake = self._state.engine, self._state.intake
        foretold = yield engine.add_stream(options)
        try:
            forecast = self._check_load(foretold, options)
            intake.add_stream(options)
        except NodeError:
            yield engine.remove_stream(options.name)
            raise
        return forecast

    def _check_load(self, foretold: Forecast, options: StreamOptions) -> Forecast:
        """The forecast with its load. Raises NodeError for one that others leave too little time for."""
        streams = self._state.intake.stream_stats()
        forecast = with_load(foretold, options, streams)
        check_load(forecast, streams, self._state.config.limits.max_load)
        return forecast

    def remove_stream(self, stream: str) -> Steps[Empty]:
        """Take in no more frames of a stream, then free its memory."""
        self._degradation.remove(stream)
        self._state.intake.remove_stream(stream)
        yield self._state.engine.remove_stream(stream)
        self._state.allotment.give_back(stream)
        self._announce("stream_removed", "the stream and its memory are gone", stream=stream)
        yield from self._resize(self._state.allotment.regained)
        return Empty()

    def _resize(self, sizes: Callable[[], Mapping[str, int]]) -> Generator[Future[Any], Any, None]:
        """Have streams go on with memories of so many bytes, one after the other; one that cannot keeps what it has.

        `sizes` are asked for anew each time: other streams may be added and removed meanwhile.
        """
        allotment, unable = self._state.allotment, set[str]()
        while sized := next((each for each in sizes().items() if each[0] not in unable), None):
            stream, num_bytes = sized
            # Counted from now on: what is asked of the engine after this comes after this.
            had_bytes = allotment.keep(stream, num_bytes)
            try:
                forecast = yield self._state.engine.resize(stream, num_bytes)
            except NodeError as error:
                allotment.keep(stream, had_bytes)
                unable.add(stream)
                logger.warning("stream %s cannot go on with %s: %s", stream, bytes_text(num_bytes), error)
                continue
            details = {"memory_bytes": num_bytes, "capacity_tokens": forecast.capacity_tokens}
            self._announce(
                "stream_resized", f"its memory has {bytes_text(num_bytes)} from now on", stream=stream, **details
            )


def _result(work: Callable[[], Future[Any]]) -> Steps[Any]:
    """Steps that are one piece of the engine's work."""
    return (yield work())
