"""From cameras to the engine: everything a frame passes through before it becomes memory.

    frames.FrameSubscriber    sockets, one thread       messages -> frames
    stream_intake             one for each stream       ring, clock, sampler, chunker, counters
    feeder.Feeder             one thread and decoders   frames -> chunks -> engine.encode

    with Intake(engine, context=context, bind="tcp://127.0.0.1:*") as intake:
        engine.add_stream(options).result()
        intake.add_stream(options)
        intake.counters("front")        # FrameCounters
        intake.stream_stats()           # StreamStats of every stream, memory included
        intake.reset("front").result()  # also resets the engine's memory
        intake.remove_stream("front")
        engine.remove_stream("front").result()

The engine's stream is added before the intake's and removed after it. A reset is one call, because frames on
their way and the memory must agree about which frames came before it.
"""

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial

import zmq

from ..protocol.codec import ReceivedFrame
from ..protocol.errors import ErrorCode, NodeError
from ..protocol.messages import CacheInfo, FrameCounters, StreamStats
from .engine_protocol import EngineProtocol
from .feeder import Feeder
from .frames import FrameSubscriber, Secure, leave_open
from .options import StreamOptions
from .picture_decoder import MAX_PIXELS, decode_picture
from .stream_intake import StreamIntake


class Intake:
    """The frames' side of the node. Its methods may be called from any thread.

    A stream that is not there is a NodeError UNKNOWN_STREAM. `secure(socket, role, options)` prepares a socket
    for CURVE before it is bound (`options` is None) or connected (the stream's options); the authenticator must
    run in the same `context`. A picture of more than `max_pixels` is dropped as `too_large`.
    """

    def __init__(
        self,
        engine: EngineProtocol,
        *,
        context: zmq.Context,
        bind: str | None = None,
        secure: Secure = leave_open,
        takeover_s: float = 2.0,
        max_in_flight: int = 2,
        num_decoders: int | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self._engine = engine
        self._takeover_s = takeover_s
        self._max_in_flight = max_in_flight
        self._streams: dict[str, StreamIntake] = {}
        self._lock = threading.Lock()
        self._feeder = Feeder(engine, num_decoders=num_decoders, decode=partial(decode_picture, max_pixels=max_pixels))
        self._subscriber = FrameSubscriber(self._receive, context=context, bind=bind, secure=secure)

    def __enter__(self) -> "Intake":
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def bound_endpoint(self) -> str | None:
        """Where cameras connect to, with the port that was taken; None if they cannot."""
        return self._subscriber.bound_endpoint

    @property
    def rejected(self) -> dict[str, int]:
        """Messages and connections that belong to no stream's counters, by reason."""
        return self._subscriber.rejected

    def start(self) -> None:
        """Bind and begin to receive. Raises zmq.ZMQError if the endpoint cannot be had."""
        self._subscriber.start()
        self._feeder.start()

    def close(self) -> None:
        """Close the sockets and end the threads, within about a second."""
        self._subscriber.close()
        self._feeder.close()

    def add_stream(self, options: StreamOptions) -> None:
        """Take in the frames of a stream.

        Raises NodeError STREAM_EXISTS, or BAD_REQUEST if its camera's endpoint or key cannot be used.
        """
        intake = StreamIntake(options, takeover_s=self._takeover_s, max_in_flight=self._max_in_flight)
        with self._lock:
            if options.name in self._streams:
                raise NodeError(ErrorCode.STREAM_EXISTS, f"stream {options.name} exists")
            self._streams[options.name] = intake
        try:
            self._connect(options)
        except Exception:
            with self._lock:
                del self._streams[options.name]
            raise
        self._feeder.add(intake)

    def _connect(self, options: StreamOptions) -> None:
        try:
            self._subscriber.add(options)
        except (zmq.ZMQError, OSError, ValueError) as error:
            message = f"stream {options.name} cannot connect to {options.connect}: {error}"
            raise NodeError(ErrorCode.BAD_REQUEST, message) from error

    def remove_stream(self, name: str) -> None:
        """Take in no more frames of a stream, and forget those on their way."""
        with self._lock:
            intake = self._find(name)
            del self._streams[name]
        self._subscriber.remove(name)
        self._feeder.remove(intake)

    def pause(self, name: str) -> None:
        """Drop the stream's frames as `paused` until `resume`."""
        self._stream(name).pause()

    def resume(self, name: str) -> None:
        self._stream(name).resume()

    def adjust(self, name: str, options: StreamOptions, degraded: Sequence[str]) -> None:
        """Take frames with another rate and another gate from now on; `degraded` is what was given up by that."""
        self._stream(name).adjust(options, degraded)

    def reset(self, name: str) -> Future[CacheInfo]:
        """Drop the stream's frames on their way as `reset`, and reset the engine's memory of it."""
        return self._stream(name).reset(lambda: self._engine.reset(name))

    def rollback(self, name: str, mark: str) -> Future[CacheInfo]:
        """Drop the stream's frames on their way as `reset`, and forget what the engine's memory has after a mark."""
        return self._stream(name).rollback(lambda: self._engine.rollback(name, mark))

    def counters(self, name: str) -> FrameCounters:
        return self._stream(name).counters()

    def stream_stats(self) -> list[StreamStats]:
        """The telemetry of all streams, their memory included. A stream the engine just removed is left out."""
        with self._lock:
            intakes = list(self._streams.values())
        return [stats for intake in intakes if (stats := self._stats(intake))]

    def _stats(self, intake: StreamIntake) -> StreamStats | None:
        try:
            cache = self._engine.cache_info(intake.name)
        except NodeError as error:
            if error.code == ErrorCode.UNKNOWN_STREAM:
                return None
            raise
        return intake.stats(cache)

    def _stream(self, name: str) -> StreamIntake:
        with self._lock:
            return self._find(name)

    def _find(self, name: str) -> StreamIntake:
        if name not in self._streams:
            details = {"streams": list(self._streams)}
            raise NodeError(ErrorCode.UNKNOWN_STREAM, f"there is no stream {name}", details=details)
        return self._streams[name]

    def _receive(self, frame: ReceivedFrame) -> bool:
        with self._lock:
            intake = self._streams.get(frame.header.stream)
        if intake is None:
            return False
        intake.receive(frame)
        self._feeder.wake()
        return True
