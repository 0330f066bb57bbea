"""A chunk that a memory can show its model again, without its pictures."""

from typing import NamedTuple

from .layout import Patches
from .vision import Vision


class Shown(NamedTuple):
    """What the vision tower made of a chunk, on the device.

    It depends on the chunk's pictures alone, so that only the language model need read it again.
    """

    patches: Patches  # at the times of the stream's clock
    vision: Vision
    num_frames: int

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.vision.embeds, *(self.vision.deepstack or ())))
