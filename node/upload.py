"""Pictures on their way to the device: through page-locked memory, and ahead of their turn on a stream of their own."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .chunk import Chunk


class _Arrival(NamedTuple):
    """Pixels on the device, once the event has happened; None: they are there."""

    pixels: Tensor
    is_there: torch.cuda.Event | None


class Upload:
    """The pictures of a chunk, on their way."""

    def __init__(self, chunk: Chunk, arrival: Future[_Arrival]) -> None:
        self.chunk = chunk
        self._arrival = arrival

    def pixels(self) -> Tensor:
        """See `upload`; for what is launched from now on. Raises what the upload raised."""
        pixels, is_there = self._arrival.result()
        if is_there is not None:
            current = torch.cuda.current_stream(pixels.device)
            current.wait_event(is_there)
            pixels.record_stream(current)  # their memory is the other stream's, and must not go back to it too early
        return pixels


class Uploader:
    """A thread that uploads chunks while another one keeps the device busy."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="upload")

    def start(self, chunk: Chunk) -> Upload:
        return Upload(chunk, self._thread.submit(self._upload, chunk))

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _upload(self, chunk: Chunk) -> _Arrival:
        frames = [picture.pixels for picture in chunk.pictures]
        if self._stream is None:
            return _Arrival(upload(frames, self._device), None)
        is_there = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            pixels = upload(frames, self._device)
            is_there.record(self._stream)
        return _Arrival(pixels, is_there)


def upload(frames: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """Frames (height, width, 3), uint8, as one tensor (num_frames, height, width, 3) on the device.

    A GPU has them only when what the current stream was given before is done.
    """
    host = torch.empty(len(frames), *frames[0].shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
    np.stack(frames, out=host.numpy())
    return host.to(device, non_blocking=True)
