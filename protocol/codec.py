"""Bytes to messages and back. Whatever bytes arrive, decoding returns a message or raises DecodeError."""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeVar, cast

import msgspec

from .errors import DecodeError, DropReason, ErrorCode, NodeError
from .messages import (
    ENCODINGS,
    NAME_PATTERN,
    PROTOCOL_VERSION,
    RAW_CHANNELS,
    Event,
    Failure,
    FrameHeader,
    Hello,
    NodeStats,
    Reply,
    Request,
    RequestId,
    StreamStats,
    or_unset,
)

MAX_HEADER_BYTES = 64 << 10
MAX_TOPIC_BYTES = 200
MAX_SIDE_PIXELS = 16384

Buffer = bytes | bytearray | memoryview
T = TypeVar("T")

_SEGMENT = re.compile(NAME_PATTERN)
_PATH = re.compile(r" - at `\$([^`]*)`\Z")
_TELEMETRY_TYPES: dict[str, type[msgspec.Struct]] = {
    "hello": Hello,
    "stats": NodeStats,
    "stream": StreamStats,
    "event": Event,
}


class _Versioned(msgspec.Struct):
    v: int


class _Identified(msgspec.Struct):
    id: RequestId


def encode(message: msgspec.Struct) -> bytes:
    """Encode a message as a MessagePack map."""
    return msgspec.msgpack.encode(message)


def decode(kind: type[T], raw: Buffer) -> T:
    """Decode `raw` as `kind`. Raises DecodeError; `details["path"]` says where, if a field is to blame."""
    return _decode(kind, raw, root="$")


def _decode(kind: type[T], raw: Buffer | msgspec.Raw, root: str) -> T:
    try:
        return msgspec.msgpack.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _decode_error(str(error), root) from error


def _decode_error(message: str, root: str) -> DecodeError:
    """Say where in a message decoding failed, counting from `root`."""
    match = _PATH.search(message)
    if not match and root == "$":
        return DecodeError(message)
    path = root + (match[1] if match else "")
    return DecodeError(f"{message[: match.start()] if match else message} - at `{path}`", path=path)


def _check_version(raw: Buffer) -> None:
    version = decode(_Versioned, raw).v
    if version != PROTOCOL_VERSION:
        raise _unsupported(version)


def _unsupported(version: int) -> DecodeError:
    return DecodeError(
        f"version {version} is not supported", ErrorCode.UNSUPPORTED_VERSION, supported=[PROTOCOL_VERSION]
    )


def check_stream_name(name: str) -> str:
    """Return `name` if it can be a segment of a topic; raise DecodeError otherwise."""
    if not _SEGMENT.fullmatch(name):
        raise DecodeError(f"a name has 1 to 64 characters of A-Z a-z 0-9 . _ -, got {name[:80]!r}")
    return name


def frame_topic(stream: str) -> bytes:
    """The topic of a stream's frames. It ends with a slash, or `cam1` would also match `cam10`."""
    return f"frame/{check_stream_name(stream)}/".encode()


def telemetry_topic(kind: str, node: str, stream: str | None = None) -> bytes:
    """The topic of a kind of telemetry of one node, and of one stream of it."""
    segments = [kind, node] if stream is None else [kind, node, stream]
    return "".join(f"{check_stream_name(segment)}/" for segment in segments).encode()


def _decode_topic(raw: Buffer) -> str:
    if len(raw) > MAX_TOPIC_BYTES:
        raise DecodeError(f"a topic has at most {MAX_TOPIC_BYTES} bytes, got {len(raw)}")
    topic = bytes(raw)
    if not topic.isascii() or not topic.endswith(b"/"):
        raise DecodeError(f"a topic is ASCII and ends with a slash, got {topic[:80]!r}")
    return topic.decode("ascii")


def _encode_seq(seq: int) -> bytes:
    return seq.to_bytes(8, "big")


def _decode_seq(raw: Buffer) -> int:
    if len(raw) != 8:
        raise DecodeError(f"a sequence number has 8 bytes, got {len(raw)}")
    return int.from_bytes(raw, "big")


class ReceivedFrame(NamedTuple):
    """A frame message that keeps every rule; `payload` is the buffer that was received, not a copy."""

    header: FrameHeader
    seq: int
    payload: Buffer


