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
    A turn of encoding is what lies between two of its layers: it goes on where it was when its next turn comes.
    """

    def __init__(self, encode_share: float = ENCODE_SHARE) -> None:
        if not 0 < encode_share < 1:
            raise ValueError(f"a share is between 0 and 1, got {encode_share}")
        self._price = {"encode": 1 - encode_share, "decode": -encode_share}
        self._both_wait = False
        self._balance_s = 0.0  # over 0: encoding has had more than its share since both began to wait

    def choose(self, *, can_encode: bool, can_decode: bool) -> Side | None:
        """The side whose turn it is, None if neither has work."""
        self._both_wait = can_encode and can_decode
        if not self._both_wait:
            self._balance_s = 0.0
            return "encode" if can_encode else "decode" if can_decode else None
        return "decode" if self._balance_s >= 0 else "encode"

    def spent(self, side: Side, seconds: float) -> None:
        """Book the time that a turn took, if the other side waited for it."""
        if self._both_wait:
            self._balance_s += self._price[side] * seconds
