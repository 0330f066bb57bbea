"""What the streams of a node may take together: how many they are, and the bytes of their memories."""

import threading
from pathlib import Path

from ..protocol.errors import ErrorCode, NodeError
from .options import StreamOptions

MEMORY_FACTS = Path("/proc/meminfo")


class Allotment:
    """Counts streams and their `memory_bytes` against their limits; None is no limit. For any thread."""

    def __init__(self, max_streams: int, max_memory_bytes: int | None) -> None:
        self._max_streams = max_streams
        self._max_memory_bytes = max_memory_bytes
        self._taken: dict[str, int] = {}
        self._lock = threading.Lock()

    def take(self, options: StreamOptions) -> None:
        """Count a stream in. Raises NodeError STREAM_EXISTS, TOO_LARGE or OUT_OF_MEMORY."""
        with self._lock:
            if options.name in self._taken:
                raise NodeError(ErrorCode.STREAM_EXISTS, f"there is a stream {options.name} already")
            self._check_number()
            self._check_memory(options.memory_bytes)
            self._taken[options.name] = options.memory_bytes

    def _check_number(self) -> None:
        if len(self._taken) >= self._max_streams:
            message = f"there are {len(self._taken)} streams, the most there may be (limits.max_streams)"
            raise NodeError(ErrorCode.TOO_LARGE, message, details={"max_streams": self._max_streams})

    def _check_memory(self, num_bytes: int) -> None:
        taken_bytes = sum(self._taken.values())
        if self._max_memory_bytes is None or taken_bytes + num_bytes <= self._max_memory_bytes:
            return
        never_fits = num_bytes > self._max_memory_bytes
        raise NodeError(
            ErrorCode.TOO_LARGE if never_fits else ErrorCode.OUT_OF_MEMORY,
            f"memory_bytes {num_bytes} and the {taken_bytes} of the other streams are more than"
            f" {self._max_memory_bytes} (limits.max_memory_bytes)",
            details={"max_memory_bytes": self._max_memory_bytes, "taken_bytes": taken_bytes},
        )

    def give_back(self, stream: str) -> None:
        """A stream is gone, or could not be added."""
        with self._lock:
            self._taken.pop(stream, None)


def default_memory_bytes(device: str, facts: Path = MEMORY_FACTS) -> int | None:
    """What memories may take if nobody says: on the CPU half of what the machine has left, else all there is.

    None is no limit, also where the kernel does not tell.
    """
    if not device.startswith("cpu"):
        return None  # the device itself refuses what it has no room for
    try:
        lines = facts.read_text().splitlines()
    except OSError:
        return None
    available = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(available[0]) * 1024 // 2 if available else None
