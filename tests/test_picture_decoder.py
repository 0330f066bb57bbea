import resource
import struct
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onlooker.node.picture_decoder import (
    MAX_HEADER_BYTES,
    MAX_JPEG_SEGMENTS,
    MAX_PNG_CHUNKS,
    PictureError,
    _read_rgb,
    decode_picture,
    decoded_bytes,
    stored_size,
)
from onlooker.protocol.messages import FrameHeader

RED = (255, 0, 0)


def plain(rgb: tuple[int, int, int], width: int = 48, height: int = 32) -> np.ndarray:
    return np.full((height, width, 3), rgb, np.uint8)


def header(enc: str, **fields) -> FrameHeader:
    return FrameHeader(session="s", stream="front", ts=0, enc=enc, **fields)


def encoded(pixels: np.ndarray, enc: str) -> bytes:
    """What a camera would send of RGB `pixels`."""
    bgr = pixels[:, :, ::-1]
    match enc:
        case "jpeg":
            return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
        case "png":
            return cv2.imencode(".png", bgr)[1].tobytes()
        case "bgr8":
            return bgr.tobytes()
        case "mono8":
            return pixels[:, :, 0].tobytes()
        case _:
            return pixels.tobytes()


def reason(enc: str, payload: bytes, **fields) -> str:
    with pytest.raises(PictureError) as refused:
        decode_picture(header(enc, **fields), payload)
    return refused.value.reason


JPEG = encoded(plain(RED, 16, 16), "jpeg")
PNG = encoded(plain(RED, 16, 16), "png")


@pytest.mark.parametrize("enc", ["jpeg", "png", "rgb8", "bgr8"])
@pytest.mark.parametrize("rgb", [RED, (0, 255, 0), (0, 0, 255)])
def test_a_colour_is_that_colour_in_every_encoding(enc, rgb):
    pixels = decode_picture(header(enc, w=48, h=32), encoded(plain(rgb), enc))
    assert np.abs(pixels.astype(int) - rgb).max() <= 2
    assert (pixels.shape, pixels.dtype, pixels.flags.c_contiguous) == ((32, 48, 3), np.uint8, True)


def test_mono_is_grey():
    payload = bytes(range(200)) * 2
    pixels = decode_picture(header("mono8", w=20, h=20), payload)
    assert (pixels == np.frombuffer(payload, np.uint8).reshape(20, 20, 1)).all()


@pytest.mark.parametrize("enc", ["png", "rgb8", "bgr8"])
def test_lossless_encodings_give_every_pixel_back(enc):
    pixels = np.random.default_rng(0).integers(0, 256, (7, 5, 3), np.uint8)
    assert (decode_picture(header(enc, w=5, h=7), encoded(pixels, enc)) == pixels).all()


@pytest.mark.parametrize(("enc", "channels"), [("rgb8", 3), ("bgr8", 3), ("mono8", 1)])
def test_padding_at_the_end_of_raw_rows_is_left_out(enc, channels):
    pixels = plain(RED, width=5, height=4)
    rows = np.frombuffer(encoded(pixels, enc), np.uint8).reshape(4, 5 * channels)
    payload = np.pad(rows, ((0, 0), (0, 7)), constant_values=9).tobytes()
    decoded = decode_picture(header(enc, w=5, h=4, step=5 * channels + 7), payload)
    assert (decoded == (pixels if channels == 3 else 255)).all()


def test_the_pixels_are_not_the_messages_memory():
    payload = bytearray(encoded(plain(RED), "rgb8"))
    pixels = decode_picture(header("rgb8", w=48, h=32), payload)
    payload[:] = bytes(len(payload))
    assert (pixels == RED).all() and pixels.flags.writeable


def test_colours_are_right_without_the_rgb_flag_of_newer_opencv():
    data = np.frombuffer(encoded(plain(RED), "png"), np.uint8)
    assert (_read_rgb(data, rgb_flag=None) == RED).all()


def test_pixels_come_as_stored_whatever_exif_says():
    jpeg = encoded(plain(RED), "jpeg")
    # One IFD entry: Orientation (0x0112) SHORT 6, turned by 90 degrees.
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    turned = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]
    assert decode_picture(header("jpeg", w=48, h=32), turned).shape == (32, 48, 3)


@pytest.mark.parametrize("enc", ["jpeg", "png"])
def test_a_header_that_lies_about_the_size_is_a_bad_size(enc):
    payload = encoded(plain(RED), enc)
    assert reason(enc, payload, w=49, h=32) == "bad_size"
    assert reason(enc, payload, h=33) == "bad_size"


@pytest.mark.parametrize("fields", [{}, {"w": 2}, {"w": 2, "h": 3}, {"w": 2, "h": 2, "step": 5}, {"w": -2, "h": -2}])
def test_raw_bytes_that_are_not_the_stated_rows_are_a_bad_size(fields):
    assert reason("rgb8", bytes(12), **fields) == "bad_size"


def test_a_picture_that_would_take_too_much_memory_is_not_decoded():
    png = bytearray(encoded(plain(RED), "png"))
    png[16:24] = struct.pack(">II", 8193, 8192)
    assert reason("png", bytes(png)) == "too_large"
    jpeg = bytearray(encoded(plain(RED), "jpeg"))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = struct.pack(">HH", 65535, 65535)
    assert reason("jpeg", bytes(jpeg)) == "too_large"
    assert reason("mono8", b"", w=8193, h=8192) == "too_large"


