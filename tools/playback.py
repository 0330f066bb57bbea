"""Playing one video file as one stream: when each picture is due, how many may be on their way, what became of them."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import msgspec

from ..protocol.camera import FramePublisher
from ..protocol.client import NodeClient
from ..protocol.errors import NoReplyError, OnlookerError
from ..protocol.messages import FrameCounters, StreamStats
from .feed import Clock, Encoding, Feed, Stamp
from .link import Link, stats_of
from .video import NS_PER_S, ReaderName, Selection, Video, VideoError, open_video

POLL_S = 0.01
STALLED_AFTER_S = 60.0
SETTLE_S = 5.0
ARRIVAL_S = 1.0
PROBE_TIMEOUT_S = 1.0
# A loop goes on one picture after its last one, also where the file does not say at which rate.
_DEFAULT_FPS = 25.0


class StalledError(OnlookerError):
    """The node has stopped to take frames."""

    def __init__(self, stats: StreamStats) -> None:
        super().__init__(
            f"stream {stats.stream} has taken no frame for {STALLED_AFTER_S:g} s: "
            f"it is {stats.state}, {stats.frames.pending} frames are pending"
        )


@dataclass(frozen=True, slots=True)
class PlaybackOptions:
    """What is played of a file, how fast, and how it is sent.

    Raises ValueError, naming the field, for a value that cannot work.
    """

    selection: Selection = field(default_factory=Selection)
    reader: ReaderName = "auto"
    rate: float = 1.0  # 0: as fast as possible
    num_loops: int = 1  # 0: for ever
    clock: Clock = "media"
    encoding: Encoding = "jpeg"
    jpeg_quality: int = 90

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError(f"rate must not be negative, got {self.rate:g}")
        if self.num_loops < 0:
            raise ValueError(f"loops must not be negative, got {self.num_loops}")

    def media_fps(self, video_fps: float | None) -> float | None:
        """The rate of the pictures taken, on the file's clock, if the file says its own."""
        if not video_fps:
            return None
        fps = video_fps / self.selection.stride
        return fps if self.selection.fps is None else min(fps, self.selection.fps)

    @property
    def speed(self) -> float:
        """How much faster than the file's the clock runs whose times are sent."""
        return self.rate if self.rate and self.clock == "wall" else 1.0


class Arrivals(msgspec.Struct, frozen=True, kw_only=True):
    """What the node did with the frames of a playback, by its own counters."""

    received: int
    encoded: int
    pending: int
    gaps: int
    dropped: dict[str, int]

    @classmethod
    def between(cls, before: FrameCounters, after: FrameCounters) -> Arrivals:
        """What was counted from one reading to a later one, less the frames that were pending at the first.

        A node that was restarted meanwhile has counted from nothing.
        """
        if after.received < before.received:
            before = FrameCounters(received=0, kept=0, encoded=0, pending=0, padded=0, dropped={}, gaps=0)
        dropped = {reason: num - before.dropped.get(reason, 0) for reason, num in after.dropped.items()}
        encoded = after.encoded - before.encoded
        # Frames are encoded in their order: the first ones are those that were pending before.
        num_earlier = min(before.pending, encoded)
        return cls(
            received=after.received - before.received,
            encoded=encoded - num_earlier,
            pending=max(0, after.pending - (before.pending - num_earlier)),
            gaps=after.gaps - before.gaps,
            dropped={reason: num for reason, num in dropped.items() if num},
        )

    @property
    def lost(self) -> dict[str, int]:
        """Frames that were meant for the memory and are not in it, by reason."""
        on_purpose = ("sampled_out", "gated", "paused", "reset", "removed")
        lost = {reason: num for reason, num in self.dropped.items() if reason not in on_purpose}
        return lost | {"never_arrived": self.gaps} if self.gaps else lost

    @property
    def is_all_lost(self) -> bool:
        """Whether frames were meant for the memory, and not one of them is there or on its way."""
        return bool(self.lost) and self.encoded == self.pending == 0


