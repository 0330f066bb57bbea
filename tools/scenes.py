"""Pictures of a story, and clips of it with the truth beside them.

The drawing (`pack`, then `draw`) uses only functions that numpy and torch name alike, so one renderer serves a laptop's
CPU and a training run's GPU.

    frames = render(make_story(7), np.arange(0, 20, 0.5), (112, 112))  # uint8, (40, 112, 112, 3)
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from .story import (
    COLOURS,
    MAX_VISIBLE,
    NUM_WAVES,
    REACH,
    SHAPES,
    Split,
    Story,
    Thing,
    make_plain_story,
    make_story,
)

if TYPE_CHECKING:
    from av.container import OutputContainer
    from av.video import VideoStream

__all__ = [
    "COLOURS",
    "SHAPES",
    "Clip",
    "SceneArrays",
    "Split",
    "Story",
    "Thing",
    "degrade",
    "draw",
    "make_plain_story",
    "make_story",
    "pack",
    "pixel_grid",
    "quantise",
    "read_clip",
    "read_truth",
    "render",
    "write_clip",
]

Floats = npt.NDArray[np.float32]

FRAMES_AT_ONCE = 8  # rendered together: their planes still fit into a core's cache


@dataclass(frozen=True, slots=True, eq=False)
class SceneArrays:
    """A flat batch of N frames with up to K things each, as `draw` reads them: numpy or torch, all float32 but
    `shape`, which is int64 and counts in SHAPES."""

    centre: Any  # (N, K, 2) x and y as fractions of width and height
    radius: Any  # (N, K) of the shorter side
    angle: Any  # (N, K) radians
    rgb: Any  # (N, K, 3)
    shape: Any  # (N, K) int64
    visible: Any  # (N, K) 0 or 1
    ground: Any  # (N, 3) the middle of the two colours of the background
    swing: Any  # (N, 3) from the middle to the second colour
    waves: Any  # (N, NUM_WAVES, 4) amplitude, cycles across and down, phase
    sharpness: Any  # (N,)
    light: Any  # (N, 3) gain and tint
    slope: Any  # (N, 2) across and down
    noise: Any  # (N,) standard deviation; for whoever adds it, `draw` does not
    blur: Any  # (N,) of the shorter side

    def __len__(self) -> int:
        return len(self.radius)

    def mapped(self, convert: Callable[[Any], Any]) -> "SceneArrays":
        """The same batch with its arrays converted, as in `mapped(lambda a: torch.from_numpy(a).cuda())`.

        `shape` and `visible` stay as they are: which frames have which outline to draw is found out on the host,
        and a GPU is never waited for.
        """
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        kept = {name: arrays.pop(name) for name in ("shape", "visible")}
        return SceneArrays(**kept, **{name: convert(array) for name, array in arrays.items()})

    def part(self, frames: slice) -> "SceneArrays":
        """Some of the frames, as views."""
        return SceneArrays(*(getattr(self, field.name)[frames] for field in fields(self)))


def pack(stories: Sequence[Story], times: Sequence[npt.ArrayLike]) -> SceneArrays:
    """Lay out the moments `times[i]` of `stories[i]`, one story after the other, for `draw`."""
    parts = [_pack_one(story, np.asarray(times_s, np.float64)) for story, times_s in zip(stories, times, strict=True)]
    names = [field.name for field in fields(SceneArrays)]
    return SceneArrays(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def _pack_one(story: Story, times_s: npt.NDArray[np.float64]) -> SceneArrays:
    num = len(times_s)
    slots, filled = _visible_things(story, times_s)
    table = _thing_table(story)[slots]  # (num, MAX_VISIBLE, 12)
    start_s, end_s = table[..., 0], table[..., 1]
    done = np.clip((times_s[:, None] - start_s) / (end_s - start_s), 0.0, 1.0)[..., None]
    shape = table[..., 11].astype(np.int64)
    first, second = np.array(story.background.colours)
    waves = np.zeros((NUM_WAVES, 4), np.float32)
    waves[: len(story.background.waves)] = np.array(story.background.waves).reshape(-1, 4)
    light = story.light.gain_at(times_s)[:, None] * np.array(story.light.tint)

    def every(value: npt.ArrayLike) -> Floats:
        value = np.asarray(value, np.float32)
        return np.broadcast_to(value, (num, *value.shape))

    return SceneArrays(
        centre=(table[..., 2:4] + done * (table[..., 4:6] - table[..., 2:4])).astype(np.float32),
        radius=table[..., 6].astype(np.float32),
        angle=table[..., 7].astype(np.float32),
        rgb=table[..., 8:11].astype(np.float32),
        shape=shape,
        visible=filled.astype(np.float32),
        ground=every((first + second) / 2),
        swing=every((second - first) / 2),
        waves=every(waves),
        sharpness=every(story.background.sharpness),
        light=light.astype(np.float32),
        slope=every((story.light.slope_x, story.light.slope_y)),
        noise=every(story.noise),
        blur=every(story.blur),
    )


def _visible_things(
    story: Story, times_s: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Which things each frame shows, in order of appearance: their indices, and whether a place is filled."""
    starts_s = np.array([thing.start_s for thing in story.things])
    ends_s = np.array([thing.end_s for thing in story.things])
    shown = (starts_s <= times_s[:, None]) & (times_s[:, None] < ends_s)  # (num, num_things)
    most = int(shown.sum(axis=1).max(initial=0))
    assert most <= MAX_VISIBLE, f"{most} things at once, drawn are {MAX_VISIBLE}"
    slots = np.argsort(~shown, axis=1, kind="stable")[:, :MAX_VISIBLE]
    filled = np.take_along_axis(shown, slots, axis=1)
    missing = MAX_VISIBLE - slots.shape[1]  # the last row of the table is an empty thing
    slots = np.pad(
        np.where(filled, slots, len(story.things)), ((0, 0), (0, missing)), constant_values=len(story.things)
    )
    return slots, np.pad(filled, ((0, 0), (0, missing)))


