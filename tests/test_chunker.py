import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onlooker.node.chunk import CHUNK_FRAMES, Chunk, Picture
from onlooker.node.chunker import FrameChunker


def picture(seq: int, width: int = 4) -> Picture:
    return Picture(np.zeros((2, width, 3), np.uint8), seq, seq, "capture", seq)


def seqs(chunks: list[Chunk]) -> list[list[int]]:
    return [[picture.seq for picture in chunk.pictures] for chunk in chunks]


def chunks_of(chunker: FrameChunker, pictures: list[Picture]) -> list[Chunk]:
    return [chunk for picture in pictures for chunk in chunker.add(picture)]


@pytest.mark.parametrize("chunk_frames", CHUNK_FRAMES)
def test_a_chunk_is_made_of_as_many_pictures_as_asked_for(chunk_frames):
    chunks = chunks_of(FrameChunker(chunk_frames), [picture(n) for n in range(24)])
    assert [len(chunk.pictures) for chunk in chunks] == [chunk_frames] * (24 // chunk_frames)
    assert [seq for chunk in seqs(chunks) for seq in chunk] == list(range(24))


def test_an_odd_rest_is_padded_with_its_last_picture_at_the_end():
    chunker = FrameChunker(4)
    chunks_of(chunker, [picture(n) for n in range(3)])
    (chunk,) = chunker.flush()
    assert seqs([chunk]) == [[0, 1, 2, 2]]
    assert (chunk.num_padded, chunk.num_frames, len(chunker)) == (1, 3, 0)


def test_an_even_rest_is_a_shorter_chunk_without_padding():
    chunker = FrameChunker(6)
    chunks_of(chunker, [picture(n) for n in range(2)])
    (chunk,) = chunker.flush()
    assert seqs([chunk]) == [[0, 1]]
    assert chunk.num_padded == 0


def test_an_empty_rest_is_no_chunk():
    assert FrameChunker(4).flush() == []


def test_another_size_begins_another_chunk():
    chunker = FrameChunker(2)
    chunks = chunks_of(chunker, [picture(0), picture(1, width=8), picture(2, width=8), picture(3)])
    assert seqs(chunks) == [[0, 0], [1, 2]]
    assert [chunk.size for chunk in chunks] == [(4, 2), (8, 2)]
    assert [chunk.num_padded for chunk in chunks] == [1, 0]


def test_image_mode_is_never_padded():
    chunks = chunks_of(FrameChunker(1), [picture(0), picture(1, width=8)])
    assert [(len(chunk.pictures), chunk.num_padded) for chunk in chunks] == [(1, 0), (1, 0)]


def test_clear_returns_what_is_discarded():
    chunker = FrameChunker(4)
    chunks_of(chunker, [picture(0), picture(1)])
    assert [picture.seq for picture in chunker.clear()] == [0, 1]
    assert chunker.flush() == []


def test_the_time_to_decode_a_chunk_is_the_sum_over_its_pictures():
    chunker = FrameChunker(2)
    chunker.add(picture(0), decode_ms=1.5)
    (chunk,) = chunker.add(picture(1), decode_ms=2.0)
    assert chunk.decode_ms == 3.5
    assert chunker.add(picture(2), decode_ms=1.0) == [] and chunker.flush()[0].decode_ms == 1.0


@given(st.sampled_from(CHUNK_FRAMES), st.lists(st.sampled_from([4, 8]), max_size=40))
def test_every_picture_comes_out_once_in_order(chunk_frames: int, widths: list[int]):
    chunker = FrameChunker(chunk_frames)
    chunks = chunks_of(chunker, [picture(n, width) for n, width in enumerate(widths)]) + chunker.flush()
    real = [picture.seq for chunk in chunks for picture in chunk.pictures[: chunk.num_frames]]
    assert real == list(range(len(widths)))
    assert all(len(chunk.pictures) <= chunk_frames for chunk in chunks)
