"""Frames that wait to be looked at, the newest of them: the oldest gives way."""

import threading
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class FrameRing(Generic[T]):
    """A queue that never blocks and never grows beyond `capacity`. Safe from any thread."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self.capacity = capacity
        self._frames: deque[T] = deque()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._frames)

    def push(self, frame: T) -> T | None:
        """Append a frame; return the oldest if it had to give way."""
        with self._lock:
            dropped = self._frames.popleft() if len(self._frames) == self.capacity else None
            self._frames.append(frame)
            return dropped

    def pop(self) -> T | None:
        """Take the oldest frame, or None if there is none."""
        with self._lock:
            return self._frames.popleft() if self._frames else None

    def clear(self) -> list[T]:
        """Take all frames, oldest first."""
        with self._lock:
            frames = list(self._frames)
            self._frames.clear()
            return frames
