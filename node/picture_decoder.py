"""JPEG, PNG and raw payloads to RGB pixels."""

import re
import struct
from typing import Any

import cv2
import numpy as np
from msgspec import UNSET

from ..protocol.codec import Buffer
from ..protocol.messages import COMPRESSED_ENCODINGS, RAW_CHANNELS, FrameHeader

MAX_PIXELS = 8192 * 8192
# Headers are walked in Python, where nothing else runs meanwhile: what a payload may cost there has a bound.
MAX_HEADER_BYTES = 1 << 20  # of a JPEG, up to its size
MAX_JPEG_SEGMENTS = 4096
MAX_PNG_CHUNKS = 1 << 14  # twice what the largest message holds at the 8 KiB of common encoders

# Since OpenCV 4.11; before it, the channels must be swapped afterwards.
RGB_FLAG: int | None = getattr(cv2, "IMREAD_COLOR_RGB", None)

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_CHUNK = struct.Struct(">I4s")  # length, type; then the data and 4 bytes of checksum
_JPEG_MARKER = re.compile(rb"\xff+([^\xff])")  # any number of fill bytes may precede a marker
_JPEG_END = b"\xff\xd9"
_TO_RGB = {"bgr8": cv2.COLOR_BGR2RGB, "mono8": cv2.COLOR_GRAY2RGB}
# SOF0 to SOF15 hold the picture's size; C4, C8 and CC in that range are other segments.
_JPEG_SIZE_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


class PictureError(Exception):
    """A payload that is no picture we take.

    `reason` is `decode_error`, `too_large`, `bad_size` or `unsupported_encoding`.
    """

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(message)


def silence_opencv() -> None:
    """Keep OpenCV from writing a line to standard error for each broken picture: they are counted instead."""
    logging: Any = getattr(cv2.utils, "logging", cv2)  # OpenCV 4 has it at the top
    logging.setLogLevel(0)


def decode_picture(header: FrameHeader, payload: Buffer, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode a frame's payload to RGB pixels, at most `max_pixels` of them.

    Returns uint8, (height, width, 3), C-contiguous, in memory of its own. The size is read from the payload's own
    header and checked before any memory is reserved. Pixels come as they are stored: an orientation in EXIF is
    not applied, so that the size is the stated one. Raises PictureError.
    """
    if header.enc in COMPRESSED_ENCODINGS:
        return _decode_compressed(header, bytes(payload), max_pixels)
    if header.enc in RAW_CHANNELS:
        return _decode_raw(header, np.frombuffer(payload, np.uint8), max_pixels)
    raise PictureError("unsupported_encoding", f"encoding {header.enc[:32]!r} is not supported")


def decoded_bytes(header: FrameHeader, payload: Buffer) -> int:
    """Memory that a frame's pixels would take, as it states itself; 0 for one that cannot be decoded."""
    is_compressed = header.enc in COMPRESSED_ENCODINGS
    try:
        width, height = stored_size(payload, header.enc) if is_compressed else _raw_size(header)
    except PictureError:
        return 0
    return 3 * width * height


def _decode_compressed(header: FrameHeader, payload: bytes, max_pixels: int) -> np.ndarray:
    width, height = stored_size(payload, header.enc)
    _check_num_pixels(width, height, max_pixels)
    if not (_has_all_chunks(payload) if header.enc == "png" else _has_end(payload)):
        raise PictureError("decode_error", f"this is no whole {header.enc.upper()}")
    if (_stated(header.w, width), _stated(header.h, height)) != (width, height):
        raise PictureError("bad_size", f"the header says {header.w}x{header.h}, the picture is {width}x{height}")
    pixels = _read_rgb(np.frombuffer(payload, np.uint8), RGB_FLAG)
    if pixels.shape != (height, width, 3):
        raise PictureError("decode_error", f"a {width}x{height} picture decoded to {pixels.shape}")
    return pixels


def _read_rgb(data: np.ndarray, rgb_flag: int | None) -> np.ndarray:
    flags = cv2.IMREAD_IGNORE_ORIENTATION | (cv2.IMREAD_COLOR if rgb_flag is None else rgb_flag)
    try:
        pixels = cv2.imdecode(data, flags)
    except cv2.error as error:
        raise PictureError("decode_error", str(error)) from error
    if pixels is None:
        raise PictureError("decode_error", "the picture cannot be decoded")
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB) if rgb_flag is None else pixels