def _thing_table(story: Story) -> npt.NDArray[np.float64]:
    """Rows of start, end, x0, y0, x1, y1, radius, angle, red, green, blue, shape; the last one is nothing."""
    rows = [
        (t.start_s, t.end_s, t.x0, t.y0, t.x1, t.y1, t.radius, t.angle, *t.rgb, SHAPES.index(t.shape))
        for t in story.things
    ]
    return np.array([*rows, (0, 1, 0.5, 0.5, 0.5, 0.5, 0.1, 0, 0, 0, 0, 0)], np.float64)


def pixel_grid(length: int) -> Floats:
    """The centres of so many pixels, as fractions of their row or column."""
    return ((np.arange(length) + 0.5) / length).astype(np.float32)


def draw(xp: Any, arrays: SceneArrays, grid_y: Any, grid_x: Any) -> Any:
    """Draw a batch of frames: float (N, H, W, 3) in 0..1, before noise and quantisation.

    `xp` is numpy or torch, and all arrays are its own, on one device. The grids are those of `pixel_grid`. The
    result is a view of channel planes, so `moveaxis(-1, 1)` of it costs nothing. Keep it out of autocast.
    """
    light = arrays.light[:, :, None, None]
    planes = _draw_background(xp, arrays, grid_y, grid_x)  # (N, 3, H, W)
    for k in range(arrays.radius.shape[1]):
        cover = _draw_cover(xp, arrays, k, grid_y, grid_x)
        rgb = arrays.rgb[:, k, :, None, None]
        planes += cover[:, None] * (rgb - planes)
    slope_x = (grid_x - 0.5) * arrays.slope[:, 0, None]
    slope_y = (grid_y - 0.5) * arrays.slope[:, 1, None]
    falloff = (1 + slope_y)[:, :, None] + slope_x[:, None, :]
    planes *= falloff[:, None]
    planes *= light
    return xp.moveaxis(xp.clip(planes, 0.0, 1.0), 1, -1)


def _draw_background(xp: Any, arrays: SceneArrays, grid_y: Any, grid_x: Any) -> Any:
    """Mix the two colours: (N, 3, H, W).

    The sine of a sum is a sum of two products, so all waves together are one small matrix product per frame.
    """
    amplitude, cycles_x, cycles_y, phase = (arrays.waves[:, :, i, None] for i in range(4))  # (N, NUM_WAVES, 1)
    across = 2 * math.pi * cycles_x * grid_x + phase
    down = 2 * math.pi * cycles_y * grid_y
    rows = xp.concatenate((amplitude * xp.sin(down), amplitude * xp.cos(down)), 1)  # (N, 2 NUM_WAVES, H)
    columns = xp.concatenate((xp.cos(across), xp.sin(across)), 1)
    mix = xp.matmul(xp.moveaxis(rows, 1, 2), columns)  # (N, H, W)
    mix = xp.clip(mix * arrays.sharpness[:, None, None], -1.0, 1.0)
    return arrays.ground[:, :, None, None] + arrays.swing[:, :, None, None] * mix[:, None]


