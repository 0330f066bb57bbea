import pytest
from hypothesis import given
from hypothesis import strategies as st

from onlooker.node.ring import FrameRing


def test_the_oldest_gives_way_and_is_handed_back():
    ring = FrameRing[int](2)
    assert [ring.push(n) for n in range(4)] == [None, None, 0, 1]
    assert [ring.pop(), ring.pop(), ring.pop()] == [2, 3, None]


def test_clear_hands_everything_back_in_order():
    ring = FrameRing[int](3)
    for n in range(3):
        ring.push(n)
    assert ring.clear() == [0, 1, 2]
    assert len(ring) == 0


def test_a_ring_without_room_is_refused():
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        FrameRing(0)


@given(st.integers(1, 5), st.lists(st.booleans(), max_size=60))
def test_nothing_is_lost_unseen_and_order_is_kept(capacity: int, pushes: list[bool]):
    ring = FrameRing[int](capacity)
    out: list[int] = []
    for n, is_push in enumerate(pushes):
        frame = ring.push(n) if is_push else ring.pop()
        out += [] if frame is None else [frame]
        assert len(ring) <= capacity
    assert out + ring.clear() == [n for n, is_push in enumerate(pushes) if is_push]
