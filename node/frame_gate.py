"""Which pictures say nothing new: those that look like the last one that was encoded.

A picture is compared as a small thumbnail, by the cell of it that has changed most: someone far away changes a few
cells a lot and the mean of all next to nothing, while the noise of a sensor or a codec averages out within a cell.
On fixed cameras such noise came to 3 to 8 grey levels, and a person of a tenth of the picture's height to 15 or more.
"""

from typing import NamedTuple

import cv2
import numpy as np

THUMBNAIL_SIZE = (32, 18)  # columns, rows
MAX_HELD_NS = 10_000_000_000


class View(NamedTuple):
    """What the gate looks at of a picture."""

    size: tuple[int, int]  # width and height of the picture itself
    stream_ns: int
    thumbnail: np.ndarray  # uint8, (rows, columns, 3)


class FrameGate:
    """Compares views with the one that was encoded last, which it is told of."""

    def __init__(self, min_change: float) -> None:
        """`min_change` is in grey levels, 0 to 255; at 0 every picture is new."""
        self._min_change = min_change
        self.encoded: View | None = None

    def looks_like(self, view: View) -> View | None:
        """The encoded view that a new one shows again.

        None if it has changed by `min_change` or more, has another size, or comes `MAX_HELD_NS` later.
        """
        encoded = self.encoded
        if encoded is None or view.size != encoded.size or view.stream_ns - encoded.stream_ns >= MAX_HELD_NS:
            return None
        return encoded if change(view.thumbnail, encoded.thumbnail) < self._min_change else None


def thumbnail(pixels: np.ndarray) -> np.ndarray:
    """A picture, uint8 (height, width, 3), reduced to the means of its cells."""
    return cv2.resize(pixels, THUMBNAIL_SIZE, interpolation=cv2.INTER_AREA)


def change(a: np.ndarray, b: np.ndarray) -> float:
    """Difference of two thumbnails in the cell where it is largest, in grey levels, mean over the channels."""
    return float(np.abs(a.astype(np.int16) - b).mean(axis=-1).max())
