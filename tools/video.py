"""Pictures of a video file or a live address, each with the time the file gives it.

    for frame in read_video("door.mp4", Selection(start_s=10, fps=2)):
        frame.pixels, frame.media_ns

PyAV reads first: its times are the file's own presentation times, exact also where the frame rate varies.
OpenCV is the fallback where PyAV is missing or cannot open the source. Neither is imported before a video is
opened.
"""

from __future__ import annotations

import importlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from ..protocol.errors import OnlookerError

if TYPE_CHECKING:
    import av
    import av.container
    import numpy as np

logger = logging.getLogger(__name__)

ReaderName = Literal["auto", "av", "cv2"]

NS_PER_S = 1_000_000_000
# Containers that count in milliseconds round each time by up to half of one.
_ROUNDING_NS = 1_000_000
_OPEN_TIMEOUT_S = 10.0
_READ_TIMEOUT_S = 10.0


class VideoError(OnlookerError):
    """A source that cannot be opened or gives no picture."""

    def __init__(self, source: str, reason: str) -> None:
        self.source = source
        self.reason = reason
        super().__init__(f"{source}: {reason}")


@dataclass(frozen=True, slots=True, eq=False)
class VideoFrame:
    """One picture, and when it is shown, counted from the start of the file."""

    pixels: np.ndarray  # uint8, RGB, (height, width, 3), C-contiguous
    media_ns: int


@dataclass(frozen=True, slots=True)
class Selection:
    """Which pictures to take: every `stride`-th of a span of time, and of those at most `fps` a second.

    Raises ValueError, naming the field, for a value that cannot work.
    """

    start_s: float = 0.0
    duration_s: float | None = None
    stride: int = 1
    fps: float | None = None

    def __post_init__(self) -> None:
        if self.start_s < 0:
            raise ValueError(f"start offset must not be negative, got {self.start_s:g}")
        if self.duration_s is not None and not self.duration_s > 0:
            raise ValueError(f"duration must be above 0, got {self.duration_s:g}")
        if self.stride < 1:
            raise ValueError(f"stride must be at least 1, got {self.stride}")
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"fps must be above 0, got {self.fps:g}")

    @property
    def start_ns(self) -> int:
        return round(self.start_s * NS_PER_S)

    @property
    def end_ns(self) -> int | None:
        return None if self.duration_s is None else self.start_ns + round(self.duration_s * NS_PER_S)


class _Picker:
    """Decides, picture by picture in the order they are shown, which ones a selection takes."""

    def __init__(self, selection: Selection) -> None:
        self._selection = selection
        self._period = None if selection.fps is None else NS_PER_S / Fraction(selection.fps)
        self._num_seen = 0
        self._first_ns: int | None = None
        self._num_due = 0

    def is_past(self, media_ns: int) -> bool:
        end_ns = self._selection.end_ns
        return end_ns is not None and media_ns >= end_ns

    def takes(self, media_ns: int) -> bool:
        if media_ns < self._selection.start_ns:
            return False
        is_in_stride = self._num_seen % self._selection.stride == 0
        self._num_seen += 1
        return is_in_stride and self._is_due(media_ns)

    def _is_due(self, media_ns: int) -> bool:
        if self._period is None:
            return True
        if self._first_ns is None:
            self._first_ns = media_ns
        elapsed = media_ns - self._first_ns + _ROUNDING_NS
        if elapsed < self._num_due * self._period:
            return False
        self._num_due = int(elapsed / self._period) + 1
        return True


class Video(ABC):
    """An open source of pictures; `read` goes through it once, `with` closes it."""

    reader: str
    fps: float | None = None  # nominal, Hz
    duration_s: float | None = None
    num_broken = 0  # pieces of the source that could not be decoded

    def __init__(self, source: str) -> None:
        self.source = source

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def read(self, selection: Selection | None = None) -> Iterator[VideoFrame]:
        """Yield the selected pictures; raises VideoError if the source holds none that can be decoded."""
        selection = selection or Selection()
        picker = _Picker(selection)
        num_decoded = 0
        for media_ns, pixels in self.decode(selection.start_ns):
            num_decoded += 1
            if picker.is_past(media_ns):
                return
            if picker.takes(media_ns):
                yield VideoFrame(pixels(), media_ns)
        if num_decoded == 0 and selection.start_ns == 0:
            raise VideoError(self.source, "no picture in it can be decoded")

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def decode(self, start_ns: int) -> Iterator[tuple[int, Callable[[], np.ndarray]]]:
        """Yield each picture's time and how to get its pixels; may begin anywhere before `start_ns`."""


