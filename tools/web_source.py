"""Pictures that a page gives to a node: a file that was uploaded, or the browser's own camera."""

from __future__ import annotations

import importlib
import math
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..protocol.camera import FramePublisher
from ..protocol.client import NodeClient
from ..protocol.errors import OnlookerError
from ..protocol.messages import StreamSpec
from .feed import Feed, Stamp
from .link import Link
from .playback import Account, Playback, PlaybackOptions, Played, Position
from .video import Video, open_video

if TYPE_CHECKING:
    import numpy as np

HOLD_POLL_S = 0.05
MAX_SHOWN_WIDTH = 640
JPEG_QUALITY = 80
SAMPLE_THINGS = ("red circle", "blue square", "green triangle", "yellow star")
SAMPLE_SHOW_S = 3.0
SAMPLE_SEED = 11  # a bright one
MIB = 1 << 20

PlayerState = Literal["opening", "playing", "paused", "ended", "failed"]


class Shown(NamedTuple):
    """The newest picture of a stream, and how many there were before it in this run of the page's server."""

    session: str
    number: int
    pixels: np.ndarray  # uint8, RGB, (height, width, 3)


class Pictures:
    """The newest picture of each stream that is fed from here, for people to look at."""

    def __init__(self) -> None:
        self._session = uuid.uuid4().hex
        self._shown: dict[str, Shown] = {}

    def show(self, stream: str, pixels: np.ndarray) -> None:
        before = self._shown.get(stream)
        self._shown[stream] = Shown(self._session, before.number + 1 if before else 0, pixels)

    def newest(self, stream: str) -> Shown | None:
        return self._shown.get(stream)


