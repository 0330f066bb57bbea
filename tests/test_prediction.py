from typing import Any

import pytest

from onlooker.tools.prediction import Footprint, predict


def footprint(**changes: Any) -> Footprint:
    facts: dict[str, Any] = {
        "received_size": (1920, 1080),
        "encoded_size": (1932, 1092),
        "chunk_frames": 4,
        "bytes_per_token": 10,
        "opening_tokens": 5,
        "tokens_per_chunk": 100,
        "opening_positions": 3,
        "positions_per_chunk": 2,
        "max_positions": None,
        "chunk_s": 0.5,
        "workspace_bytes": 50,
        "free_bytes": 1000,
        "total_bytes": 2000,
    }
    return Footprint(**facts | changes)


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


def test_the_room_is_what_is_free_less_the_workspace_and_a_margin():
    assert footprint().room_bytes == 1000 - 50 - 100


@pytest.mark.parametrize("unknown", ["free_bytes", "workspace_bytes", "total_bytes"])
def test_the_room_is_unknown_where_a_part_of_it_is(unknown: str):
    assert footprint(**{unknown: None}).room_bytes is None
