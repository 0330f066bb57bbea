"""Carries frames from the rings to the engine: sampled, decoded and in chunks."""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..protocol.codec import Buffer
from ..protocol.errors import NodeError
from ..protocol.messages import FrameHeader
from .chunk import Chunk, Encoded
from .engine_protocol import EngineProtocol
from .frame_gate import thumbnail
from .picture_decoder import PictureError, decode_picture, silence_opencv
from .stream_intake import MAX_DECODING_BYTES, Batch, Decoded, StreamIntake, TimedFrame

CLOSE_TIMEOUT_S = 1.0
MIN_DECODERS = 3  # one for a slow picture, and two that go on
MAX_DECODERS = 12  # a JPEG of 1080p takes one some 10 ms: more of them wait for each other

Decode = Callable[[FrameHeader, Buffer], np.ndarray]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Decoding:
    """A batch whose pictures are being decoded in lanes: the n-th frame in lane n modulo the number of lanes."""

    intake: StreamIntake
    batch: Batch
    lanes: tuple[Future[list[Decoded]], ...]

    @property
    def is_done(self) -> bool:
        return all(lane.done() for lane in self.lanes)

    def results(self) -> list[Decoded]:
        """What became of the frames, in the order of the batch."""
        lanes = [lane.result() for lane in self.lanes]
        return [lanes[n % len(lanes)][n // len(lanes)] for n in range(len(self.batch.frames))]


class Feeder:
    """A thread that goes round the streams, and a few that decode for it.

    Each turn takes a few frames of every stream to be decoded, and hands what is complete by now to the engine. It
    sleeps until `wake` says that there is something new. A stream's next batch is taken when the one before is
    decoded, whatever the others do, and one decoder is always left to them: a slow picture holds up its own stream
    alone. At most `max_decoding_bytes` of pixels, and one picture more, are being decoded at any time.
    """

    def __init__(
        self,
        engine: EngineProtocol,
        *,
        num_decoders: int | None = None,
        max_decoding_bytes: int = MAX_DECODING_BYTES,
        decode: Decode = decode_picture,
    ) -> None:
        self._engine = engine
        self._decode = decode
        num_decoders = num_decoders or num_decoders_for(os.cpu_count() or 1)
        self._max_frames = 8 * num_decoders  # in decoding, so that closing never waits for a long queue
        self._max_bytes = max_decoding_bytes
        self._max_lanes = max(1, num_decoders - 1)  # of one stream
        self._decoders = ThreadPoolExecutor(num_decoders, thread_name_prefix="decoder")
        self._decoding: list[Decoding] = []
        self._intakes: list[StreamIntake] = []
        self._done: deque[tuple[StreamIntake, Chunk, Future[Encoded], int]] = deque()
        self._condition = threading.Condition()
        self._has_news = False
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="feeder", daemon=True)

    def start(self) -> None:
        silence_opencv()
        self._thread.start()

    def close(self) -> None:
        """End the threads; what they have not handed to the engine is lost."""
        with self._condition:
            self._is_closing = True
            self._condition.notify()
        if self._thread.ident is not None:
            self._thread.join(CLOSE_TIMEOUT_S)
            if self._thread.is_alive():
                logger.warning("the feeder has not ended after %g s", CLOSE_TIMEOUT_S)
        self._decoders.shutdown(wait=False, cancel_futures=True)

    def add(self, intake: StreamIntake) -> None:
        with self._condition:
            self._intakes = [*self._intakes, intake]
        self.wake()

    def remove(self, intake: StreamIntake) -> None:
        """Take no more frames of a stream; its chunks in flight are still counted when they come back."""
        with self._condition:
            self._intakes = [other for other in self._intakes if other is not intake]

    def wake(self) -> None:
        """Say that frames came, or that pictures or chunks are done."""
        with self._condition:
            self._has_news = True
            self._condition.notify()

    def _run(self) -> None:
        while self._wait():
            try:
                has_done_something = self._turn()
            except Exception:  # what failed is done with, and the rest still waits
                logger.exception("a turn of the feeder failed")
                has_done_something = True
            if has_done_something:
                self.wake()

    def _wait(self) -> bool:
        """Wait for news; whether to go on."""
        with self._condition:
            self._condition.wait_for(lambda: self._has_news or self._is_closing)
            self._has_news = False
            return not self._is_closing

    def _turn(self) -> bool:
        """Go round the streams once; whether anything moved."""
        has_settled = self._settle()
        has_decoded = self._collect()
        served: set[StreamIntake] = set()
        for intake in self._intakes:
            try:
                self._submit(intake)
                if self._start_batch(intake):
                    served.add(intake)
            except Exception:  # one stream's surprise must not end the others
                logger.exception("stream %s: a turn of the feeder failed", intake.name)
        with self._condition:
            # Who was served is last next time: when frames are rationed, all get their share.
            self._intakes = sorted(self._intakes, key=served.__contains__)
        return has_settled or has_decoded or bool(served)

    def _settle(self) -> bool:
        """Account for the chunks that the engine is done with."""
        has_settled = False
        while self._done:
            intake, chunk, future, done_ns = self._done.popleft()
            intake.settle(chunk, future, done_ns)
            has_settled = True
        return has_settled

    def _collect(self) -> bool:
        """Give the batches back whose pictures are decoded."""
        done = [decoding for decoding in self._decoding if decoding.is_done]
        for decoding in done:
            self._decoding.remove(decoding)
            decoding.intake.give_back(decoding.batch, decoding.results())
        return bool(done)

    def _start_batch(self, intake: StreamIntake) -> bool:
        """Take frames of a stream and begin to decode them; whether there were any."""
        max_frames = self._max_frames - sum(len(decoding.batch.frames) for decoding in self._decoding)
        max_bytes = self._max_bytes - sum(decoding.batch.num_bytes for decoding in self._decoding)
        batch = intake.take(max_frames, partial(self._is_full, intake.name), max_bytes)
        if batch is None:
            return False
        num_lanes = min(self._max_lanes, len(batch.frames))
        decode_one = partial(decode_timed, decode=self._decode, has_gate=intake.options.gate is not None)
        lanes = tuple(self._start_lane(batch.frames[lane::num_lanes], decode_one) for lane in range(num_lanes))
        self._decoding.append(Decoding(intake, batch, lanes))
        for lane in lanes:
            lane.add_done_callback(lambda _: self.wake())
        return True

    def _start_lane(
        self, frames: Sequence[TimedFrame], decode_one: Callable[[TimedFrame], Decoded]
    ) -> Future[list[Decoded]]:
        try:
            return self._decoders.submit(lambda: [decode_one(timed) for timed in frames])
        except RuntimeError as error:  # no thread can be had; the batch must come back all the same
            logger.error("%d frames cannot be decoded: %s", len(frames), error)
            undecoded: Future[list[Decoded]] = Future()
            undecoded.set_result([Decoded(PictureError("decode_error", str(error)), 0.0)] * len(frames))
            return undecoded

    def _is_full(self, stream: str) -> bool:
        try:
            return self._engine.cache_info(stream).full
        except NodeError:
            return False  # the stream is going; the engine will say so of its next chunk

    def _submit(self, intake: StreamIntake) -> None:
        for chunk, future in intake.submit(partial(self._encode, intake.name)):
            future.add_done_callback(partial(self._note_done, intake, chunk))
        intake.tell_unchanged(partial(self._engine.note_unchanged, intake.name))

    def _encode(self, stream: str, chunk: Chunk) -> Future[Encoded]:
        try:
            return self._engine.encode(stream, chunk)
        except Exception as error:
            failed: Future[Encoded] = Future()
            failed.set_exception(error)
            return failed

    def _note_done(self, intake: StreamIntake, chunk: Chunk, future: Future[Encoded]) -> None:
        self._done.append((intake, chunk, future, time.time_ns()))
        self.wake()


def num_decoders_for(num_cores: int) -> int:
    """Half of the cores: the others are for the engine, the sockets and whatever else the machine does."""
    return max(MIN_DECODERS, min(MAX_DECODERS, num_cores // 2))


def decode_timed(timed: TimedFrame, decode: Decode = decode_picture, *, has_gate: bool = False) -> Decoded:
    """Decode a frame, for a stream with a gate also its thumbnail, and say how long it took.

    Whatever its bytes do to a decoder becomes a PictureError.
    """
    started, small = time.perf_counter(), None
    try:
        pixels = decode(timed.frame.header, timed.frame.payload)
        small = thumbnail(pixels) if has_gate else None
    except PictureError as error:
        pixels = error
    except Exception as error:  # bytes from outside: whatever they do to a decoder costs this frame alone
        logger.exception("a decoder failed in an unknown way")
        pixels = PictureError("decode_error", str(error))
    return Decoded(pixels, (time.perf_counter() - started) * 1e3, small)
