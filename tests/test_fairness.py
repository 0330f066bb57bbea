import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onlooker.node.fairness import ENCODE_SHARE, FairShare, Side

shares = st.sampled_from([0.2, 0.5, ENCODE_SHARE])
turns = st.lists(st.tuples(st.floats(0.001, 10), st.floats(0.001, 10)), min_size=20, max_size=60)


def sides_of(share: FairShare, num: int, seconds: dict[Side, float]) -> list[Side]:
    """Whose turns come when both always have work."""
    sides = []
    for _ in range(num):
        side = share.choose(can_encode=True, can_decode=True)
        assert side is not None
        sides.append(side)
        share.spent(side, seconds[side])
    return sides


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
    share = FairShare(0.5)
    for _ in range(100):
        share.choose(can_encode=True, can_decode=False)
        share.spent("encode", 1.0)
    assert sides_of(share, 4, {"encode": 1.0, "decode": 1.0}) == ["decode", "encode", "decode", "encode"]


def test_a_question_that_comes_while_chunks_are_encoded_goes_first():
    share = FairShare()
    share.choose(can_encode=True, can_decode=False)
    share.spent("encode", 1.0)
    assert share.choose(can_encode=True, can_decode=True) == "decode"


@pytest.mark.parametrize(("side", "alone"), [("decode", "encode"), ("encode", "decode")])
def test_work_that_comes_bit_by_bit_gets_no_more_than_its_share(side: Side, alone: Side):
    """Whenever a turn of one side is over it has no work for a while, in which the other is alone."""
    share = FairShare()
    spent = {"encode": 0.0, "decode": 0.0}
    share.choose(can_encode=True, can_decode=True)
    share.spent(side, 1.0)  # so that both sides' first turns are behind us
    for _ in range(1000):
        assert share.choose(can_encode=alone == "encode", can_decode=alone == "decode") == alone
        share.spent(alone, 0.1)
        spent[alone] += 0.1
        if share.choose(can_encode=True, can_decode=True) == side:
            share.spent(side, 0.5)
            spent[side] += 0.5
        else:
            share.spent(alone, 0.1)
            spent[alone] += 0.1
    part = spent[side] / sum(spent.values())
    assert part <= (ENCODE_SHARE if side == "encode" else 1 - ENCODE_SHARE) + 0.01


def test_a_side_that_wants_nothing_is_owed_nothing():
    share = FairShare(0.5)
    assert share.choose(can_encode=True, can_decode=True) == "decode"
    share.spent("decode", 5.0)
    assert share.choose(can_encode=False, can_decode=True) == "decode"
    share.spent("decode", 1.0)
    assert share.choose(can_encode=True, can_decode=True) == "decode"
    share.spent("decode", 1.0)
    assert share.choose(can_encode=True, can_decode=True) == "encode"


def test_many_short_turns_are_worth_one_long_one():
    sides = sides_of(FairShare(0.75), 13, {"encode": 1.0, "decode": 0.125})
    # A decode step of 1/8 s is paid for by 3/8 s of encoding; a chunk pays for 8/3 steps.
    assert sides[:2] == ["decode", "encode"] and sides.count("encode") == 4


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_that_starves_a_side_is_refused(share: float):
    with pytest.raises(ValueError, match="between 0 and 1"):
        FairShare(share)


@given(turns=turns, encode_share=shares)
@settings(max_examples=200, deadline=None)
def test_neither_side_waits_longer_than_is_stated(turns: list[tuple[float, float]], encode_share: float):
    """Both always have work; each turn takes the time drawn for it."""
    share = FairShare(encode_share)
    last, waited = {"encode": 0.0, "decode": 0.0}, {"encode": 0.0, "decode": 0.0}
    longest = {"encode": max(e for e, _ in turns), "decode": max(d for _, d in turns)}
    price = {"encode": (1 - encode_share) / encode_share, "decode": encode_share / (1 - encode_share)}
    for encode_s, decode_s in turns:
        side = share.choose(can_encode=True, can_decode=True)
        assert side is not None
        other: Side = "decode" if side == "encode" else "encode"
        seconds = encode_s if side == "encode" else decode_s
        share.spent(side, seconds)
        last[side], waited[side] = seconds, 0.0
        waited[other] += seconds
        assert waited[other] <= price[other] * last[other] + longest[side] + 1e-6


@given(turns=turns, encode_share=shares)
@settings(max_examples=100, deadline=None)
def test_each_side_gets_its_share(turns: list[tuple[float, float]], encode_share: float):
    share = FairShare(encode_share)
    spent = {"encode": 0.0, "decode": 0.0}
    for encode_s, decode_s in turns:
        side = share.choose(can_encode=True, can_decode=True)
        assert side is not None
        seconds = encode_s if side == "encode" else decode_s
        share.spent(side, seconds)
        spent[side] += seconds
    owed = encode_share * sum(spent.values()) - spent["encode"]
    assert abs(owed) <= max(max(pair) for pair in turns) + 1e-6