def encode_frame(header: FrameHeader, seq: int, payload: Buffer = b"") -> list[Buffer]:
    """Make the parts of a frame message; an end of stream has no payload part."""
    parts: list[Buffer] = [frame_topic(header.stream), _encode_seq(seq), encode(header)]
    return parts if header.eos else [*parts, payload]


def decode_frame(parts: Sequence[Buffer]) -> ReceivedFrame:
    """Check and decode a frame message.

    Raises DecodeError whose `details["reason"]` is the drop reason: `malformed`, `unsupported_version`,
    `unsupported_encoding` or `bad_size`. The payload of a JPEG or PNG is not looked into.
    """
    try:
        frame = _decode_frame(parts)
    except DecodeError as error:
        is_version = error.code is ErrorCode.UNSUPPORTED_VERSION
        error.details["reason"] = DropReason.UNSUPPORTED_VERSION if is_version else DropReason.MALFORMED
        raise
    if not frame.header.eos:
        check_frame(frame.header, len(frame.payload))
    return frame


def _decode_frame(parts: Sequence[Buffer]) -> ReceivedFrame:
    if len(parts) not in (3, 4):
        raise DecodeError(f"a frame has 4 parts, an end of stream 3, got {len(parts)}")
    topic, seq, raw_header = parts[:3]
    if len(raw_header) > MAX_HEADER_BYTES:
        raise DecodeError(f"a frame header has at most {MAX_HEADER_BYTES} bytes, got {len(raw_header)}")
    _check_version(raw_header)
    header = decode(FrameHeader, raw_header)
    if frame_topic(header.stream) != topic:
        raise DecodeError(f"stream {header.stream!r} came under the topic {bytes(topic[:80])!r}")
    if len(parts) != (3 if header.eos else 4):
        raise DecodeError(f"eos is {header.eos} in a message of {len(parts)} parts")
    return ReceivedFrame(header, _decode_seq(seq), b"" if header.eos else parts[3])


def check_frame(header: FrameHeader, num_bytes: int) -> None:
    """Check that a frame's encoding is known and that its sizes agree with a payload of `num_bytes`.

    Raises DecodeError with the reason `unsupported_encoding` or `bad_size`.
    """
    if header.enc not in ENCODINGS:
        raise DecodeError(f"encoding {header.enc[:32]!r} is not supported", reason=DropReason.UNSUPPORTED_ENCODING)
    for name in ("w", "h"):
        side = getattr(header, name)
        if side is not msgspec.UNSET and not 1 <= side <= MAX_SIDE_PIXELS:
            raise DecodeError(f"{name} must be within 1..{MAX_SIDE_PIXELS}, got {side}", reason=DropReason.BAD_SIZE)
    if num_bytes == 0:
        raise DecodeError("the payload is empty", reason=DropReason.BAD_SIZE)
    if header.enc in RAW_CHANNELS:
        _check_raw_size(header, num_bytes)


def _check_raw_size(header: FrameHeader, num_bytes: int) -> None:
    if header.w is msgspec.UNSET or header.h is msgspec.UNSET:
        raise DecodeError(f"{header.enc} needs w and h", reason=DropReason.BAD_SIZE)
    row_bytes = header.w * RAW_CHANNELS[header.enc]
    step = row_bytes if header.step is msgspec.UNSET else header.step
    if step < row_bytes:
        raise DecodeError(f"step {step} is below the {row_bytes} bytes of a row", reason=DropReason.BAD_SIZE)
    if step * header.h != num_bytes:
        expected = f"{step} bytes x {header.h} rows"
        raise DecodeError(f"the payload has {num_bytes} bytes, not {expected}", reason=DropReason.BAD_SIZE)


class TelemetryRecord(NamedTuple):
    """One telemetry message; `record` is None for a kind that this version does not know."""

    topic: str
    seq: int
    kind: str
    record: Hello | NodeStats | StreamStats | Event | None

    @property
    def node(self) -> str:
        return self.topic.split("/")[1]


def encode_telemetry(topic: bytes, seq: int, message: msgspec.Struct) -> list[Buffer]:
    """Make the parts of a telemetry message."""
    return [topic, _encode_seq(seq), encode(message)]