class Account:
    """Follows the frames of one publisher's session through the node's counters.

    With `max_in_flight` it also gives credit: `wait` returns once the node has let go of all but so many of the
    frames that were sent, so that no ring of the node overflows. Raises the client's errors and StalledError.
    """

    def __init__(self, node: NodeClient, publisher: FramePublisher, max_in_flight: int | None = None) -> None:
        self._node = node
        self._publisher = publisher
        self._max_in_flight = max_in_flight
        self._num_done = 0
        self.is_silent = False
        self._before = self._stats().frames

    def probe(self) -> None:
        """Find out whether the node is there, which its publisher cannot tell; any thread may do this."""
        try:
            self._node.ping(timeout_s=PROBE_TIMEOUT_S)
            self.is_silent = False
        except NoReplyError:
            self.is_silent = True

    def wait(self, num_sent: int, stop: threading.Event) -> None:
        """Wait for credit for one more frame, or until `stop` is set."""
        if self._max_in_flight is not None:
            self._wait_done(num_sent + 1 - self._max_in_flight, stop)

    def settle(self, num_sent: int, stop: threading.Event) -> Arrivals:
        """Wait until the node is through with everything sent, and say what became of it.

        Without credit frames may have been lost on the way: then the wait ends after some seconds. Once `stop` is
        set it ends as soon as everything has arrived.
        """
        if self._max_in_flight is not None:
            self._wait_done(num_sent, stop)
        else:
            deadline = time.monotonic() + SETTLE_S
            while self._refreshed(self._stats()) < num_sent and time.monotonic() < deadline:
                if stop.wait(POLL_S):
                    break
        if stop.is_set():
            self._wait_arrived(num_sent)
        return Arrivals.between(self._before, self._stats().frames)

    def _wait_arrived(self, num_sent: int) -> None:
        deadline = time.monotonic() + ARRIVAL_S
        while self._num_arrived(self._stats().frames) < num_sent and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def _wait_done(self, num_wanted: int, stop: threading.Event) -> None:
        progressed = time.monotonic()
        while self._num_done < num_wanted:
            num_before, stats = self._num_done, self._stats()
            if self._refreshed(stats) > num_before:
                progressed = time.monotonic()
            elif time.monotonic() - progressed > STALLED_AFTER_S:
                raise StalledError(stats)
            elif stop.wait(POLL_S):
                return

    def _refreshed(self, stats: StreamStats) -> int:
        """How many frames of this session the node is through with."""
        self._num_done = max(self._num_done, self._num_arrived(stats.frames) - stats.frames.pending)
        return self._num_done

    def _num_arrived(self, frames: FrameCounters) -> int:
        if frames.last_session == self._publisher.session and isinstance(frames.last_seq, int):
            return frames.last_seq + 1
        return 0

    def _stats(self) -> StreamStats:
        return stats_of(self._node, self._publisher.stream)


class Played(msgspec.Struct, frozen=True, kw_only=True):
    """What was played of one file."""

    stream: str
    source: str
    sent: int
    sent_bytes: int
    loops: int
    seconds: float
    fps: float
    max_lag_ms: float
    broken: int
    node: Arrivals | None


@dataclass(eq=False, slots=True)
class Position:
    """Where a playback is; written by its thread alone, for others to look at."""

    num_sent: int = 0
    num_bytes: int = 0
    num_loops: int = 0
    num_broken: int = 0
    num_unheard: int = 0  # sent after the last node that listened had gone
    is_heard: bool = True
    has_been_heard: bool = False
    played_s: float = 0.0
    lag_s: float = 0.0
    max_lag_s: float = 0.0
    started: float = field(default_factory=time.monotonic)

    @property
    def fps(self) -> float:
        elapsed = time.monotonic() - self.started
        return self.num_sent / elapsed if elapsed > 0 else 0.0


