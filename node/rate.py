"""How often something happens, measured over the last few seconds."""

from collections import deque


class Rate:
    """Events per second over a sliding window; times are `time.monotonic()` seconds."""

    def __init__(self, window_s: float = 5.0, max_events: int = 4096) -> None:
        self._window_s = window_s
        self._events: deque[tuple[float, int]] = deque(maxlen=max_events)
        self._has_seen_any = False

    def add(self, now: float, num: int = 1) -> None:
        self._events.append((now, num))
        self._has_seen_any = True

    def per_second(self, now: float) -> float | None:
        """The rate, 0 after a silence as long as the window, or None while it cannot be told."""
        while self._events and self._events[0][0] < now - self._window_s:
            self._events.popleft()
        if not self._events:
            return 0.0 if self._has_seen_any else None
        (first, _), (last, _) = self._events[0], self._events[-1]
        if last <= first:
            return None
        between = last - first
        silence = now - last
        usual = between / (len(self._events) - 1)
        elapsed = between + (silence if silence > 2 * usual else 0.0)
        return sum(num for _, num in list(self._events)[1:]) / elapsed