def _draw_cover(xp: Any, arrays: SceneArrays, k: int, grid_y: Any, grid_x: Any) -> Any:
    """How much of each pixel thing number k covers: (N, H, W) in 0..1."""
    height, width = grid_y.shape[0], grid_x.shape[0]
    short = min(height, width)
    cover = xp.zeros_like(arrays.sharpness[:, None, None] + grid_y[:, None] + grid_x)
    for index, shape in enumerate(SHAPES):
        chosen = np.flatnonzero((arrays.shape[:, k] == index) & (arrays.visible[:, k] > 0))
        if len(chosen) == 0:
            continue
        radius = arrays.radius[chosen, k, None]
        # Distances in radii, so that one outline serves every size.
        right = (grid_x - arrays.centre[chosen, k, 0, None]) * (width / short) / radius
        below = (grid_y - arrays.centre[chosen, k, 1, None]) * (height / short) / radius
        outside = _OUTLINES[shape](xp, _Turned(xp, right, below, arrays.angle[chosen, k, None]))
        edge = 1 / short + arrays.blur[chosen, None]
        cover[chosen] = xp.clip(0.5 - outside * (radius / edge)[:, :, None], 0.0, 1.0)
    return cover


class _Turned:
    """Pixels as seen from a thing: columns and rows of distances from its centre, and its angle."""

    def __init__(self, xp: Any, right: Any, below: Any, angle: Any) -> None:
        self._right = right[:, None, :]  # (n, 1, W)
        self._below = below[:, :, None]  # (n, H, 1)
        self._cos = xp.cos(angle)[:, :, None]
        self._sin = xp.sin(angle)[:, :, None]

    def along(self, x: float, y: float) -> Any:
        """How far each pixel lies in the direction (x, y) of the thing's own axes: (n, H, W)."""
        cos, sin = self._cos, self._sin
        return self._right * (x * cos - y * sin) + self._below * (x * sin + y * cos)


def _circle(xp: Any, turned: _Turned) -> Any:
    x, y = turned.along(1, 0), turned.along(0, 1)
    return xp.sqrt(x * x + y * y) - 0.92


def _square(xp: Any, turned: _Turned) -> Any:
    return xp.maximum(xp.abs(turned.along(1, 0)), xp.abs(turned.along(0, 1))) - 0.74


def _triangle(xp: Any, turned: _Turned) -> Any:
    sides = [turned.along(math.cos(angle), math.sin(angle)) for angle in _around(3, math.pi / 2)]
    return xp.maximum(xp.maximum(sides[0], sides[1]), sides[2]) - 0.53


def _star(xp: Any, turned: _Turned) -> Any:
    """Five points: all that lies within four of the five lines, so the second largest distance counts."""
    lines = [turned.along(math.cos(angle), math.sin(angle)) for angle in _around(5, math.pi / 2)]
    largest, second = xp.maximum(lines[0], lines[1]), xp.minimum(lines[0], lines[1])
    for line in lines[2:]:
        second = xp.maximum(second, xp.minimum(largest, line))
        largest = xp.maximum(largest, line)
    return second - REACH * math.cos(math.radians(72))


def _cross(xp: Any, turned: _Turned) -> Any:
    x, y = xp.abs(turned.along(1, 0)), xp.abs(turned.along(0, 1))
    return xp.maximum(xp.maximum(x, y) - 0.96, xp.minimum(x, y) - 0.31)


def _diamond(xp: Any, turned: _Turned) -> Any:
    x, y = xp.abs(turned.along(1, 0)), xp.abs(turned.along(0, 1))
    wide, high = 0.66, 1.04
    return (x * high + y * wide - wide * high) / math.hypot(wide, high)


def _around(num: int, start: float) -> list[float]:
    return [start + 2 * math.pi * i / num for i in range(num)]


_OUTLINES: dict[str, Callable[[Any, _Turned], Any]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "diamond": _diamond,
}


def render(
    story: Story, times_s: npt.ArrayLike, size: tuple[int, int], *, noise_seed: int | None = None
) -> npt.NDArray[np.uint8]:
    """Take pictures at these times: RGB, (num, height, width, 3); `size` is width and height.

    The sensor noise is that of `noise_seed`, or of the story's seed; the same call gives the same pixels.
    """
    width, height = size
    arrays = pack([story], [times_s])
    grid_y, grid_x = pixel_grid(height), pixel_grid(width)
    rng = np.random.default_rng([2, story.seed if noise_seed is None else noise_seed])
    frames = np.empty((len(arrays), height, width, 3), np.uint8)
    for start in range(0, len(arrays), FRAMES_AT_ONCE):
        part = arrays.part(slice(start, start + FRAMES_AT_ONCE))
        drawn = draw(np, part, grid_y, grid_x)
        frames[start : start + FRAMES_AT_ONCE] = quantise(drawn, part.noise, rng)
    return frames


