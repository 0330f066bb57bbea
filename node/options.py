"""How one stream is sampled, encoded and remembered: plain values, checked once."""

from dataclasses import dataclass
from typing import Literal

from ..protocol.messages import RetentionName
from .chunk import CHUNK_FRAMES
from .retention import POLICIES, Retention

_COUNTED = ("stride", "memory_bytes", "min_memory_bytes", "ring_frames", "ring_bytes", "min_pixels", "max_pixels")


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """Settings of one stream. The encode size never depends on `chunk_frames`.

    Raises ValueError, naming the field, for a value that cannot work.
    """

    name: str
    connect: str | None = None  # endpoint of a camera that binds
    camera_key: str | None = None  # file with that camera's public key; with it the link is CURVE
    fps: float | None = None  # frames per second to keep; None keeps all
    stride: int = 1  # keep every n-th frame
    gate: float | None = None  # leave out pictures that changed by less than so many grey levels, 0 to 255
    drop: float | None = None  # leave out tokens more similar than that to the last one kept at their place, 0 to 1
    chunk_frames: int = 4
    layout: Literal["native", "turns"] = "native"
    min_pixels: int | None = None  # None: the model's own bound
    max_pixels: int | None = None
    encode_size: tuple[int, int] | None = None  # width, height; wins over the pixel bounds
    encode_scale: float = 1.0  # of that width and height, while the node has too little time or memory
    memory_bytes: int = 1 << 30
    memory_share: float = 1.0  # of it that may be in use, while the node has too little time or memory
    min_memory_bytes: int | None = None  # what it takes when there is less left; None: not less than memory_bytes
    retention: RetentionName = "stop"
    last_frames: int = 0  # hold only the newest chunks, of at most so many frames, encoded anew each time; 0: all
    degrade: bool = False  # give up quality, step by step, while there is too little time or memory: see ladder
    ring_frames: int = 64
    ring_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"fps must be above 0, got {self.fps}")
        if self.chunk_frames not in CHUNK_FRAMES:
            raise ValueError(f"chunk_frames must be one of {CHUNK_FRAMES}, got {self.chunk_frames}")
        if self.layout not in ("native", "turns"):
            raise ValueError(f"layout must be native or turns, got {self.layout!r}")
        if self.retention not in POLICIES:
            raise ValueError(f"retention must be one of {', '.join(POLICIES)}, got {self.retention!r}")
        if self.gate is not None and not 0 <= self.gate <= 255:
            raise ValueError(f"gate must be within 0 and 255, got {self.gate}")
        if self.drop is not None and not 0 <= self.drop <= 1:
            raise ValueError(f"drop must be within 0 and 1, got {self.drop}")
        self._check_last_frames()
        for field in _COUNTED:
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field} must be at least 1, got {value}")
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} is above max_pixels {self.max_pixels}")
        if self.guaranteed_bytes > self.memory_bytes:
            raise ValueError(f"min_memory_bytes {self.min_memory_bytes} is above memory_bytes {self.memory_bytes}")
        if self.encode_size is not None and min(self.encode_size) < 1:
            raise ValueError(f"encode_size must be positive, got {self.encode_size}")

    def _check_last_frames(self) -> None:
        num = self.last_frames
        if num and num < self.chunk_frames:
            raise ValueError(f"last_frames must be 0 or at least chunk_frames {self.chunk_frames}, got {num}")
        if num and self.retention != "stop":
            raise ValueError(f"last_frames says what is forgotten, and needs retention stop, got {self.retention!r}")
        if num and self.drop is not None and self.drop < 1:
            raise ValueError(f"last_frames shows whole frames, and needs drop 1 or none, got {self.drop}")

    @property
    def policy(self) -> Retention:
        """What becomes of a memory without room; one of the last frames starts over, and they come back."""
        return POLICIES["reset" if self.last_frames else self.retention]

    @property
    def guaranteed_bytes(self) -> int:
        """The least memory that the stream is added with."""
        return self.memory_bytes if self.min_memory_bytes is None else self.min_memory_bytes