def shown_jpeg(pixels: np.ndarray) -> bytes:
    """A picture as a JPEG of moderate size."""
    cv2: Any = importlib.import_module("cv2")
    height, width = pixels.shape[:2]
    if width > MAX_SHOWN_WIDTH:
        size = (MAX_SHOWN_WIDTH, max(1, round(height * MAX_SHOWN_WIDTH / width)))
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    is_encoded, jpeg = cv2.imencode(
        ".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    )
    assert is_encoded, pixels.shape
    return jpeg.tobytes()


class _HeldVideo(Video):
    """A video that shows its pictures as they are taken, and waits while it is held."""

    def __init__(self, video: Video, player: Player) -> None:
        super().__init__(video.source)
        self.reader, self.fps, self.duration_s = video.reader, video.fps, video.duration_s
        self._video = video
        self._player = player

    def close(self) -> None:
        self.num_broken = self._video.num_broken
        self._video.close()

    def decode(self, start_ns: int) -> Iterator[tuple[int, Callable[[], np.ndarray]]]:
        for media_ns, pixels in self._video.decode(start_ns):
            self._player.wait_while_held()
            yield media_ns, lambda pixels=pixels: self._shown(pixels)

    def _shown(self, pixels: Callable[[], np.ndarray]) -> np.ndarray:
        picture = pixels()
        self._player.pictures.show(self._player.stream, picture)
        return picture


class Player:
    """Plays a file into a stream on a thread of its own, from `start` until its end or `stop`."""

    def __init__(self, source: str, stream: str, rate: float, link: Link, pictures: Pictures) -> None:
        """`rate` is how many times as fast as filmed; 0 is as fast as possible."""
        self.source = source
        self.stream = stream
        self.rate = rate
        self.pictures = pictures
        self.played: Played | None = None
        self.error: OnlookerError | None = None
        self._link = link
        self._playback: Playback | None = None
        self._stop = threading.Event()
        self._hold = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"player of {stream}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def hold(self) -> None:
        self._hold.set()

    def go_on(self) -> None:
        self._hold.clear()

    def stop(self) -> None:
        """End it, and wait until it has said so to the node."""
        self._stop.set()
        self._thread.join()

    @property
    def was_stopped(self) -> bool:
        return self._stop.is_set()

    @property
    def state(self) -> PlayerState:
        if self.error is not None:
            return "failed"
        if self.played is not None:
            return "ended"
        if self._hold.is_set():
            return "paused"
        return "opening" if self._playback is None else "playing"

    @property
    def is_over(self) -> bool:
        return self.state in ("ended", "failed")

    @property
    def position(self) -> Position | None:
        return self._playback.position if self._playback else None

    @property
    def total_s(self) -> float | None:
        return self._playback.total_s if self._playback else None

    def wait_while_held(self) -> None:
        """Wait on the player's own thread; what comes after is due so much later."""
        held = time.monotonic()
        while self._hold.is_set() and not self._stop.wait(HOLD_POLL_S):
            pass
        if self._playback is not None:
            self._playback.position.started += time.monotonic() - held

    def _run(self) -> None:
        try:
            self.played = self._play()
        except OnlookerError as error:
            self.error = error

    def _play(self) -> Played:
        with open_video(self.source) as video, self._link.open([self.stream]) as (node, (publisher,)):
            assert node is not None  # the link gives credit, which needs one
            account = Account(node, publisher, self._link.max_in_flight)
            options = PlaybackOptions(rate=self.rate)
            self._playback = Playback(_HeldVideo(video, self), publisher, options, self._stop, account)
            return self._playback.run()


class Webcam:
    """Pictures from a browser, as they arrive, published as one stream. Safe from any thread."""

    def __init__(self, stream: str, link: Link, pictures: Pictures) -> None:
        self.stream = stream
        self._link = link
        self._pictures = pictures
        self._lock = threading.Lock()
        self._publisher: FramePublisher | None = None
        self._feed: Feed | None = None

    def send(self, pixels: np.ndarray) -> None:
        """Publish uint8 RGB pixels of (height, width, 3). Raises the publisher's errors."""
        with self._lock:
            if self._feed is None:
                self._publisher = FramePublisher(
                    self.stream,
                    connect=self._link.frames,
                    server_key=self._link.keys.server,
                    client_key=self._link.keys.client,
                )
                self._publisher.wait_for_subscriber(self._link.timeout_s)
                self._feed = Feed(self._publisher, "jpeg")
            # The browser does not say when it took the picture.
            self._feed.send(pixels, Stamp(time.time_ns(), "receive"))
        self._pictures.show(self.stream, pixels)

    def end(self) -> None:
        """Tell the node that no more pictures follow; the next one begins anew. Raises the publisher's errors."""
        with self._lock:
            publisher, self._publisher, self._feed = self._publisher, None, None
            if publisher is None:
                return
            try:
                publisher.end()
            finally:
                publisher.close()


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """How a stream is to be encoded; None follows the node's defaults."""

    chunk_frames: int | None = None
    fps: float | None = None
    encode_width: int | None = None
    encode_height: int | None = None
    memory_bytes: int | None = None

    def spec(self, stream: str) -> StreamSpec:
        given = {name: value for name in self.__slots__ if (value := getattr(self, name)) is not None}
        return StreamSpec(stream=stream, **given)


def parse_settings(chunk_frames: str, fps: str, size: str, memory_mib: str) -> StreamSettings:
    """The settings as they were typed, empty ones for the node's defaults. Raises ValueError, in words, for others."""
    match = re.fullmatch(r"(\d+)\s*[x\N{MULTIPLICATION SIGN}*,]\s*(\d+)", size.strip())
    if size.strip() and match is None:
        raise ValueError(f"An encode size is a width and a height, as in 640x360, not {size.strip()}.")
    width, height = (None, None) if match is None else (int(match[1]), int(match[2]))
    mib = _number("Memory", memory_mib)
    return StreamSettings(
        chunk_frames=int(chunk_frames),
        fps=_number("Frames a second", fps),
        encode_width=width,
        encode_height=height,
        memory_bytes=None if mib is None else round(mib * MIB),
    )


def _number(name: str, text: str) -> float | None:
    if not text.strip():
        return None
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise ValueError(f"{name}: a number above 0 is wanted, not {text.strip()}.")
    return number


class Sources:
    """Everything that feeds the node from here: a player for each stream, and the browser's camera."""

    def __init__(self, client: NodeClient, link: Link) -> None:
        self.pictures = Pictures()
        self._client = client
        self._link = link
        self._players: dict[str, Player] = {}
        self._webcams: dict[str, Webcam] = {}

    def player(self, stream: str | None) -> Player | None:
        return None if stream is None else self._players.get(stream)

    def play(self, source: str, stream: str, rate: float, settings: StreamSettings) -> None:
        """Play a file into a stream, which is added first if the node does not know it.

        Raises ValueError, in words, while a file is being played there; VideoError and the client's errors.
        """
        if (playing := self.player(stream)) is not None and not playing.is_over:
            raise ValueError(f"{stream} is being played. Stop first: Start begins with the first picture again.")
        open_video(source).close()
        self.provide(stream, settings)
        player = self._players[stream] = Player(source, stream, rate, self._link, self.pictures)
        player.start()

    def provide(self, stream: str, settings: StreamSettings) -> None:
        """Add a stream that the node does not know yet. Raises the client's errors."""
        if stream not in self._client.stream_names():
            self._client.add_stream(settings.spec(stream))

    def apply(self, stream: str, settings: StreamSettings) -> None:
        """Let a stream begin anew, with other settings and an empty memory. Raises the client's errors."""
        self.stop(stream)
        if stream in self._client.stream_names():
            self._client.remove_stream(stream)
        self._client.add_stream(settings.spec(stream))

    def stop(self, stream: str) -> None:
        """End what is being played into a stream."""
        if (player := self._players.get(stream)) is not None:
            player.stop()

    def webcam(self, stream: str) -> Webcam:
        return self._webcams.setdefault(stream, Webcam(stream, self._link, self.pictures))

    def close(self) -> None:
        for player in self._players.values():
            player.stop()
        for webcam in self._webcams.values():
            webcam.end()


def make_sample(path: str) -> str:
    """Film one thing after the other to a file, for those who have no video at hand."""
    from .scenes import write_clip
    from .story import make_plain_story

    write_clip(make_plain_story(SAMPLE_SEED, SAMPLE_THINGS, show_s=SAMPLE_SHOW_S, split="test"), path)
    return path
