"""Camera frames to vision patches, on the device that encodes them.

The same arithmetic as transformers' Qwen2-VL image processor: smart resize, bicubic with antialias, rescale,
normalise, patchify. Sizes that need no resize agree with it to 1e-6; a resize agrees to 2/255 per value on
natural pictures (interpolation rounds differently there, and PIL clips between its two passes).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_ASPECT_RATIO = 200


@dataclass(frozen=True, slots=True)
class PatchGeometry:
    """How the vision tower cuts a picture, and the statistics it expects."""

    patch: int  # pixels
    merge: int  # patches on a side that become one token
    temporal_patch: int  # frames
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    min_pixels: int
    max_pixels: int

    @property
    def factor(self) -> int:
        """Pixels on a side of one token."""
        return self.patch * self.merge

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Merged tokens (rows, columns) of an encode size (width, height)."""
        width, height = size
        return height // self.factor, width // self.factor


def encode_size(
    size: tuple[int, int],
    geometry: PatchGeometry,
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    explicit: tuple[int, int] | None = None,
) -> tuple[int, int]:
    """Width and height at which a frame of `size` (width, height) is encoded.

    Multiples of `geometry.factor`, near the frame's own shape and within the bounds on pixels; an explicit
    size is taken to the nearest multiples. Raises ValueError for a frame over 200 times longer than wide.
    """
    width, height = size
    factor = geometry.factor
    if explicit is not None:
        return _nearest(explicit[0], factor), _nearest(explicit[1], factor)
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise ValueError(f"a frame of {width}x{height} is more than {MAX_ASPECT_RATIO} times longer than wide")
    low = geometry.min_pixels if min_pixels is None else min_pixels
    if max_pixels is not None:
        low = min(low, max_pixels)  # what a stream asks for wins over the model's own bound
    high = max(low, geometry.max_pixels if max_pixels is None else max_pixels)
    wide, tall = round(width / factor) * factor, round(height / factor) * factor
    if wide * tall > high:
        shrink = math.sqrt(width * height / high)
        wide = max(factor, math.floor(width / shrink / factor) * factor)
        tall = max(factor, math.floor(height / shrink / factor) * factor)
    elif wide * tall < low:
        grow = math.sqrt(low / (width * height))
        wide = math.ceil(width * grow / factor) * factor
        tall = math.ceil(height * grow / factor) * factor
    return wide, tall


def _nearest(pixels: int, factor: int) -> int:
    return max(factor, round(pixels / factor) * factor)


def to_patches(frames: Tensor, size: tuple[int, int], geometry: PatchGeometry) -> Tensor:
    """Resize, normalise and patchify frames.

    frames (num_frames, height, width, 3), uint8, on the device; num_frames is a multiple of the temporal
    patch, or 1, which is then repeated to fill one. size is (width, height) in multiples of `geometry.factor`.
    Returns (num_patches, 3 * temporal_patch * patch * patch), float32, in the order the vision tower reads.
    """
    pixels = frames.permute(0, 3, 1, 2)
    width, height = size
    if pixels.shape[-2:] != (height, width):
        pixels = _resize(pixels, height, width)
    mean = torch.tensor(geometry.mean, device=frames.device).view(3, 1, 1)
    std = torch.tensor(geometry.std, device=frames.device).view(3, 1, 1)
    return patchify((pixels.float() / 255 - mean) / std, geometry)


def _resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """Bicubic with antialias to whole pixel values, as picture libraries give them."""
    if pixels.device.type == "cpu":
        return F.interpolate(pixels.contiguous(), (height, width), mode="bicubic", antialias=True)
    return resize_by_axes(pixels, height, width)


def resize_by_axes(pixels: Tensor, height: int, width: int) -> Tensor:
    """What the CPU's uint8 kernel does, for devices that have none: width, then height, whole values after each.

    Both axes at once in float would overshoot where Pillow clips between its two passes.
    """
    pixels = pixels.float().contiguous()
    for size in ((pixels.shape[-2], width), (height, width)):
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).round().clamp(0, 255)
    return pixels


def patchify(pixels: Tensor, geometry: PatchGeometry) -> Tensor:
    """Cut (num_frames, 3, height, width) into rows of one patch each: see `to_patches`."""
    p, m, t = geometry.patch, geometry.merge, geometry.temporal_patch
    if pixels.shape[0] % t:
        pixels = torch.cat([pixels, pixels[-1:].expand(t - pixels.shape[0] % t, -1, -1, -1)])
    num, channels, height, width = pixels.shape
    blocks = pixels.view(num // t, t, channels, height // p // m, m, p, width // p // m, m, p)
    # time, block row, block column, row and column in the block, channel, frame, pixel row, pixel column
    ordered = blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return ordered.reshape(-1, channels * t * p * p)
