"""Pictures on their way to a node: encoded as asked for, and published as one stream."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..protocol.camera import FramePublisher
from ..protocol.errors import OnlookerError
from ..protocol.messages import COMPRESSED_ENCODINGS, TimeKind

if TYPE_CHECKING:
    import numpy as np

Encoding = Literal["jpeg", "png", "rgb8", "bgr8", "mono8"]
Clock = Literal["media", "wall"]


@dataclass(frozen=True, slots=True)
class Stamp:
    """The time written on a frame, and what kind of time it is."""

    ts: int
    kind: TimeKind
    loop: int | None = None


class PictureEncodeError(OnlookerError):
    """OpenCV cannot encode a picture."""


class Feed:
    """Publishes RGB pictures of one stream in one encoding."""

    def __init__(
        self, publisher: FramePublisher, encoding: Encoding, *, jpeg_quality: int = 90, fps: float | None = None
    ) -> None:
        self._publisher = publisher
        self._encoding = encoding
        self._jpeg_quality = jpeg_quality
        self._fps = fps
        # Raw RGB alone needs no OpenCV.
        self._cv2: Any = None if encoding == "rgb8" else importlib.import_module("cv2")
        self.num_sent = 0
        self.num_bytes = 0

    def send(self, pixels: np.ndarray, stamp: Stamp) -> None:
        """Encode and publish `pixels`, uint8, RGB, (height, width, 3). Raises as FramePublisher does."""
        fields: dict[str, Any] = {"ts": stamp.ts, "ts_kind": stamp.kind, "fps": self._fps, "loop": stamp.loop}
        if self._encoding in COMPRESSED_ENCODINGS:
            height, width = pixels.shape[:2]
            payload = self._compressed(pixels)
            self._publisher.publish_encoded(payload, self._encoding, size=(width, height), **fields)
        else:
            payload = self._raw(pixels)
            self._publisher.publish_image(payload, encoding=self._encoding, **fields)
        self.num_sent += 1
        self.num_bytes += payload.nbytes

    def _raw(self, pixels: np.ndarray) -> np.ndarray:
        if self._encoding == "rgb8":
            return pixels
        name = "COLOR_RGB2BGR" if self._encoding == "bgr8" else "COLOR_RGB2GRAY"
        return self._cv2.cvtColor(pixels, getattr(self._cv2, name))

    def _compressed(self, pixels: np.ndarray) -> memoryview:
        settings = [self._cv2.IMWRITE_JPEG_QUALITY, self._jpeg_quality] if self._encoding == "jpeg" else []
        bgr = self._cv2.cvtColor(pixels, self._cv2.COLOR_RGB2BGR)
        is_encoded, payload = self._cv2.imencode("." + self._encoding, bgr, settings)
        if not is_encoded:
            raise PictureEncodeError(f"OpenCV cannot encode a picture of {pixels.shape} as {self._encoding}")
        return memoryview(payload).cast("B")
