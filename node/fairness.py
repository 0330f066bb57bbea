"""Who goes next when chunks and answers both wait: the side that is behind its share of the engine's time."""

from typing import Literal

Side = Literal["encode", "decode"]

# Frames that are not taken in are lost, an answer only comes later. Steps of decoding are short beside a chunk, so
# that a seventh of the time still gives every answer several tokens a chunk.
ENCODE_SHARE = 0.85


class FairShare:
    """Gives encoding its share of the time while both sides have work; alone, either has all of it.

    Answers go first when they come. While both have work, encoding waits for less than (1 - share) / share of its own
    last turn plus one turn of decoding, and decoding for less than share / (1 - share) of its own plus one of encoding.
    What a side had over its share it gives back also while the other has no work: answers that come one by one take
    no more of the time than those that come together.
    """

    def __init__(self, encode_share: float = ENCODE_SHARE) -> None:
        if not 0 < encode_share < 1:
            raise ValueError(f"a share is between 0 and 1, got {encode_share}")
        self._price = {"encode": 1 - encode_share, "decode": -encode_share}
        self._both_wait = False
        self._balance_s = 0.0  # over 0: decoding is owed time, below: encoding

    def choose(self, *, can_encode: bool, can_decode: bool) -> Side | None:
        """The side whose turn it is, None if neither has work."""
        self._both_wait = can_encode and can_decode
        if not can_encode:  # who wants nothing is owed nothing
            self._balance_s = max(self._balance_s, 0.0)
        if not can_decode:
            self._balance_s = min(self._balance_s, 0.0)
        if self._both_wait:
            return "decode" if self._balance_s >= 0 else "encode"
        return "encode" if can_encode else "decode" if can_decode else None

    def spent(self, side: Side, seconds: float) -> None:
        """Book the time that a turn took; a side that is alone gets what it is owed by it, and owes nothing."""
        self._balance_s += self._price[side] * seconds
        if not self._both_wait:
            self._balance_s = min(self._balance_s, 0.0) if side == "encode" else max(self._balance_s, 0.0)
