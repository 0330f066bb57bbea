"""What the streams of a node may take together: how many they are, and the bytes of their memories."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..protocol.errors import ErrorCode, NodeError
from ..protocol.quantity import bytes_text
from .options import StreamOptions

MEMORY_FACTS = Path("/proc/meminfo")


@dataclass(frozen=True, slots=True)
class _Share:
    """What a stream has, of what it asked for."""

    options: StreamOptions
    num_bytes: int

    @property
    def spare_bytes(self) -> int:
        """That it can do without: what a stream never forgets it needs."""
        return self.num_bytes - self.options.guaranteed_bytes if self.options.policy.forgets else 0


class Allotment:
    """Counts streams and the bytes of their memories against their limits; None is no limit. For any thread.

    `promised` are the least bytes of streams that are to come, by name: they are kept for them until they have come.
    """

    def __init__(self, max_streams: int, max_memory_bytes: int | None, promised: Mapping[str, int] | None = None):
        self._max_streams = max_streams
        self._max_memory_bytes = max_memory_bytes
        self._promised = dict(promised or {})
        self._taken: dict[str, _Share] = {}
        self._lock = threading.Lock()

    def take(self, options: StreamOptions) -> int:
        """Count a stream in. Returns the bytes it may take: what it asks for, or what is left.

        Raises NodeError STREAM_EXISTS, TOO_LARGE, or OUT_OF_MEMORY if less than its least is left.
        """
        with self._lock:
            if options.name in self._taken:
                raise NodeError(ErrorCode.STREAM_EXISTS, f"there is a stream {options.name} already")
            self._check_number()
            num_bytes = self._granted(options)
            self._taken[options.name] = _Share(options, num_bytes)
            self._promised.pop(options.name, None)
            return num_bytes

    def _check_number(self) -> None:
        if len(self._taken) >= self._max_streams:
            message = f"there are {len(self._taken)} streams, the most there may be (limits.max_streams)"
            raise NodeError(ErrorCode.TOO_LARGE, message, details={"max_streams": self._max_streams})

    def _granted(self, options: StreamOptions) -> int:
        if self._max_memory_bytes is None:
            return options.memory_bytes
        taken_bytes, promised_bytes = self._taken_bytes, self._promised_bytes(options.name)
        left_bytes = max(0, self._max_memory_bytes - taken_bytes - promised_bytes)
        if left_bytes >= options.guaranteed_bytes:
            return min(options.memory_bytes, left_bytes)
        never_fits = options.guaranteed_bytes > self._max_memory_bytes
        others = f" and the {bytes_text(promised_bytes)} promised to others" if promised_bytes else ""
        raise NodeError(
            ErrorCode.TOO_LARGE if never_fits else ErrorCode.OUT_OF_MEMORY,
            f"stream {options.name} needs {bytes_text(options.guaranteed_bytes)} of memory, and of the"
            f" {bytes_text(self._max_memory_bytes)} of limits.max_memory_bytes {bytes_text(left_bytes)} are left beside"
            f" the {bytes_text(taken_bytes)} of the other streams{others}",
            details={
                "needed_bytes": options.guaranteed_bytes,
                "left_bytes": left_bytes,
                "taken_bytes": taken_bytes,
                "promised_bytes": promised_bytes,
                "max_memory_bytes": self._max_memory_bytes,
            },
        )

    @property
    def _taken_bytes(self) -> int:
        return sum(share.num_bytes for share in self._taken.values())

    def _promised_bytes(self, to_others_than: str = "") -> int:
        return sum(num for name, num in self._promised.items() if name != to_others_than)

    def ceded(self, options: StreamOptions) -> dict[str, int]:
        """With how many bytes other streams must go on, so that the least of this one is left.

        The largest spares are taken first. Nobody cedes anything where all spares are too little, or there may be no
        further stream.
        """
        with self._lock:
            if self._max_memory_bytes is None or len(self._taken) >= self._max_streams or options.name in self._taken:
                return {}
            others_bytes = self._taken_bytes + self._promised_bytes(options.name)
            missing = options.guaranteed_bytes + others_bytes - self._max_memory_bytes
            shares = sorted(self._taken.items(), key=lambda share: share[1].spare_bytes, reverse=True)
            if missing > sum(share.spare_bytes for _, share in shares):
                return {}
            ceded = {}
            for name, share in shares:
                if missing > 0:
                    ceded[name] = share.num_bytes - min(missing, share.spare_bytes)
                    missing -= share.spare_bytes
            return ceded

    def regained(self) -> dict[str, int]:
        """With how many bytes streams can go on that have less than they asked for and may cede it again, in order."""
        with self._lock:
            if self._max_memory_bytes is None:
                return {}
            left_bytes = self._max_memory_bytes - self._taken_bytes - self._promised_bytes()
            regained = {}
            for name, share in self._taken.items():
                more = min(left_bytes, share.options.memory_bytes - share.num_bytes)
                if more > 0 and share.options.policy.forgets:
                    regained[name] = share.num_bytes + more
                    left_bytes -= more
            return regained

    def keep(self, stream: str, num_bytes: int) -> int:
        """Count so many bytes for a stream from now on; returns how many they were. One that is gone has none."""
        with self._lock:
            share = self._taken.get(stream)
            if share is None:
                return 0
            self._taken[stream] = replace(share, num_bytes=num_bytes)
            return share.num_bytes

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
