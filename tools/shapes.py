"""A clip made on the spot: a red circle, then a blue square, then a green triangle on plain grey."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np

Shape = Literal["circle", "square", "triangle"]

BACKGROUND = (200, 200, 200)
COLOURS = {"red": (220, 20, 20), "blue": (20, 40, 220), "green": (20, 160, 40)}


@dataclass(frozen=True, slots=True)
class Scene:
    """One shape of one colour, as it is shown for a while."""

    colour: str
    shape: Shape


SCENES = (Scene("red", "circle"), Scene("blue", "square"), Scene("green", "triangle"))


@dataclass(frozen=True, slots=True)
class ClipFormat:
    """Size and length of the clip; each scene takes a third of it."""

    width: int = 336
    height: int = 252
    fps: int = 4
    scene_frames: int = 8

    @property
    def num_frames(self) -> int:
        return self.scene_frames * len(SCENES)

    @property
    def seconds(self) -> float:
        return self.num_frames / self.fps


def draw(scene: Scene, clip: ClipFormat, shift: float = 0.0) -> np.ndarray:
    """Draw a scene, uint8, RGB, (height, width, 3); `shift` moves its shape right, in picture widths."""
    import numpy as np

    pixels = np.full((clip.height, clip.width, 3), BACKGROUND, np.uint8)
    radius = clip.height * 0.3
    y, x = np.mgrid[: clip.height, : clip.width]
    x = x - clip.width * (0.5 + shift)
    y = y - clip.height * 0.5
    pixels[_inside(scene.shape, x / radius, y / radius)] = COLOURS[scene.colour]
    return pixels


def _inside(shape: Shape, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points of the plane are in a shape that fits the unit circle's square."""
    if shape == "circle":
        return x**2 + y**2 <= 1
    if shape == "square":
        return (abs(x) <= 0.9) & (abs(y) <= 0.9)
    return (abs(y) <= 1) & (abs(x) <= (y + 1) / 2)  # apex up


def frames(clip: ClipFormat) -> Iterator[np.ndarray]:
    """Yield the clip's pictures; within a scene the shape moves a little, so that no two are the same."""
    for scene in SCENES:
        for n in range(clip.scene_frames):
            yield draw(scene, clip, shift=0.02 * n)


def write_shapes(path: Path, clip: ClipFormat | None = None) -> Path:
    """Write the clip as an MP4 file, which takes OpenCV."""
    cv2 = importlib.import_module("cv2")
    clip = clip or ClipFormat()
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), clip.fps, (clip.width, clip.height))
    if not writer.isOpened():
        raise OSError(f"OpenCV cannot write {path}")
    for pixels in frames(clip):
        writer.write(cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
    writer.release()
    return path