def quantise(drawn: Floats, noise: Floats, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Add sensor noise to pictures in 0..1, (N, H, W, 3), and round them to bytes."""
    levels = np.moveaxis(drawn, -1, 1) * np.float32(255)  # planes: long rows are what numpy is fast at
    num_values = levels[0].size
    grain = _grain(1 << max(20, (2 * num_values - 1).bit_length()))
    for frame, deviation, offset in zip(
        levels, noise, rng.integers(len(grain) - num_values, size=len(levels)), strict=True
    ):
        frame += grain[offset : offset + num_values].reshape(frame.shape) * (255 * deviation)
    levels += 0.5
    return np.moveaxis(np.clip(levels, 0, 255, out=levels).astype(np.uint8), 1, -1)


@functools.cache
def _grain(num: int) -> Floats:
    """Normal noise to cut pieces from: drawing it anew for every frame would cost more than the frame."""
    return np.random.default_rng(0).standard_normal(num, np.float32)


def degrade(
    frames: npt.NDArray[np.uint8], rng: np.random.Generator, jpeg_quality: int | None, *, noise: float = 0.0
) -> npt.NDArray[np.uint8]:
    """Do to RGB frames what a camera and its link do: sensor noise, then a JPEG there and back (None: no JPEG)."""
    import cv2

    noisy = frames
    if noise:
        noisy = quantise(frames.astype(np.float32) / np.float32(255), np.full(len(frames), noise, np.float32), rng)
    if jpeg_quality is None:
        return noisy
    out = np.empty_like(frames)
    for i, frame in enumerate(noisy):
        bgr = cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2BGR)
        done, packed = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, jpeg_quality])
        assert done, f"OpenCV did not encode a frame of {frame.shape}"
        unpacked = cv2.imdecode(packed, cv2.IMREAD_COLOR)
        assert unpacked is not None, "OpenCV did not read its own JPEG"
        out[i] = cv2.cvtColor(unpacked, cv2.COLOR_BGR2RGB)
    return out


class Clip(msgspec.Struct, frozen=True):
    """The truth beside a clip: what it shows, and when each frame was taken."""

    story: Story
    size: tuple[int, int]  # width and height
    fps: float
    codec: str
    times_s: tuple[float, ...]


def write_clip(story: Story, path: str | Path, *, fps: float = 8.0, size: tuple[int, int] = (320, 240)) -> Clip:
    """Film a story to an mp4 file, with the truth as JSON beside it (`<stem>.json`)."""
    import av

    path = Path(path)
    times_s = np.arange(math.floor(story.duration_s * fps)) / fps
    with av.open(str(path), "w") as film:
        track = _add_track(film, fps, size)
        for start in range(0, len(times_s), FRAMES_AT_ONCE):
            for picture in render(story, times_s[start : start + FRAMES_AT_ONCE], size, noise_seed=start):
                film.mux(track.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        film.mux(track.encode())
        codec = track.codec_context.name
    clip = Clip(story=story, size=size, fps=fps, codec=codec, times_s=tuple(times_s.tolist()))
    path.with_suffix(".json").write_bytes(msgspec.json.format(msgspec.json.encode(clip), indent=2))
    return clip


def _add_track(film: "OutputContainer", fps: float, size: tuple[int, int]) -> "VideoStream":
    """A video track in the best codec that this PyAV has."""
    import av

    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    track = film.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
    track.width, track.height = size
    track.pix_fmt = "yuv420p"
    if codec == "mpeg4":
        track.bit_rate = 8 * size[0] * size[1] * max(1, round(fps)) // 20
    else:
        track.options = {"crf": "20", "preset": "veryfast"}
    return track


def read_truth(path: str | Path) -> Story:
    """The story of a clip, from the JSON beside it; `path` is that of either file.

    Raises FileNotFoundError, or msgspec.DecodeError where the file is not what `write_clip` writes.
    """
    return read_clip(path).story


def read_clip(path: str | Path) -> Clip:
    """The whole truth of a clip, from the JSON beside it."""
    return msgspec.json.decode(Path(path).with_suffix(".json").read_bytes(), type=Clip)