def _decode_raw(header: FrameHeader, data: np.ndarray, max_pixels: int) -> np.ndarray:
    width, height = _raw_size(header)
    _check_num_pixels(width, height, max_pixels)
    row_bytes = width * RAW_CHANNELS[header.enc]
    step = _stated(header.step, row_bytes)
    if step < row_bytes or data.size != step * height:
        raise PictureError("bad_size", f"{data.size} bytes are not {height} rows of {step} bytes")
    pixels = data.reshape(height, step)[:, :row_bytes].reshape(height, width, -1)
    return pixels.copy() if header.enc == "rgb8" else cv2.cvtColor(np.ascontiguousarray(pixels), _TO_RGB[header.enc])


def _raw_size(header: FrameHeader) -> tuple[int, int]:
    if header.w is UNSET or header.h is UNSET or min(header.w, header.h) < 1:
        raise PictureError("bad_size", f"{header.enc} needs w and h")
    return header.w, header.h


def _stated(value: int | object, default: int) -> int:
    return value if isinstance(value, int) else default


def _check_num_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise PictureError("too_large", f"{width}x{height} is more than {max_pixels} pixels")


def stored_size(payload: Buffer, enc: str) -> tuple[int, int]:
    """Width and height that a JPEG or PNG states of itself. Raises PictureError `decode_error` if it states none.

    Nothing beyond the first `MAX_HEADER_BYTES` is looked at.
    """
    head = bytes(payload[:MAX_HEADER_BYTES])
    size = _png_size(head) if enc == "png" else _jpeg_size(head)
    if size is None or min(size) < 1:
        raise PictureError("decode_error", f"this is no {enc.upper()} with a size")
    return size


def _png_size(head: bytes) -> tuple[int, int] | None:
    if not head.startswith(_PNG_SIGNATURE) or head[12:16] != b"IHDR" or len(head) < 24:
        return None
    return struct.unpack_from(">II", head, 16)


def _has_all_chunks(payload: bytes) -> bool:
    """Whether every PNG chunk is as long as it says, up to the end of the picture.

    OpenCV reserves the length that a chunk states before it looks for its bytes: up to 4 GiB for a forged one.
    """
    at = len(_PNG_SIGNATURE)
    for _ in range(MAX_PNG_CHUNKS):
        if at + _PNG_CHUNK.size > len(payload):
            return False
        num_bytes, kind = _PNG_CHUNK.unpack_from(payload, at)
        at += _PNG_CHUNK.size + num_bytes + 4
        if kind == b"IEND":
            return at <= len(payload)
    return False


def _jpeg_size(head: bytes) -> tuple[int, int] | None:
    at = _jpeg_size_at(head)
    if at is None:
        return None
    height, width = struct.unpack_from(">HH", head, at)
    return width, height


def _jpeg_size_at(head: bytes) -> int | None:
    """Where a JPEG states its height and width, if it does."""
    if not head.startswith(b"\xff\xd8"):
        return None
    at = 2
    for _ in range(MAX_JPEG_SEGMENTS):
        found = _JPEG_MARKER.match(head, at)
        if found is None or found.end() + 7 > len(head):
            return None
        at = found.end()
        marker = head[at - 1]
        if marker in _JPEG_SIZE_MARKERS:
            return at + 3  # length and bits per sample come first
        if marker != 0x01:  # TEM has no length
            at += struct.unpack_from(">H", head, at)[0]
    return None


def _has_end(payload: bytes) -> bool:
    """Whether a JPEG ends after it stated its size; a thumbnail before that has an end of its own.

    Some versions of OpenCV fill the rest of a picture that was cut off with grey and call it whole.
    """
    at = _jpeg_size_at(payload[:MAX_HEADER_BYTES])
    return at is not None and payload.rfind(_JPEG_END, at) != -1