def test_how_many_pixels_are_too_many_is_the_callers_choice():
    payload = encoded(plain(RED), "png")
    assert decode_picture(header("png"), payload, max_pixels=48 * 32).shape == (32, 48, 3)
    for enc in ("jpeg", "png", "rgb8"):
        with pytest.raises(PictureError, match="48x32 is more than 1535 pixels"):
            decode_picture(header(enc, w=48, h=32), encoded(plain(RED), enc), max_pixels=48 * 32 - 1)


def with_header(num_bytes: int) -> bytes:
    """A JPEG that states its size only after `num_bytes` of fill."""
    return JPEG[:2] + b"\xff" * num_bytes + JPEG[2:]


def test_fill_bytes_before_a_marker_mean_nothing():
    assert decode_picture(header("jpeg"), with_header(1000)).shape == (16, 16, 3)


def test_a_jpeg_that_states_no_size_in_its_first_mebibyte_has_none():
    at = JPEG.index(b"\xff\xc0")
    assert stored_size(with_header(MAX_HEADER_BYTES - at - 9), "jpeg") == (16, 16)
    assert reason("jpeg", with_header(MAX_HEADER_BYTES - at - 8)) == "decode_error"


class Looked(bytes):
    """Bytes that remember the largest part of them that was asked for."""

    most = 0

    def __getitem__(self, key):
        part = super().__getitem__(key)
        self.most = max(self.most, len(part)) if isinstance(key, slice) else len(self)
        return part


@pytest.mark.parametrize("enc", ["jpeg", "png"])
def test_no_more_than_the_first_mebibyte_is_searched_for_a_size(enc):
    payload = Looked(JPEG[:2] + b"\xff" * (2 * MAX_HEADER_BYTES))
    with pytest.raises(PictureError):
        stored_size(payload, enc)
    assert payload.most == MAX_HEADER_BYTES


def test_a_jpeg_of_too_many_segments_is_a_decode_error():
    def of(num_segments: int) -> bytes:
        return JPEG[:2] + b"\xff\xfe\0\2" * num_segments + JPEG[2:]

    at = JPEG.index(b"\xff\xc0")
    num_own = JPEG.count(b"\xff\xe0", 0, at) + JPEG.count(b"\xff\xdb", 0, at) + 1
    assert stored_size(of(MAX_JPEG_SEGMENTS - num_own), "jpeg") == (16, 16)
    assert reason("jpeg", of(MAX_JPEG_SEGMENTS)) == "decode_error"


def test_a_png_of_too_many_chunks_is_a_decode_error():
    def of(num_chunks: int) -> bytes:
        empty = struct.pack(">I4s", 0, b"teXt") + struct.pack(">I", zlib.crc32(b"teXt"))
        return PNG[:33] + empty * num_chunks + PNG[33:]  # after the signature and IHDR

    assert decode_picture(header("png"), of(100)).shape == (16, 16, 3)
    assert reason("png", of(MAX_PNG_CHUNKS)) == "decode_error"


@pytest.mark.parametrize("enc", ["jpeg", "png", "rgb8", "mono8"])
def test_the_memory_of_a_picture_is_known_before_it_is_decoded(enc):
    payload = encoded(plain(RED), enc)
    assert decoded_bytes(header(enc, w=48, h=32), payload) == 48 * 32 * 3
    assert decoded_bytes(header(enc, w=48, h=32), memoryview(payload)) == 48 * 32 * 3


@pytest.mark.parametrize("enc", ["jpeg", "png", "rgb8"])
def test_what_cannot_be_decoded_takes_no_memory(enc):
    assert decoded_bytes(header(enc), b"x") == 0


def test_a_png_chunk_that_claims_gigabytes_is_not_believed():
    png = bytearray(encoded(plain(RED), "png"))
    at = png.index(b"IDAT") - 4
    png[at : at + 4] = struct.pack(">I", 0xA7000000)
    started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert reason("png", bytes(png)) == "decode_error"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - started < 100 << 10  # KiB


@pytest.mark.parametrize("enc", ["jpeg", "png"])
def test_a_picture_that_was_cut_off_is_a_decode_error(enc):
    payload = encoded(np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8), enc)
    for num_bytes in (0, 1, 8, 24, len(payload) // 2, len(payload) - 12):
        assert reason(enc, payload[:num_bytes]) == "decode_error"


def test_the_end_of_a_thumbnail_is_not_the_end_of_the_picture():
    jpeg = encoded(plain(RED), "jpeg")
    thumbnail = b"\xff\xe1" + struct.pack(">H", len(jpeg) + 2) + jpeg
    whole = jpeg[:2] + thumbnail + jpeg[2:]
    assert decode_picture(header("jpeg"), whole).shape == (32, 48, 3)
    assert reason("jpeg", whole[:-200]) == "decode_error"


def test_an_unknown_encoding_is_said_to_be_one():
    assert reason("h264", b"\0\0\0\1") == "unsupported_encoding"


@given(st.sampled_from(["jpeg", "png", "rgb8"]), st.sampled_from([JPEG, PNG, b""]), st.data())
def test_whatever_the_bytes_are_it_is_pixels_or_a_reason(enc: str, start: bytes, data):
    garbage = bytearray(start + data.draw(st.binary(max_size=64)))
    for at, byte in data.draw(st.lists(st.tuples(st.integers(0, 800), st.integers(0, 255)), max_size=8)):
        if at < len(garbage):
            garbage[at] = byte
    try:
        pixels = decode_picture(header(enc, w=16, h=16), bytes(garbage))
    except PictureError as error:
        assert error.reason in ("decode_error", "bad_size", "too_large")
    else:
        assert pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8
