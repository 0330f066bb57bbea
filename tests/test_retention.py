from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onlooker.node.retention import POLICIES, Retention, Thin, Window


@dataclass(frozen=True)
class Piece:
    number: int
    num_tokens: int = 10


def lived(policy: Retention, num_chunks: int, num_tokens: int, max_tokens: int) -> list[list[int]]:
    """Numbers in a memory of equal chunks after each that came; an eighth is freed when it is full."""
    held: list[Piece] = []
    history = []
    for number in range(num_chunks):
        if 10 * (len(held) + 1) > num_tokens:
            held = [held[place] for place in policy.keep(held, max_tokens)]
        held.append(Piece(number))
        history.append([piece.number for piece in held])
    return history


sizes = st.lists(st.integers(1, 40), max_size=60)
steps = st.lists(st.integers(1, 5), min_size=60, max_size=60)


@pytest.mark.parametrize("name", ["reset", "window", "thin"])
@settings(max_examples=100, deadline=None)
@given(sizes=sizes, steps=steps, max_tokens=st.integers(0, 400))
def test_what_stays_is_within_the_room_and_in_order(name: str, sizes: list[int], steps: list[int], max_tokens: int):
    numbers = [sum(steps[: place + 1]) for place in range(len(sizes))]
    chunks = [Piece(number, size) for number, size in zip(numbers, sizes, strict=True)]
    keep = POLICIES[name].keep(chunks, max_tokens)
    assert keep == sorted(set(keep)) and set(keep) <= set(range(len(chunks)))
    assert sum(chunks[place].num_tokens for place in keep) <= max_tokens
    if name != "reset" and chunks and chunks[-1].num_tokens <= max_tokens:
        assert keep[-1] == len(chunks) - 1


def test_stop_keeps_everything_and_reset_nothing():
    chunks = [Piece(number) for number in range(5)]
    assert POLICIES["stop"].keep(chunks, 10) == [0, 1, 2, 3, 4] and not POLICIES["stop"].forgets
    assert POLICIES["reset"].keep(chunks, 10) == [] and POLICIES["reset"].starts_over


def test_a_window_keeps_the_newest_that_fit():
    chunks = [Piece(0, 10), Piece(1, 30), Piece(2, 10), Piece(3, 10)]
    assert Window().keep(chunks, 49) == [2, 3]
    assert Window().keep(chunks, 50) == [1, 2, 3]


def test_thin_keeps_the_newest_half_whole():
    for held in lived(Thin(), 500, 640, 560)[60:]:
        newest = held[-24:]
        assert newest == list(range(newest[0], newest[0] + 24))


def test_thin_keeps_every_2nd_4th_8th_of_what_is_older():
    held = lived(Thin(), 2000, 640, 560)[-1]
    gaps = [later - earlier for earlier, later in pairwise(held)]
    assert gaps == sorted(gaps, reverse=True)
    assert {gap & (gap - 1) for gap in gaps} == {0}, "gaps are powers of two"
    assert {1, 2, 4, 8, 16, 32, 64, 128} <= set(gaps)


def test_thin_never_forgets_the_first_chunk_and_keeps_its_size():
    history = lived(Thin(), 5000, 640, 560)
    assert all(held[0] == 0 for held in history)
    assert all(40 <= len(held) <= 64 for held in history[60:])


def test_the_density_of_what_thin_keeps_falls_with_age_and_not_faster():
    """Between two survivors lies at most a fixed part of the age of the older one."""
    for held in lived(Thin(), 3000, 640, 560)[100::100]:
        for earlier, later in pairwise(held[1:]):
            assert later - earlier <= 1 + (held[-1] - earlier) / 2


def test_thin_with_less_room_than_bands_forgets_the_oldest():
    assert Thin().keep([Piece(0), Piece(512), Piece(768), Piece(1000), Piece(1001)], 20) == [3, 4]
