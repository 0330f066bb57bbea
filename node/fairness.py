"""Who goes next when chunks and answers both wait: whichever side has had less of the engine's time."""

from typing import Literal

Side = Literal["encode", "decode"]


class FairShare:
    """Splits time evenly between encoding and answering while both have work; alone, either has all of it.

    While both have work, a side waits for less than its own last turn took plus one turn of the other side.
    """

    def __init__(self) -> None:
        self._encode_ahead_s = 0.0  # how much more time encoding has had since both began to wait

    def choose(self, *, can_encode: bool, can_decode: bool) -> Side | None:
        """The side whose turn it is, None if neither has work."""
        if not (can_encode and can_decode):
            self._encode_ahead_s = 0.0
            return "encode" if can_encode else "decode" if can_decode else None
        return "decode" if self._encode_ahead_s > 0 else "encode"

    def spent(self, side: Side, seconds: float) -> None:
        """Book the time that a turn took."""
        self._encode_ahead_s += seconds if side == "encode" else -seconds
