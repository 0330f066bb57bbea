from hypothesis import given, settings
from hypothesis import strategies as st

from onlooker.node.fairness import FairShare

turns = st.lists(st.tuples(st.floats(0.001, 10), st.floats(0.001, 10)), min_size=20, max_size=60)


def test_a_side_that_is_alone_has_every_turn():
    share = FairShare()
    for _ in range(5):
        assert share.choose(can_encode=True, can_decode=False) == "encode"
        share.spent("encode", 1.0)
    for _ in range(5):
        assert share.choose(can_encode=False, can_decode=True) == "decode"
        share.spent("decode", 1.0)
    assert share.choose(can_encode=False, can_decode=False) is None


def test_a_long_time_alone_is_not_held_against_a_side():
    share = FairShare()
    for _ in range(100):
        share.choose(can_encode=True, can_decode=False)
        share.spent("encode", 1.0)
    sides = []
    for _ in range(4):
        sides.append(share.choose(can_encode=True, can_decode=True))
        share.spent(sides[-1], 1.0)
    assert sides == ["decode", "encode", "decode", "encode"]


def test_many_short_turns_are_worth_one_long_one():
    share, sides = FairShare(), []
    for _ in range(12):
        side = share.choose(can_encode=True, can_decode=True)
        assert side is not None
        sides.append(side)
        share.spent(side, {"encode": 1.0, "decode": 0.25}[side])
    assert sides == ["encode", *["decode"] * 4, "encode", *["decode"] * 4, "encode", "decode"]


@given(turns=turns)
@settings(max_examples=200, deadline=None)
def test_neither_side_waits_longer_than_is_stated(turns: list[tuple[float, float]]):
    """Both always have work; each turn takes the time drawn for it."""
    share = FairShare()
    last, waited = {"encode": 0.0, "decode": 0.0}, {"encode": 0.0, "decode": 0.0}
    longest = {"encode": max(e for e, _ in turns), "decode": max(d for _, d in turns)}
    for encode_s, decode_s in turns:
        side = share.choose(can_encode=True, can_decode=True)
        assert side is not None
        other = "decode" if side == "encode" else "encode"
        seconds = encode_s if side == "encode" else decode_s
        share.spent(side, seconds)
        last[side], waited[side] = seconds, 0.0
        waited[other] += seconds
        assert waited[other] <= last[other] + longest[side] + 1e-6


@given(turns=turns)
@settings(max_examples=100, deadline=None)
def test_time_is_split_evenly(turns: list[tuple[float, float]]):
    share = FairShare()
    spent = {"encode": 0.0, "decode": 0.0}
    for encode_s, decode_s in turns:
        side = share.choose(can_encode=True, can_decode=True)
        assert side is not None
        seconds = encode_s if side == "encode" else decode_s
        share.spent(side, seconds)
        spent[side] += seconds
    assert abs(spent["encode"] - spent["decode"]) <= max(max(pair) for pair in turns) + 1e-6
