"""Small video files made on the spot, whose pictures can be told apart after any codec.

Picture n is a plain grey of level `grey(n)`; `number(pixels)` reads n back.
"""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video import VideoStream

WIDTH, HEIGHT = 64, 48


def grey(n: int) -> int:
    """Level of picture n; the levels are 8 apart, more than a codec's error."""
    return 8 + 8 * n


def number(pixels: np.ndarray) -> int:
    """Which picture this is."""
    return round((float(pixels.mean()) - 8) / 8)


def write_clip(
    path: Path,
    num_frames: int = 20,
    *,
    fps: float = 10.0,
    times_ms: Sequence[int] | None = None,
    codec: str = "mpeg4",
) -> Path:
    """Write pictures 0, 1, ... at a constant rate, or shown at `times_ms`."""
    times_ms = times_ms or [round(n * 1000 / fps) for n in range(num_frames)]
    pictures = [np.full((HEIGHT, WIDTH, 3), grey(n), np.uint8) for n in range(len(times_ms))]
    return write_pictures(path, pictures, times_ms, fps=fps, codec=codec)


def write_pictures(
    path: Path, pictures: Sequence[np.ndarray], times_ms: Sequence[int], *, fps: float = 10.0, codec: str = "mpeg4"
) -> Path:
    """Write RGB pictures, each shown from its time on."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        assert isinstance(stream, VideoStream)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for pixels, time_ms in zip(pictures, times_ms, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time_ms, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
