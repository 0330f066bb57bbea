"""Frames that wait to be looked at, the newest of them: the oldest gives way."""

from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class FrameRing(Generic[T]):
    """A queue that never blocks and never grows beyond `max_frames` or `max_bytes`. Its owner guards it."""

    def __init__(self, max_frames: int, max_bytes: int) -> None:
        if min(max_frames, max_bytes) < 1:
            raise ValueError(f"a ring must have room, got {max_frames} frames and {max_bytes} bytes")
        self.max_frames = max_frames
        self.max_bytes = max_bytes
        self._frames: deque[tuple[T, int]] = deque()
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def push(self, frame: T, num_bytes: int) -> list[T]:
        """Append a frame; return those that had to give way, oldest first.

        Raises ValueError for a frame that is larger than the whole ring.
        """
        if num_bytes > self.max_bytes:
            raise ValueError(f"a frame of {num_bytes} bytes does not fit a ring of {self.max_bytes}")
        given_way: list[T] = []
        while len(self._frames) == self.max_frames or self._num_bytes + num_bytes > self.max_bytes:
            given_way.append(self._popleft())
        self._frames.append((frame, num_bytes))
        self._num_bytes += num_bytes
        return given_way

    def pop(self) -> T | None:
        """Take the oldest frame, or None if there is none."""
        return self._popleft() if self._frames else None

    def clear(self) -> list[T]:
        """Take all frames, oldest first."""
        return [self._popleft() for _ in range(len(self._frames))]

    def _popleft(self) -> T:
        frame, num_bytes = self._frames.popleft()
        self._num_bytes -= num_bytes
        return frame