class Playback:
    """Publishes the pictures of a file, each when it is due, then the end of the stream."""

    def __init__(
        self,
        video: Video,
        publisher: FramePublisher,
        options: PlaybackOptions,
        stop: threading.Event,
        account: Account | None = None,
    ) -> None:
        """Takes an open video; it is closed by `run`. `stop` ends the playback early."""
        self._video = video
        self._publisher = publisher
        self._options = options
        self._stop = stop
        self._account = account
        fps = options.media_fps(video.fps)
        self._interval_ns = round(NS_PER_S / (fps or _DEFAULT_FPS))
        self._feed = Feed(
            publisher, options.encoding, jpeg_quality=options.jpeg_quality, fps=fps and fps * options.speed
        )
        self.position = Position(has_been_heard=publisher.has_subscriber)

    @property
    def stream(self) -> str:
        return self._publisher.stream

    @property
    def total_s(self) -> float | None:
        """Seconds of the file that are to be played, if they can be told."""
        selection, duration_s = self._options.selection, self._video.duration_s
        left_s = None if duration_s is None else max(0.0, duration_s - selection.start_s)
        if selection.duration_s is not None:
            left_s = min(selection.duration_s, left_s or selection.duration_s)
        return left_s * self._options.num_loops if left_s and self._options.num_loops else None

    @property
    def trouble(self) -> str | None:
        """What is wrong with the node right now, as far as this side can tell."""
        if not self.position.is_heard:
            return "no node listens"
        is_silent = self._account is not None and self._account.is_silent
        return "the node does not answer" if is_silent else None

    def probe(self) -> None:
        """Look whether the node is still there."""
        if self._account:
            self._account.probe()

    def run(self) -> Played:
        """Play until the end, and wait for the node's account of it.

        Raises VideoError, and the errors of the publisher and the client.
        """
        self.position.started = time.monotonic()
        try:
            self._play_loops()
        except VideoError:
            self._publisher.end()  # what was sent of a file that broke off is to be remembered
            raise
        finally:
            self._video.close()
        seconds = time.monotonic() - self.position.started
        # The end of the stream has a number of its own, as every message.
        self._publisher.end()
        arrivals = self._account.settle(self._feed.num_sent + 1, self._stop) if self._account else None
        return self.played(seconds, arrivals)

    def _play_loops(self) -> None:
        base_ns = 0
        for loop in itertools.count():
            base_ns = self._play(loop, base_ns) + self._interval_ns
            self.position.num_loops = loop + 1
            self.position.num_broken += self._video.num_broken
            if self._stop.is_set() or self.position.num_loops == self._options.num_loops:
                return
            self._video.close()
            self._video = open_video(self._video.source, reader=self._options.reader)

    def _play(self, loop: int, base_ns: int) -> int:
        """Play once, beginning at `base_ns` of the playback; return the playback's time of the last picture."""
        played_ns, first_ns = base_ns, None
        for frame in self._video.read(self._options.selection):
            first_ns = frame.media_ns if first_ns is None else first_ns
            played_ns = base_ns + frame.media_ns - first_ns
            self._wait(played_ns)
            if self._stop.is_set():
                break
            self._note_listeners()
            self._feed.send(frame.pixels, self._stamp(frame.media_ns, loop))
            self._note(played_ns)
        if first_ns is None:
            raise VideoError(self._video.source, "there is no picture in the part to play")
        return played_ns

    def _wait(self, played_ns: int) -> None:
        """Wait until a picture is due and, with credit, until there is room for it."""
        due = self._due(played_ns)
        if due is not None:
            self._stop.wait(max(0.0, due - time.monotonic()))
        if self._account:
            self._account.wait(self._feed.num_sent, self._stop)
        if due is not None:
            self.position.lag_s = max(0.0, time.monotonic() - due)
            self.position.max_lag_s = max(self.position.max_lag_s, self.position.lag_s)

    def _due(self, played_ns: int) -> float | None:
        """When to send a picture, in `time.monotonic()` seconds; None for at once."""
        rate = self._options.rate
        return self.position.started + played_ns / NS_PER_S / rate if rate else None

    def _stamp(self, media_ns: int, loop: int) -> Stamp:
        if self._options.clock == "wall":
            return Stamp(time.time_ns(), "publish")
        return Stamp(media_ns, "media", None if self._options.num_loops == 1 else loop)

    def _note_listeners(self) -> None:
        position = self.position
        position.is_heard = self._publisher.has_subscriber
        position.has_been_heard |= position.is_heard
        position.num_unheard += position.has_been_heard and not position.is_heard

    def _note(self, played_ns: int) -> None:
        self.position.num_sent = self._feed.num_sent
        self.position.num_bytes = self._feed.num_bytes
        self.position.played_s = played_ns / NS_PER_S

    def played(self, seconds: float, arrivals: Arrivals | None = None) -> Played:
        """What was sent in so many seconds, and what became of it, if that is known."""
        position = self.position
        return Played(
            stream=self._publisher.stream,
            source=self._video.source,
            sent=position.num_sent,
            sent_bytes=position.num_bytes,
            loops=position.num_loops,
            seconds=seconds,
            fps=position.num_sent / seconds,
            max_lag_ms=position.max_lag_s * 1000,
            broken=position.num_broken,
            node=arrivals,
        )


@contextmanager
def open_playbacks(
    sources: Mapping[str, str], options: PlaybackOptions, link: Link, stop: threading.Event
) -> Iterator[list[Playback]]:
    """Open the video of each stream and a publisher for it. Raises VideoError, and as `Link.open` does."""
    with ExitStack() as stack:
        videos = [stack.enter_context(open_video(source, reader=options.reader)) for source in sources.values()]
        node, publishers = stack.enter_context(link.open(list(sources)))
        yield [
            Playback(video, publisher, options, stop, Account(node, publisher, link.max_in_flight) if node else None)
            for video, publisher in zip(videos, publishers, strict=True)
        ]
