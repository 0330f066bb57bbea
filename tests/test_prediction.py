from typing import Any

from onlooker.protocol.forecast import room_of, seconds_of_positions
from onlooker.protocol.messages import Vram
from onlooker.tools.prediction import MeasuredFootprint, predict


def footprint(**changes: Any) -> MeasuredFootprint:
    facts: dict[str, Any] = {
        "received_size": (1920, 1080),
        "encoded_size": (1932, 1092),
        "chunk_frames": 4,
        "bytes_per_token": 10,
        "picture_positions": 0,
        "positions_per_second": 0.0,
        "opening_tokens": 5,
        "tokens_per_chunk": 100,
        "opening_positions": 3,
        "positions_per_chunk": 2,
        "chunk_s": 0.5,
        "room": None,
    }
    return MeasuredFootprint(**facts | changes)


def test_as_many_chunks_fit_as_there_are_tokens_for_after_the_opening_words():
    assert predict(footprint(), capacity_tokens=304, fps=8, file_frames=None).num_chunks == 2
    fits = predict(footprint(), capacity_tokens=305, fps=8, file_frames=None)
    assert (fits.num_chunks, fits.num_frames, fits.num_tokens, fits.logical_bytes) == (3, 12, 305, 3050)
    assert (fits.seconds, fits.encode_s, fits.fps, fits.limit) == (1.5, 1.5, 8.0, "memory")


def test_a_file_may_end_before_the_memory_does():
    ends = predict(footprint(), capacity_tokens=1000, fps=None, file_frames=6)
    assert (ends.num_frames, ends.num_chunks, ends.num_tokens, ends.limit) == (6, 2, 205, "file")
    assert ends.seconds is None


def test_positions_may_end_before_the_memory_does():
    ends = predict(footprint(max_positions=9), capacity_tokens=1000, fps=8, file_frames=None)
    assert (ends.num_chunks, ends.limit) == (3, "positions")


def test_a_chunk_that_is_larger_than_the_memory_does_not_fit():
    nothing = predict(footprint(), capacity_tokens=104, fps=8, file_frames=100)
    assert (nothing.num_chunks, nothing.num_tokens, nothing.logical_bytes) == (0, 0, 0)


def test_the_clock_of_an_open_video_uses_positions_up_once_it_has_passed_the_size_of_a_picture():
    took = footprint(positions_per_chunk=0, positions_per_second=2.0, picture_positions=8, max_positions=13)
    ends = predict(took, capacity_tokens=10_000, fps=8, file_frames=None)
    assert (ends.num_chunks, ends.seconds, ends.limit) == (10, 5.0, "positions")
    assert predict(took, capacity_tokens=305, fps=8, file_frames=None).limit == "memory"


def test_a_picture_that_needs_more_positions_than_there_are_does_not_fit():
    took = footprint(positions_per_second=2.0, picture_positions=8, max_positions=10)
    assert predict(took, capacity_tokens=10_000, fps=8, file_frames=None).num_chunks == 0


def test_positions_that_the_clock_uses_up_end_nothing_while_the_rate_is_unknown():
    took = footprint(positions_per_chunk=0, positions_per_second=2.0, max_positions=13)
    assert predict(took, capacity_tokens=10_000, fps=None, file_frames=None).limit == "memory"
    assert seconds_of_positions(took, None) == 5.0
    assert seconds_of_positions(footprint(max_positions=13), None) is None
    assert seconds_of_positions(footprint(max_positions=13), 8.0) == 2.5


def vram(**changes: int) -> Vram:
    known = {"activations_peak_bytes": 50, "total_bytes": 2000, "free_bytes": 700}
    known |= {"torch_allocated_bytes": 100, "torch_reserved_bytes": 400} | changes
    return Vram(device="cuda:0", weights_bytes=80, kv_bytes=20, **known)


def test_the_room_is_what_is_free_less_the_workspace_and_a_margin():
    room = room_of(vram())
    assert room is not None
    assert (room.free_bytes, room.num_bytes) == (700 + 400 - 100, 1000 - 50 - 100)
    tight = room_of(vram(free_bytes=0, torch_reserved_bytes=100))
    assert tight is not None and tight.num_bytes == 0


def test_the_room_is_unknown_where_a_part_of_it_is():
    assert room_of(Vram(device="cpu", weights_bytes=80, kv_bytes=20)) is None
