"""Carries frames from the rings to the engine: sampled, decoded and in chunks."""

import logging
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from ..protocol.errors import NodeError
from .chunk import Chunk, Encoded
from .engine_protocol import EngineProtocol
from .picture_decoder import PictureError, decode_picture, silence_opencv
from .stream_intake import Batch, Decoded, StreamIntake, TimedFrame

CLOSE_TIMEOUT_S = 1.0

logger = logging.getLogger(__name__)


class Feeder:
    """A thread that goes round the streams, and a few that decode for it.

    Each turn takes a few frames of every stream, decodes them side by side, and hands the complete chunks to the
    engine. It sleeps until `wake` says that there is something new.
    """

    def __init__(self, engine: EngineProtocol, *, num_decoders: int = 2) -> None:
        self._engine = engine
        self._max_frames = 8 * num_decoders  # a turn, so that closing never waits for a long queue
        self._decoders = ThreadPoolExecutor(num_decoders, thread_name_prefix="decoder")
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
                logger.warning("the feeder is still decoding after %g s", CLOSE_TIMEOUT_S)
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
        """Say that frames came, or that chunks are done."""
        with self._condition:
            self._has_news = True
            self._condition.notify()

    def _run(self) -> None:
        while self._wait():
            try:
                has_done_something = self._turn()
            except Exception:  # one stream's surprise must not end the others
                logger.exception("a turn of the feeder failed")
                continue
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
        with self._condition:
            intakes = self._intakes
            # Another stream is first next time: when frames are rationed, all get their share.
            self._intakes = intakes[1:] + intakes[:1]
        batches = self._take(intakes)
        decoding = [[self._decoders.submit(decode_timed, timed) for timed in batch.frames] for _, batch in batches]
        for (intake, batch), futures in zip(batches, decoding, strict=True):
            intake.give_back(batch, [future.result() for future in futures])
        for intake in intakes:
            self._submit(intake)
        return has_settled or bool(batches)

    def _settle(self) -> bool:
        has_settled = False
        while self._done:
            intake, chunk, future, done_ns = self._done.popleft()
            intake.settle(chunk, future, done_ns)
            has_settled = True
        return has_settled

    def _take(self, intakes: list[StreamIntake]) -> list[tuple[StreamIntake, Batch]]:
        batches: list[tuple[StreamIntake, Batch]] = []
        num_left = self._max_frames
        for intake in intakes:
            is_full = partial(self._is_full, intake.name)
            batch = intake.take(num_left, is_full) if num_left else None
            if batch is not None:
                batches.append((intake, batch))
                num_left -= len(batch.frames)
        return batches

    def _is_full(self, stream: str) -> bool:
        try:
            return self._engine.cache_info(stream).full
        except NodeError:
            return False  # the stream is going; the engine will say so of its next chunk

    def _submit(self, intake: StreamIntake) -> None:
        for chunk, future in intake.submit(partial(self._encode, intake.name)):
            future.add_done_callback(partial(self._note_done, intake, chunk))

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


def decode_timed(timed: TimedFrame) -> Decoded:
    """Decode a frame, and say how long it took; whatever its bytes do to a decoder becomes a PictureError."""
    started = time.perf_counter()
    try:
        pixels = decode_picture(timed.frame.header, timed.frame.payload)
    except PictureError as error:
        pixels = error
    except Exception as error:  # bytes from outside: whatever they do to a decoder costs this frame alone
        logger.exception("a decoder failed in an unknown way")
        pixels = PictureError("decode_error", str(error))
    return Decoded(pixels, (time.perf_counter() - started) * 1e3)
