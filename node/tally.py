"""Counts by reason that several threads add to."""

import threading
from collections import Counter


class Tally:
    """Events counted by reason; the reasons are ours, so their number is bounded."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, reason: str) -> None:
        with self._lock:
            self._counts[reason] += 1

    def counts(self) -> dict[str, int]:
        with self._lock:
            return dict(self._counts)