class AvVideo(Video):
    """A source read by PyAV (FFmpeg)."""

    reader = "av"

    def __init__(self, source: str, *, is_live: bool = False) -> None:
        super().__init__(source)
        self._av = importlib.import_module("av")
        options = {"rtsp_transport": "tcp", "fflags": "nobuffer"} if is_live else {}
        try:
            self._container: av.container.InputContainer = self._av.open(
                source, options=options, timeout=(_OPEN_TIMEOUT_S, _READ_TIMEOUT_S)
            )
        except (self._av.error.FFmpegError, OSError) as error:
            raise VideoError(source, f"PyAV cannot open it: {_strerror(error)}") from error
        if not self._container.streams.video:
            self._container.close()
            raise VideoError(source, "there is no video stream in it")
        self._stream = self._container.streams.video[0]
        # Frame threads are faster, but hold back as many frames as there are threads.
        self._stream.thread_type = "SLICE" if is_live else "AUTO"
        rate = self._stream.average_rate or self._stream.guessed_rate
        self.fps = float(rate) if rate else None
        if self._container.duration is not None:
            self.duration_s = self._container.duration / self._av.time_base
        self._num_untimed = 0

    def close(self) -> None:
        self._container.close()

    def decode(self, start_ns: int) -> Iterator[tuple[int, Callable[[], np.ndarray]]]:
        if start_ns:
            self._seek(start_ns)
        for frame in self._frames():
            yield self._media_ns(frame), lambda frame=frame: _upright(frame)

    def _seek(self, start_ns: int) -> None:
        """Go to the key frame before a time; a source that cannot is decoded up to there instead."""
        if self._stream.start_time is None or self._stream.time_base is None:
            return
        offset = self._stream.start_time + int(Fraction(start_ns, NS_PER_S) / self._stream.time_base)
        try:
            self._container.seek(offset, stream=self._stream)
        except self._av.error.FFmpegError as error:
            logger.info("%s: no seeking, %s", self.source, _strerror(error))

    def _frames(self) -> Iterator[av.VideoFrame]:
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except self._av.error.FFmpegError as error:
                if isinstance(error, self._av.error.EOFError):
                    return
                raise VideoError(self.source, f"reading stopped: {_strerror(error)}") from error
            try:
                yield from packet.decode()
            except self._av.error.InvalidDataError:
                self.num_broken += 1

    def _media_ns(self, frame: av.VideoFrame) -> int:
        if frame.pts is None or frame.time_base is None:  # a bare bitstream carries no times
            self._num_untimed += 1
            return int((self._num_untimed - 1) * NS_PER_S / Fraction(self.fps or 25.0))
        return int((frame.pts - (self._stream.start_time or 0)) * frame.time_base * NS_PER_S)


class Cv2Video(Video):
    """A source read by OpenCV; an integer is a camera of this machine."""

    reader = "cv2"

    def __init__(self, source: str | int) -> None:
        super().__init__(str(source))
        self._cv2 = importlib.import_module("cv2")
        self._capture = self._cv2.VideoCapture(source)
        if not self._capture.isOpened():
            raise VideoError(self.source, "OpenCV cannot open it")
        self.fps = self._capture.get(self._cv2.CAP_PROP_FPS) or None
        num_frames = self._capture.get(self._cv2.CAP_PROP_FRAME_COUNT)
        if self.fps and num_frames > 0:
            self.duration_s = num_frames / self.fps

    def close(self) -> None:
        self._capture.release()

    def decode(self, start_ns: int) -> Iterator[tuple[int, Callable[[], np.ndarray]]]:
        # OpenCV's seeking is inexact, so a start offset is reached by decoding up to it.
        num_frames = 0
        while self._capture.grab():
            yield self._media_ns(num_frames), self._pixels
            num_frames += 1

    def _media_ns(self, num_before: int) -> int:
        media_ms = self._capture.get(self._cv2.CAP_PROP_POS_MSEC)
        if num_before and media_ms <= 0:  # a bare bitstream carries no times
            media_ms = num_before * 1000 / (self.fps or 25.0)
        return round(media_ms * 1e6)

    def _pixels(self) -> np.ndarray:
        is_read, pixels = self._capture.retrieve()
        if not is_read:
            raise VideoError(self.source, "OpenCV cannot decode a picture of it")
        return self._cv2.cvtColor(pixels, self._cv2.COLOR_BGR2RGB)


def open_video(source: str, *, reader: ReaderName = "auto", is_live: bool = False) -> Video:
    """Open a file or an address (anything with `://`).

    Raises VideoError, saying why, for a source that no reader can open.
    """
    if "://" not in source:
        _check_file(source)
    if reader == "cv2":
        return Cv2Video(source)
    if reader == "av":
        return AvVideo(source, is_live=is_live)
    try:
        return AvVideo(source, is_live=is_live)
    except ModuleNotFoundError:
        return Cv2Video(source)
    except VideoError as error:
        return _open_instead(source, error)


def read_video(source: str, selection: Selection | None = None, *, reader: ReaderName = "auto") -> Iterator[VideoFrame]:
    """Open a file or an address, yield its selected pictures, close it."""
    with open_video(source, reader=reader) as video:
        yield from video.read(selection)


def _check_file(source: str) -> None:
    path = Path(source)
    if not path.exists():
        raise VideoError(source, "there is no such file")
    if path.is_dir():
        raise VideoError(source, "it is a folder, not a video file")


def _open_instead(source: str, refused: VideoError) -> Video:
    """Try OpenCV where PyAV refused; what PyAV said is the better reason if both refuse."""
    try:
        return Cv2Video(source)
    except (VideoError, ModuleNotFoundError):
        raise refused from None


def _upright(frame: av.VideoFrame) -> np.ndarray:
    """RGB pixels, turned as the file says they are to be shown (phones record sideways)."""
    import numpy as np

    pixels = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(pixels, frame.rotation // 90)) if frame.rotation else pixels


def _strerror(error: Any) -> str:
    return getattr(error, "strerror", None) or str(error)
