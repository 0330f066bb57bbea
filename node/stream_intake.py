"""One stream's way from messages to chunks, on which every frame is accounted for."""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from msgspec import UNSET, UnsetType

from ..protocol.codec import ReceivedFrame
from ..protocol.errors import DropReason
from ..protocol.messages import CacheInfo, FrameCounters, StageTimings, StreamStats
from .chunk import Chunk, ChunkRefused, Encoded, Picture, Unchanged
from .chunker import FrameChunker
from .clock import StreamClock, nominal_interval_ns
from .frame_gate import FrameGate, View
from .load import load_of
from .options import StreamOptions
from .picture_decoder import PictureError, decoded_bytes
from .rate import Rate
from .ring import FrameRing
from .sampler import FrameSampler
from .session_gate import SessionGate

OFFLINE_AFTER_S = 5.0
NUM_RECENT_CHUNKS = 32
MAX_DECODING_BYTES = 256 << 20  # of pixels, at any time

T = TypeVar("T")
State = Literal["waiting", "online", "offline", "paused", "full", "ended"]

logger = logging.getLogger(__name__)


class TimedFrame(NamedTuple):
    """A frame that passed the sampler, and its time on the stream's clock."""

    frame: ReceivedFrame
    stream_ns: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Frames to be decoded, oldest first. After them the session may end; `epoch` tells what a reset made void.

    Their pixels will take `num_bytes`.
    """

    frames: tuple[TimedFrame, ...]
    ends_session: bool
    epoch: int
    num_bytes: int = 0


class Decoded(NamedTuple):
    """What became of a frame of a batch."""

    pixels: np.ndarray | PictureError
    decode_ms: float
    thumbnail: np.ndarray | None = None  # for the frame gate of a stream that has one


class StreamIntake:
    """Ring, clock, sampler, gate, chunker and counters of one stream. Safe from any thread.

    The frames' path: `receive` (the socket's thread) puts them in the ring; `take`, `give_back`, `submit` and
    `settle` (the feeder's thread) carry them on to the engine. At every moment received = dropped + encoded +
    pending. The reasons of `dropped`, in the order of the path:

    - `second_publisher`, `after_eos`, `duplicate`, `out_of_order`, `paused`, `too_large` (for the ring), `ring_full`
    - `time_backwards`, `sampled_out` (the sampler did not keep it)
    - `decode_error`, `too_large`, `bad_size`, `unsupported_encoding`
    - `gated` (it looks like the last one that was encoded)
    - `memory_full`, `out_of_memory`, `encode_error`, `removed`, and `reset`
    """

    def __init__(
        self,
        options: StreamOptions,
        *,
        takeover_s: float = 2.0,
        max_in_flight: int = 2,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.options = options
        self._max_in_flight = max_in_flight
        self._now = now
        self._lock = threading.Lock()

        self._gate = SessionGate(takeover_s)
        self._ring: FrameRing[ReceivedFrame] = FrameRing(options.ring_frames, options.ring_bytes)
        self._clock = StreamClock()
        self._sampler = FrameSampler(options.fps, options.stride)
        self._frame_gate = FrameGate(options.gate) if options.gate is not None else None
        self._degraded: list[str] = []
        self._unchanged: Unchanged | None = None  # not told yet
        self._chunker = FrameChunker(options.chunk_frames)
        self._ready: deque[Chunk] = deque()
        self._batch: Batch | None = None  # taken and not yet given back, so that order is kept
        self._epoch = 0
        self._is_paused = False
        self._may_be_full = False  # the last chunk was refused for want of room: ask before the next is decoded
        self._ends_in_ring = 0
        self._end_is_due = False  # the ring let go of an end of stream, everything before it is through

        self._num_received = 0
        self._num_kept = 0
        self._num_encoded = 0
        self._num_padded = 0
        self._num_forgotten = 0
        self._num_in_flight = 0
        self._chunks_in_flight = 0
        self._dropped: Counter[str] = Counter()

        self._offline_after_s = OFFLINE_AFTER_S
        self._received_rate = Rate()
        self._encoded_rate = Rate()
        self._chunk_rate = Rate()
        self._received_size: tuple[int, int] | UnsetType = UNSET
        self._encoded_size: tuple[int, int] | UnsetType = UNSET
        self._lag_ms: float | UnsetType = UNSET
        self._recent: deque[tuple[float, Encoded]] = deque(maxlen=NUM_RECENT_CHUNKS)

    @property
    def name(self) -> str:
        return self.options.name

    # The path

    def receive(self, frame: ReceivedFrame) -> None:
        """Put a frame in the ring, or drop it and count why. Never blocks on anything slow."""
        with self._lock:
            is_frame = not frame.header.eos  # an end of stream is a message, but no frame
            self._num_received += is_frame
            admission = self._gate.admit(frame, self._now())
            if admission != "next":
                self._drop(admission, num=is_frame)
            elif is_frame:
                self._receive_frame(frame)
            else:
                self._ends_in_ring += 1
                self._push(frame)

    def _receive_frame(self, frame: ReceivedFrame) -> None:
        self._received_rate.add(self._now())
        interval_s = (nominal_interval_ns(frame.header) or 0) / 1e9
        self._offline_after_s = max(OFFLINE_AFTER_S, 3 * interval_s)
        if self._is_paused:
            self._drop("paused")
        elif len(frame.payload) > self._ring.max_bytes:
            self._drop("too_large")
        else:
            self._push(frame)

    def _push(self, frame: ReceivedFrame) -> None:
        for oldest in self._ring.push(frame, len(frame.payload)):
            if oldest.header.eos:
                self._ends_in_ring -= 1
                self._end_is_due = True
            else:
                self._drop("ring_full")

    def take(self, max_frames: int, is_full: Callable[[], bool], max_bytes: int = MAX_DECODING_BYTES) -> Batch | None:
        """Take what should be decoded next, at most `max_frames` and never beyond a chunk; None if nothing.

        It ends with the picture that makes its pixels `max_bytes` or more. Each batch must be given back before
        there is another. Nothing is taken while the engine has as many chunks as it may, so that the ring fills and
        drops. While the memory has no room (`is_full`, asked only after it refused a chunk), frames are dropped
        undecoded.
        """
        with self._lock:
            if self._batch is not None or self._ready or self._chunks_in_flight >= self._max_in_flight:
                return None
            if self._end_is_due:
                self._end_is_due = False
                self._batch = Batch((), ends_session=True, epoch=self._epoch)
            else:
                has_room = not (self._may_be_full and is_full())
                max_frames = min(max_frames, self.options.chunk_frames - len(self._chunker))
                self._batch = self._take(max_frames, max_bytes, has_room)
            return self._batch

    def _take(self, max_frames: int, max_bytes: int, has_room: bool) -> Batch | None:
        frames: list[TimedFrame] = []
        num_bytes = 0
        ends_session = False
        while len(frames) < max_frames and num_bytes < max_bytes and not ends_session:
            frame = self._ring.pop()
            if frame is None:
                break
            ends_session = frame.header.eos
            if ends_session:
                self._ends_in_ring -= 1
            elif (stream_ns := self._sample(frame)) is not None:
                if has_room:
                    frames.append(TimedFrame(frame, stream_ns))
                    num_bytes += decoded_bytes(frame.header, frame.payload)
                else:
                    self._drop("memory_full")
        return Batch(tuple(frames), ends_session, self._epoch, num_bytes) if frames or ends_session else None

    def _sample(self, frame: ReceivedFrame) -> int | None:
        """The frame's time on the stream's clock, or None if it was dropped."""
        stream_ns = self._clock.advance(frame.header)
        if stream_ns is None:
            self._drop("time_backwards")
            return None
        if not self._sampler.keep(stream_ns):
            self._drop("sampled_out")
            return None
        self._num_kept += 1
        return stream_ns

    def give_back(self, batch: Batch, decoded: Sequence[Decoded]) -> None:
        """Put the pictures of the batch into chunks; `decoded` has an entry for each of its frames."""
        assert len(decoded) == len(batch.frames), (len(decoded), len(batch.frames))
        with self._lock:
            assert batch is self._batch, "a batch is given back once"
            self._batch = None
            if batch.epoch != self._epoch:
                return  # the reset has counted its frames
            for timed, result in zip(batch.frames, decoded, strict=True):
                self._add(timed, result)
            if batch.ends_session:
                self._ready += self._chunker.flush()
                self._start_gate_anew()

    @property
    def _num_decoding(self) -> int:
        if self._batch is None or self._batch.epoch != self._epoch:
            return 0
        return len(self._batch.frames)

    def _add(self, timed: TimedFrame, decoded: Decoded) -> None:
        if isinstance(decoded.pixels, PictureError):
            self._drop(decoded.pixels.reason)
            return
        header = timed.frame.header
        picture = Picture(decoded.pixels, timed.frame.seq, header.ts, header.ts_kind, timed.stream_ns)
        self._received_size = picture.size
        gate, thumbnail = self._frame_gate, decoded.thumbnail
        if gate is not None and thumbnail is not None and not self._passes_gate(gate, picture, thumbnail):
            self._drop("gated")
            self._ready += self._chunker.flush()  # nobody knows when there is something new to fill it
            return
        self._ready += self._chunker.add(picture, decoded.decode_ms)

    def _passes_gate(self, gate: FrameGate, picture: Picture, thumbnail: np.ndarray) -> bool:
        """Whether a picture is to be encoded.

        The second one of a temporal patch always is: it costs no token more, and the two belong to one time.
        """
        view = View(picture.size, picture.stream_ns, thumbnail)
        same = None if len(self._chunker) % 2 else gate.looks_like(view)
        if same is None:
            gate.encoded = view
            return True
        self._unchanged = Unchanged(same.stream_ns, picture.ts)
        return False

    def _start_gate_anew(self) -> None:
        if self._frame_gate is not None:
            self._frame_gate.encoded = None

    def submit(self, encode: Callable[[Chunk], Future[Encoded]]) -> list[tuple[Chunk, Future[Encoded]]]:
        """Hand complete chunks to `encode`, as many as may be in flight; each must come back to `settle`.

        `encode` is called under the stream's lock: what it hands over before a reset, it hands over before the
        engine hears of the reset.
        """
        submitted = []
        with self._lock:
            while self._ready and self._chunks_in_flight < self._max_in_flight:
                chunk = self._ready.popleft()
                self._chunks_in_flight += 1
                self._num_in_flight += chunk.num_frames
                submitted.append((chunk, encode(chunk)))
        return submitted

    def tell_unchanged(self, note: Callable[[Unchanged], None]) -> None:
        """Hand on until when frames came that looked like the newest one, if that is news.

        Under the stream's lock, so that it comes to the engine before a reset, or after it, as the frames do.
        """
        with self._lock:
            if self._unchanged is not None:
                note(self._unchanged)
                self._unchanged = None

    def settle(self, chunk: Chunk, future: Future[Encoded], done_ns: int) -> None:
        """Count the frames of a chunk whose future was done at `done_ns`, in `time.time_ns()` nanoseconds."""
        reason = _refusal(self.name, future)
        with self._lock:
            self._chunks_in_flight -= 1
            self._num_in_flight -= chunk.num_frames
            self._may_be_full = reason == "memory_full"
            if reason is not None:
                self._drop(reason, num=chunk.num_frames)
                self._start_gate_anew()  # what came after it may have looked like it, and would be missing
            else:
                self._count_encoded(chunk, future.result(), done_ns)

    def _count_encoded(self, chunk: Chunk, encoded: Encoded, done_ns: int) -> None:
        self._num_encoded += chunk.num_frames
        self._num_padded += chunk.num_padded
        self._num_forgotten += encoded.num_forgotten_frames
        self._encoded_rate.add(self._now(), chunk.num_frames)
        self._chunk_rate.add(self._now())
        self._encoded_size = encoded.encoded_size
        self._recent.append((chunk.decode_ms, encoded))
        newest = chunk.pictures[-1]
        self._lag_ms = (done_ns - newest.ts) / 1e6 if newest.ts_kind == "capture" else UNSET

    def _drop(self, reason: str, num: int = 1) -> None:
        if num:
            self._dropped[DropReason(reason).value] += num  # PROTOCOL.md lists them all

    # Control

    def adjust(self, options: StreamOptions, degraded: Sequence[str]) -> None:
        """Go on with another rate and another gate; `degraded` is what was given up by that."""
        with self._lock:
            before, self.options, self._degraded = self.options, options, list(degraded)
            if (options.fps, options.stride) != (before.fps, before.stride):
                self._sampler = FrameSampler(options.fps, options.stride)
            if options.gate != before.gate:
                self._frame_gate = FrameGate(options.gate) if options.gate is not None else None

    def pause(self) -> None:
        """Drop what comes from now on; what was received before still goes its way."""
        with self._lock:
            self._is_paused = True

    def resume(self) -> None:
        with self._lock:
            self._is_paused = False

    def reset(self, reset_engine: Callable[[], Future[CacheInfo]]) -> Future[CacheInfo]:
        """Drop what waits and start the stream's clock anew, together with the engine's memory.

        `reset_engine` is called under the stream's lock, so that every frame falls before or after the reset on both
        sides alike.
        """
        with self._lock:
            self._drop_waiting()
            self._clock = StreamClock()
            self._sampler = FrameSampler(self.options.fps, self.options.stride)
            return reset_engine()

    def rollback(self, roll_back_engine: Callable[[], Future[CacheInfo]]) -> Future[CacheInfo]:
        """Drop what waits as `reset`, together with the end of the engine's memory.

        As with a reset, every frame falls before or after it on both sides alike. The stream's clock goes on: the
        memory keeps earlier frames, and what comes next must be later than they are. What waits is dropped also if
        the engine then finds that it has no such mark.
        """
        with self._lock:
            self._drop_waiting()
            return roll_back_engine()

    def _drop_waiting(self) -> None:
        left = self._ring.clear()
        num_waiting = len(left) - self._ends_in_ring + self._num_decoding + len(self._chunker.clear())
        num_waiting += sum(chunk.num_frames for chunk in self._ready)
        self._ready.clear()
        self._ends_in_ring = 0
        self._drop("reset", num=num_waiting)
        self._epoch += 1
        self._may_be_full = False
        self._start_gate_anew()
        self._unchanged = None

    # Facts

    def counters(self) -> FrameCounters:
        with self._lock:
            return self._counters()

    def _counters(self) -> FrameCounters:
        return FrameCounters(
            received=self._num_received,
            kept=self._num_kept,
            encoded=self._num_encoded,
            pending=self._pending(),
            padded=self._num_padded,
            dropped=dict(self._dropped),
            gaps=self._gate.gaps,
            forgotten=self._num_forgotten,
            last_seq=_or_unset(self._gate.last_seq),
            last_session=_or_unset(self._gate.session),
        )

    def _pending(self) -> int:
        num_ready = sum(chunk.num_frames for chunk in self._ready)
        num_in_ring = len(self._ring) - self._ends_in_ring
        return num_in_ring + self._num_decoding + len(self._chunker) + num_ready + self._num_in_flight

    def stats(self, cache: CacheInfo) -> StreamStats:
        """The stream's telemetry; `cache` is the engine's part of it."""
        with self._lock:
            now, stages = self._now(), self._stages()
            return StreamStats(
                ts=time.time_ns(),
                stream=self.name,
                state=self._state(now, is_full=cache.full),
                layout=self.options.layout,
                chunk_frames=self.options.chunk_frames,
                retention=self.options.retention,
                gate=_or_unset(self.options.gate),
                drop=_or_unset(self.options.drop),
                last_frames=self.options.last_frames or UNSET,
                received_size=self._received_size,
                encoded_size=self._encoded_size,
                fps_received=_or_unset(self._received_rate.per_second(now)),
                fps_encoded=_or_unset(self._encoded_rate.per_second(now)),
                lag_ms=self._lag_ms,
                load=load_of(stages, self._chunk_rate.per_second(now)),
                degraded=self._degraded,
                cache=cache,
                frames=self._counters(),
                stages=stages,
            )

    def _state(self, now: float, is_full: bool) -> State:
        """`ended` means that everything up to the end of stream has become memory or was dropped."""
        heard_at = self._gate.heard_at
        is_through = not (self._ends_in_ring or self._end_is_due or self._pending())
        if self._is_paused:
            return "paused"
        if heard_at is None:
            return "waiting"
        if self._gate.has_ended and is_through:
            return "ended"
        if is_full:
            return "full"
        return "offline" if now - heard_at > self._offline_after_s else "online"

    def _stages(self) -> StageTimings:
        if not self._recent:
            return StageTimings()
        return StageTimings(
            decode_ms=fmean(decode_ms for decode_ms, _ in self._recent),
            preprocess_ms=fmean(encoded.preprocess_ms for _, encoded in self._recent),
            vision_ms=fmean(encoded.vision_ms for _, encoded in self._recent),
            prefill_ms=fmean(encoded.prefill_ms for _, encoded in self._recent),
        )


def _or_unset(value: T | None) -> T | UnsetType:
    return UNSET if value is None else value


def _refusal(stream: str, future: Future[Encoded]) -> str | None:
    """The drop reason of a chunk that did not become memory, or None for one that did."""
    if future.cancelled():
        return "removed"
    error = future.exception()
    if error is None:
        return None
    if isinstance(error, ChunkRefused):
        return error.reason
    logger.error("stream %s: a chunk could not be encoded", stream, exc_info=error)
    return "encode_error"
