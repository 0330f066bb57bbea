import pytest
from hypothesis import given
from hypothesis import strategies as st

from onlooker.node.ring import FrameRing


def test_the_oldest_gives_way_and_is_handed_back():
    ring = FrameRing[int](2, 100)
    assert [ring.push(n, 1) for n in range(4)] == [[], [], [0], [1]]
    assert [ring.pop(), ring.pop(), ring.pop()] == [2, 3, None]


def test_a_large_frame_makes_as_many_give_way_as_it_needs():
    ring = FrameRing[str](8, 10)
    for name in "abc":
        assert ring.push(name, 3) == []
    assert ring.push("d", 7) == ["a", "b"]
    assert (ring.num_bytes, ring.push("e", 10), ring.clear()) == (10, ["c", "d"], ["e"])


def test_a_frame_larger_than_the_ring_is_refused_and_costs_no_other():
    ring = FrameRing[str](8, 10)
    ring.push("a", 3)
    with pytest.raises(ValueError, match="a frame of 11 bytes does not fit a ring of 10"):
        ring.push("b", 11)
    assert ring.clear() == ["a"]


def test_clear_hands_everything_back_in_order():
    ring = FrameRing[int](3, 3)
    for n in range(3):
        ring.push(n, 1)
    assert ring.clear() == [0, 1, 2]
    assert (len(ring), ring.num_bytes) == (0, 0)


@pytest.mark.parametrize(("max_frames", "max_bytes"), [(0, 1), (1, 0)])
def test_a_ring_without_room_is_refused(max_frames: int, max_bytes: int):
    with pytest.raises(ValueError, match=f"got {max_frames} frames and {max_bytes} bytes"):
        FrameRing(max_frames, max_bytes)


@given(st.integers(1, 5), st.integers(9, 20), st.lists(st.none() | st.integers(0, 9), max_size=60))
def test_nothing_is_lost_unseen_and_order_is_kept(max_frames: int, max_bytes: int, pushes: list[int | None]):
    ring = FrameRing[tuple[int, int]](max_frames, max_bytes)
    out: list[tuple[int, int]] = []
    for n, num_bytes in enumerate(pushes):
        if num_bytes is None:
            frame = ring.pop()
            out += [] if frame is None else [frame]
        else:
            out += ring.push((n, num_bytes), num_bytes)
        assert len(ring) <= max_frames and ring.num_bytes <= max_bytes
    assert out + ring.clear() == [(n, size) for n, size in enumerate(pushes) if size is not None]
    assert ring.num_bytes == 0
