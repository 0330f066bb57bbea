"""JPEG, PNG and raw payloads to RGB pixels."""

import struct
from typing import Any

import cv2
import numpy as np
from msgspec import UNSET

from ..protocol.codec import Buffer
from ..protocol.messages import COMPRESSED_ENCODINGS, RAW_CHANNELS, FrameHeader

MAX_PIXELS = 8192 * 8192

# Since OpenCV 4.11; before it, the channels must be swapped afterwards.
RGB_FLAG: int | None = getattr(cv2, "IMREAD_COLOR_RGB", None)

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_CHUNK = struct.Struct(">I4s")  # length, type; then the data and 4 bytes of checksum
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


def decode_picture(header: FrameHeader, payload: Buffer) -> np.ndarray:
    """Decode a frame's payload to RGB pixels.

    Returns uint8, (height, width, 3), C-contiguous, in memory of its own. The size is read from the payload's own
    header and checked before any memory is reserved. Pixels come as they are stored: an orientation in EXIF is
    not applied, so that the size is the stated one. Raises PictureError.
    """
    data = np.frombuffer(payload, np.uint8)
    if header.enc in COMPRESSED_ENCODINGS:
        return _decode_compressed(header, bytes(payload), data)
    if header.enc in RAW_CHANNELS:
        return _decode_raw(header, data)
    raise PictureError("unsupported_encoding", f"encoding {header.enc[:32]!r} is not supported")


def _decode_compressed(header: FrameHeader, payload: bytes, data: np.ndarray) -> np.ndarray:
    width, height = stored_size(payload, header.enc)
    _check_num_pixels(width, height)
    if (_stated(header.w, width), _stated(header.h, height)) != (width, height):
        raise PictureError("bad_size", f"the header says {header.w}x{header.h}, the picture is {width}x{height}")
    pixels = _read_rgb(data, RGB_FLAG)
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


def _decode_raw(header: FrameHeader, data: np.ndarray) -> np.ndarray:
    if header.w is UNSET or header.h is UNSET or min(header.w, header.h) < 1:
        raise PictureError("bad_size", f"{header.enc} needs w and h")
    _check_num_pixels(header.w, header.h)
    row_bytes = header.w * RAW_CHANNELS[header.enc]
    step = _stated(header.step, row_bytes)
    if step < row_bytes or data.size != step * header.h:
        raise PictureError("bad_size", f"{data.size} bytes are not {header.h} rows of {step} bytes")
    pixels = data.reshape(header.h, step)[:, :row_bytes].reshape(header.h, header.w, -1)
    return pixels.copy() if header.enc == "rgb8" else cv2.cvtColor(np.ascontiguousarray(pixels), _TO_RGB[header.enc])


def _stated(value: int | object, default: int) -> int:
    return value if isinstance(value, int) else default


def _check_num_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise PictureError("too_large", f"{width}x{height} is more than {MAX_PIXELS} pixels")


def stored_size(payload: bytes, enc: str) -> tuple[int, int]:
    """Width and height that a JPEG or PNG states of itself. Raises PictureError `decode_error` if it states none."""
    size = _png_size(payload) if enc == "png" else _jpeg_size(payload)
    if size is None or min(size) < 1:
        raise PictureError("decode_error", f"this is no whole {enc.upper()}")
    return size


def _png_size(payload: bytes) -> tuple[int, int] | None:
    if not payload.startswith(_PNG_SIGNATURE) or payload[12:16] != b"IHDR" or not _has_all_chunks(payload):
        return None
    return struct.unpack(">II", payload[16:24])


def _has_all_chunks(payload: bytes) -> bool:
    """Whether every PNG chunk is as long as it says, up to the end of the picture.

    OpenCV reserves the length that a chunk states before it looks for its bytes: up to 4 GiB for a forged one.
    """
    at = len(_PNG_SIGNATURE)
    while at + _PNG_CHUNK.size <= len(payload):
        num_bytes, kind = _PNG_CHUNK.unpack_from(payload, at)
        at += _PNG_CHUNK.size + num_bytes + 4
        if kind == b"IEND":
            return at <= len(payload)
    return False


def _jpeg_size(payload: bytes) -> tuple[int, int] | None:
    if not payload.startswith(b"\xff\xd8"):
        return None
    at = 2
    while at + 9 <= len(payload) and payload[at] == 0xFF:
        marker = payload[at + 1]
        if marker in _JPEG_SIZE_MARKERS:
            # Some versions of OpenCV fill the rest of a picture that was cut off with grey and call it whole.
            is_whole = payload.rfind(_JPEG_END, at) != -1
            height, width = struct.unpack(">HH", payload[at + 5 : at + 9])
            return (width, height) if is_whole else None
        has_length = marker not in (0xFF, 0x01)  # fill byte, TEM
        at += 2 + struct.unpack(">H", payload[at + 2 : at + 4])[0] if has_length else (1 if marker == 0xFF else 2)
    return None