def decode_telemetry(parts: Sequence[Buffer]) -> TelemetryRecord:
    """Decode a telemetry message. Kinds that a newer node may add are let through without their record."""
    if len(parts) < 3:
        raise DecodeError(f"a telemetry message has 3 parts, got {len(parts)}")
    topic = _decode_topic(parts[0])
    seq = _decode_seq(parts[1])
    kind, _, rest = topic.partition("/")
    if not rest:
        raise DecodeError(f"a telemetry topic names its node, got {topic!r}")
    if kind not in _TELEMETRY_TYPES:
        return TelemetryRecord(topic, seq, kind, None)
    _check_version(parts[2])
    record = decode(_TELEMETRY_TYPES[kind], parts[2])
    return TelemetryRecord(topic, seq, kind, cast("Hello | NodeStats | StreamStats | Event", record))


def decode_request(raw: Buffer) -> Request:
    """Decode a request. Raises DecodeError, whose `details["id"]` is the request's id if it can be read.

    The version is looked at first: a request of another version may have any shape beside its `v` and `id`.
    """
    try:
        _check_version(raw)
        request = decode(Request, raw)
        if not _is_map(request.data):
            raise _decode_error("Expected `object`", root="$.data")
    except DecodeError as error:
        error.details.update(_readable_id(raw))
        raise
    return request


def _readable_id(raw: Buffer) -> dict[str, str]:
    try:
        return {"id": decode(_Identified, raw).id}
    except DecodeError:
        return {}


def _is_map(raw: msgspec.Raw) -> bool:
    first = memoryview(raw)[0]
    return 0x80 <= first <= 0x8F or first in (0xDE, 0xDF)


def request_data(request: Request, kind: type[T]) -> T:
    """Decode what a request carries. Raises DecodeError with paths that start at `$.data`."""
    return _decode(kind, request.data, root="$.data")


def ok_reply(request_id: str, data: msgspec.Struct, *, node: str, session: str) -> bytes:
    """Encode the final reply to a request that succeeded."""
    return _reply(request_id, "ok", data, node, session)


def partial_reply(request_id: str, data: msgspec.Struct, *, node: str, session: str) -> bytes:
    """Encode a reply that more replies will follow."""
    return _reply(request_id, "partial", data, node, session)


def _reply(request_id: str, status: Literal["ok", "partial"], data: msgspec.Struct, node: str, session: str) -> bytes:
    raw = msgspec.Raw(encode(data))
    return encode(Reply(id=request_id, status=status, node=node, session=session, data=raw))


def error_reply(
    request_id: str | None,
    error: NodeError | DecodeError,
    *,
    node: str,
    session: str,
    error_id: str | None = None,
) -> bytes:
    """Encode the final reply to a request that failed. An id that could not be read is answered as empty."""
    failure = Failure(
        code=str(error.code),
        message=str(error) if isinstance(error, DecodeError) else error.message,
        retryable=isinstance(error, NodeError) and error.retryable,
        retry_after_ms=or_unset(getattr(error, "retry_after_ms", None)),
        error_id=or_unset(error_id),
        details={name: value for name, value in error.details.items() if name != "id"},
    )
    return encode(Reply(id=request_id or "", status="error", node=node, session=session, error=failure))


def decode_reply(raw: Buffer) -> Reply:
    """Decode a reply. Raises DecodeError, also for an answer without data or an error without its reason."""
    _check_version(raw)
    reply = decode(Reply, raw)
    if (reply.error if reply.status == "error" else reply.data) is msgspec.UNSET:
        raise DecodeError(f"a reply of status {reply.status} lacks its content")
    return reply


def reply_data(reply: Reply, kind: type[T]) -> T:
    """Decode what a reply carries. Raises NodeError for an error reply, DecodeError for a malformed one."""
    if reply.error is not msgspec.UNSET:
        raise node_error(reply.error)
    return _decode(kind, cast("msgspec.Raw", reply.data), root="$.data")


def node_error(failure: Failure) -> NodeError:
    """The exception that says what an error reply says."""
    retry_after_ms = None if failure.retry_after_ms is msgspec.UNSET else failure.retry_after_ms
    details = dict(failure.details)
    if failure.error_id is not msgspec.UNSET:
        details["error_id"] = failure.error_id
    return NodeError(
        failure.code,
        failure.message,
        details=details,
        retry_after_ms=retry_after_ms,
        retryable=failure.retryable,
    )
