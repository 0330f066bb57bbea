import struct
from pathlib import Path

import numpy as np
import pytest
from clips import HEIGHT, WIDTH, number, write_clip, write_pictures

from onlooker.tools.video import ReaderName, Selection, VideoError, open_video, read_video

MS = 1_000_000
READERS = pytest.mark.parametrize("reader", ["av", "cv2"])


def shown(path: Path, selection: Selection | None = None, *, reader: ReaderName = "auto") -> list[tuple[int, int]]:
    """Number and time in ms of each picture read."""
    return [(number(f.pixels), f.media_ns // MS) for f in read_video(str(path), selection, reader=reader)]


@READERS
def test_every_picture_comes_with_its_time(tmp_path: Path, reader: ReaderName) -> None:
    clip = write_clip(tmp_path / "clip.mp4", 12, fps=10)
    assert shown(clip, reader=reader) == [(n, 100 * n) for n in range(12)]


@READERS
def test_times_are_exact_where_the_rate_varies(tmp_path: Path, reader: ReaderName) -> None:
    times = [0, 40, 80, 500, 510, 1000, 2500]
    clip = write_clip(tmp_path / "clip.mp4", times_ms=times)
    assert shown(clip, reader=reader) == list(enumerate(times))


@READERS
def test_a_stream_without_times_gets_them_from_its_rate(tmp_path: Path, reader: ReaderName) -> None:
    clip = write_clip(tmp_path / "clip.h264", 6, codec="libx264")
    times = [time for _, time in shown(clip, reader=reader)]
    assert times == [n * times[1] for n in range(6)]
    assert times[1] > 0


@READERS
def test_pixels_are_rgb_rows_of_bytes(tmp_path: Path, reader: ReaderName) -> None:
    frame = next(read_video(str(write_clip(tmp_path / "clip.mp4", 2)), reader=reader))
    assert frame.pixels.shape == (HEIGHT, WIDTH, 3)
    assert frame.pixels.dtype == np.uint8
    assert frame.pixels.flags.c_contiguous


@READERS
def test_a_span_begins_and_ends_between_key_frames(tmp_path: Path, reader: ReaderName) -> None:
    clip = write_clip(tmp_path / "clip.mp4", 20, codec="libx264")
    assert shown(clip, Selection(start_s=0.95, duration_s=0.4), reader=reader) == [
        (10, 1000),
        (11, 1100),
        (12, 1200),
        (13, 1300),
    ]


def test_stride_takes_every_nth_picture_from_the_start_offset_on(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", 12)
    assert [n for n, _ in shown(clip, Selection(start_s=0.2, stride=4))] == [2, 6, 10]


def test_fps_thins_by_time_not_by_count(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", times_ms=[0, 10, 20, 500, 510, 1700, 1990, 2000])
    assert [time for _, time in shown(clip, Selection(fps=2))] == [0, 500, 1700, 2000]


def test_fps_equal_to_the_rate_keeps_all_although_times_are_rounded(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mkv", 12, fps=30)
    assert len(shown(clip, Selection(fps=30))) == 12


def test_stride_comes_before_fps(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", 20)
    assert [n for n, _ in shown(clip, Selection(start_s=0.2, stride=3, fps=2))] == [2, 8, 14, 17]


@READERS
def test_a_sideways_recording_is_turned_upright(tmp_path: Path, reader: ReaderName) -> None:
    clip = write_clip(tmp_path / "clip.mp4", 2)
    _turn(clip)
    frame = next(read_video(str(clip), reader=reader))
    assert frame.pixels.shape == (WIDTH, HEIGHT, 3)


def test_both_readers_turn_a_recording_the_same_way(tmp_path: Path) -> None:
    row = np.linspace(0, 255, WIDTH, dtype=np.uint8)  # dark on the left, bright on the right
    gradient = np.ascontiguousarray(np.broadcast_to(row[None, :, None], (HEIGHT, WIDTH, 3)))
    clip = write_pictures(tmp_path / "clip.mp4", [gradient] * 2, [0, 100])
    _turn(clip)
    by_av, by_cv2 = (next(read_video(str(clip), reader=reader)).pixels for reader in ("av", "cv2"))
    assert np.abs(by_av.astype(int) - by_cv2.astype(int)).max() < 16


@READERS
def test_a_missing_file_is_said_to_be_missing(tmp_path: Path, reader: ReaderName) -> None:
    with pytest.raises(VideoError, match="no such file"):
        open_video(str(tmp_path / "none.mp4"), reader=reader)


def test_a_folder_is_said_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="folder"):
        open_video(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"not a video", b"\x00" * 4096], ids=["empty", "text", "zeros"])
def test_a_file_that_is_no_video_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    with pytest.raises(VideoError, match=r"clip\.mp4"):
        open_video(str(path))


def test_a_file_with_sound_alone_has_no_video_stream(tmp_path: Path) -> None:
    path = tmp_path / "tone.wav"
    path.write_bytes(_wav())
    with pytest.raises(VideoError, match="no video stream"):
        open_video(str(path))


def test_a_file_cut_short_gives_the_pictures_before_the_cut(tmp_path: Path) -> None:
    whole = write_clip(tmp_path / "whole.mkv", 20).read_bytes()
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole[: len(whole) * 2 // 3])
    numbers = [n for n, _ in shown(cut)]
    assert 5 < len(numbers) < 20
    assert numbers == list(range(len(numbers)))


def test_an_unreachable_address_is_an_error_with_a_reason() -> None:
    with pytest.raises(VideoError, match="refused"):
        open_video("http://127.0.0.1:9/none.mjpeg", reader="av")


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"start_s": -1}, "start offset"),
        ({"duration_s": 0}, "duration"),
        ({"stride": 0}, "stride"),
        ({"fps": 0}, "fps"),
    ],
)
def test_a_selection_that_cannot_work_names_its_field(settings: dict[str, float], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        Selection(**settings)  # pyright: ignore[reportArgumentType]


def _turn(clip: Path) -> None:
    """Write a quarter turn into the track header, as phones do."""
    content = clip.read_bytes()
    matrix = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    at = content.index(matrix, content.index(b"tkhd"))
    clip.write_bytes(content[:at] + turned + content[at + len(matrix) :])


def _wav() -> bytes:
    samples = b"\x00\x00" * 800
    head = struct.pack("<4sI4s4sIHHIIHH", b"RIFF", 36 + len(samples), b"WAVE", b"fmt ", 16, 1, 1, 8000, 16000, 2, 16)
    return head + struct.pack("<4sI", b"data", len(samples)) + samples
