"""Sequence numbers of one publisher's session: what is missing, what came twice, what came late."""

from typing import Literal

Placed = Literal["next", "duplicate", "out_of_order"]

_WINDOW = 1024  # numbers behind the newest of which it is known whether they came
_MASK = (1 << _WINDOW) - 1


class SequenceWindow:
    """Places each number against those that came before, in constant memory (the window of RFC 4303, section 3.4.3)."""

    def __init__(self) -> None:
        self.newest: int | None = None
        self.num_missing = 0  # between the first and the newest, not counting what came late
        self._first = 0
        self._came = 0  # bit n: whether `newest - n` came

    def place(self, seq: int) -> Placed:
        """Say where `seq` belongs, and remember it."""
        if self.newest is None:
            self.newest = self._first = seq
            self._came = 1
            return "next"
        ahead = seq - self.newest
        if ahead > 0:
            self.num_missing += ahead - 1
            self.newest = seq
            self._came = (self._came << ahead | 1) & _MASK if ahead < _WINDOW else 1
            return "next"
        return self._place_behind(seq, bit=1 << -ahead if -ahead < _WINDOW else 0)

    def _place_behind(self, seq: int, bit: int) -> Placed:
        if bit & self._came:
            return "duplicate"
        if bit and seq > self._first:
            self.num_missing -= 1
        self._came |= bit
        return "out_of_order"
