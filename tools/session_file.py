"""A recorded session: frames, requests, replies and telemetry in one MCAP file, which Foxglove opens.

    /frames/<stream>/image    foxglove.CompressedImage or foxglove.RawImage: the payload, byte for byte
    /frames/<stream>/header   the frame's header and number, as JSON; at the end of a stream, without an image
    /requests/<endpoint>      what was asked of the node, as JSON
    /replies/<endpoint>       what it answered
    /telemetry/<kind>         what it said of itself; of streams /telemetry/stream/<stream>

Log times are when the recorder passed a message on; no two messages have the same.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import msgspec
from foxglove_schemas_protobuf.CompressedImage_pb2 import CompressedImage
from foxglove_schemas_protobuf.RawImage_pb2 import RawImage
from mcap.exceptions import McapError
from mcap.reader import McapReader, make_reader
from mcap.records import Channel, Message, Schema
from mcap.writer import CompressionType, Writer
from mcap_protobuf.schema import register_schema
from msgspec import UNSET, UnsetType

from ..protocol.codec import Buffer, TelemetryRecord
from ..protocol.endpoints import ENDPOINTS
from ..protocol.errors import OnlookerError
from ..protocol.messages import (
    COMPRESSED_ENCODINGS,
    RAW_CHANNELS,
    Event,
    Failure,
    FrameHeader,
    Hello,
    NodeStats,
    StreamStats,
)
from .message_schema import object_schema

T = TypeVar("T")

LIBRARY = "onlooker"
# What reading a file that is no whole one ends with, in the library and in those that it decompresses with.
_DAMAGES = (McapError, ValueError, EOFError, RuntimeError, struct.error)
_TELEMETRY = {"hello": Hello, "stats": NodeStats, "stream": StreamStats, "event": Event}


class SessionError(OnlookerError):
    """The file is no whole recording of a session."""


class Numbered(msgspec.Struct, frozen=True, kw_only=True):
    """The header of a frame, and the frame's number."""

    seq: int
    header: FrameHeader


class RecordedRequest(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """What a client wanted; `id` and `session` together name it."""

    id: str
    session: str
    data: T


class RecordedReply(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """The final reply to the request of these names."""

    id: str
    session: str
    status: Literal["ok", "error"]
    data: T | UnsetType = UNSET
    error: Failure | UnsetType = UNSET


@dataclass(frozen=True, slots=True)
class FrameEntry:
    """A frame, and when it was passed on; without a payload at the end of a stream, and where none was asked for."""

    at_ns: int
    header: FrameHeader
    seq: int
    payload: bytes = b""


@dataclass(frozen=True, slots=True)
class RequestEntry:
    at_ns: int
    endpoint: str
    request: RecordedRequest[Any]


@dataclass(frozen=True, slots=True)
class ReplyEntry:
    at_ns: int
    endpoint: str
    reply: RecordedReply[Any]


@dataclass(frozen=True, slots=True)
class TelemetryEntry:
    at_ns: int
    record: Hello | NodeStats | StreamStats | Event


Entry = FrameEntry | RequestEntry | ReplyEntry | TelemetryEntry


class SessionWriter:
    """Writes a session, in the order in which it happens. `close` completes the file."""

    def __init__(self, path: Path) -> None:
        """Raises OSError if the file cannot be made."""
        self._file = path.open("wb")
        self._writer = Writer(self._file, compression=CompressionType.LZ4)
        self._writer.start(library=LIBRARY)
        self._schemas: dict[str, int] = {}
        self._channels: dict[str, int] = {}
        self._newest_ns = 0

    def write_frame(self, header: FrameHeader, seq: int, payload: Buffer) -> None:
        now = self._now()
        topic = f"/frames/{header.stream}"
        self._write_json(f"{topic}/header", Numbered, Numbered(seq=seq, header=header), now)
        if not header.eos:
            image = _image(header, payload)
            # The order of the encodings of one stream may change: each kind of image is a channel of its own.
            channel = self._channel(f"{topic}/image", type(image).__name__, "protobuf", self._protobuf(type(image)))
            self._add(channel, image.SerializeToString(), self._now(), publish_ns=_published_ns(header) or now)

    def write_request(self, endpoint: str, request: RecordedRequest[Any]) -> None:
        self._write_json(f"/requests/{endpoint}", RecordedRequest[ENDPOINTS[endpoint].request], request, self._now())

    def write_reply(self, endpoint: str, reply: RecordedReply[Any]) -> None:
        self._write_json(f"/replies/{endpoint}", RecordedReply[ENDPOINTS[endpoint].reply], reply, self._now())

    def write_telemetry(self, message: TelemetryRecord) -> None:
        """Kinds that this version does not know are left out."""
        if message.record is None:
            return
        stream = f"/{message.record.stream}" if isinstance(message.record, StreamStats) else ""
        self._write_json(
            f"/telemetry/{message.kind}{stream}", type(message.record), message.record, self._now(), message.seq
        )

    def close(self) -> None:
        """Raises OSError if what is left cannot be written."""
        try:
            self._writer.finish()
        finally:
            self._file.close()

    def _now(self) -> int:
        """The time, later than that of any message before."""
        self._newest_ns = max(time.time_ns(), self._newest_ns + 1)
        return self._newest_ns

    def _write_json(self, topic: str, kind: Any, record: Any, at_ns: int, seq: int = 0) -> None:
        channel = self._channel(topic, "", "json", lambda: self._json_schema(kind))
        self._add(channel, msgspec.json.encode(record), at_ns, seq=seq)

    def _add(self, channel: int, data: bytes, at_ns: int, *, publish_ns: int | None = None, seq: int = 0) -> None:
        self._writer.add_message(
            channel, at_ns, data, publish_time=at_ns if publish_ns is None else publish_ns, sequence=seq & 0xFFFFFFFF
        )

    def _channel(self, topic: str, variant: str, encoding: str, schema: Callable[[], int]) -> int:
        known = self._channels.get(topic + variant)
        if known is None:
            known = self._writer.register_channel(topic, encoding, schema())
            self._channels[topic + variant] = known
        return known

    def _json_schema(self, kind: Any) -> int:
        schema = object_schema(kind)
        name = f"onlooker.{schema.get('title', kind).replace('[', '.').replace(']', '')}"
        if name not in self._schemas:
            self._schemas[name] = self._writer.register_schema(name, "jsonschema", msgspec.json.encode(schema))
        return self._schemas[name]

    def _protobuf(self, kind: Any) -> Callable[[], int]:
        def schema() -> int:
            name = kind.DESCRIPTOR.full_name
            if name not in self._schemas:
                self._schemas[name] = register_schema(self._writer, kind)
            return self._schemas[name]

        return schema


def _image(header: FrameHeader, payload: Buffer) -> CompressedImage | RawImage:
    """A picture in Foxglove's own form."""
    if header.enc in COMPRESSED_ENCODINGS:
        image = CompressedImage(frame_id=header.stream, data=bytes(payload), format=header.enc)
    else:
        assert isinstance(header.w, int) and isinstance(header.h, int)  # a raw frame without them is none
        step = header.step if isinstance(header.step, int) else header.w * RAW_CHANNELS[header.enc]
        image = RawImage(
            frame_id=header.stream, data=bytes(payload), encoding=header.enc, width=header.w, height=header.h, step=step
        )
    image.timestamp.FromNanoseconds(header.ts)
    return image


def _published_ns(header: FrameHeader) -> int | None:
    """When the camera published a frame, where it said that."""
    return header.ts if header.ts_kind == "publish" else None


class SessionReader:
    """Reads a session, as often as one likes. Raises SessionError for a file that is none, or not whole."""

    def __init__(self, path: Path) -> None:
        """Raises OSError if there is no such file."""
        self._path = path
        self._file = path.open("rb")
        try:
            self._reader = self._opened()
        except BaseException:
            self._file.close()
            raise

    def _opened(self) -> McapReader:
        try:
            reader = make_reader(self._file, validate_crcs=True)
            summary = reader.get_summary()
        except (*_DAMAGES, OSError) as error:  # also for a place before the beginning of a short file
            raise SessionError(f"{self._path} is no MCAP file, or one that was not closed: {error}") from error
        if summary is None or reader.get_header().library != LIBRARY:
            raise SessionError(f"{self._path} is not a recording of `onlooker record`")
        self._topics = [channel.topic for channel in summary.channels.values()]
        return reader

    def entries(self, *, has_payloads: bool = True) -> Iterator[Entry]:
        """Everything in the order in which it was passed on, with the pictures or without."""
        topics = [topic for topic in self._topics if has_payloads or not topic.endswith("/image")]
        headers: dict[str, tuple[int, Numbered]] = {}
        for schema, channel, message in self._messages(topics):
            place = channel.topic.split("/")
            match place[1:]:
                case ["frames", stream, "header"]:
                    numbered = _decoded(Numbered, message)
                    if numbered.header.eos or not has_payloads:
                        yield FrameEntry(message.log_time, numbered.header, numbered.seq)
                    else:
                        headers[stream] = (message.log_time, numbered)
                case ["frames", stream, "image"]:
                    if stream not in headers:
                        raise SessionError(f"{self._path} has a picture without its header")
                    at_ns, numbered = headers.pop(stream)
                    yield FrameEntry(at_ns, numbered.header, numbered.seq, _payload(schema, message))
                case ["requests", endpoint] if endpoint in ENDPOINTS:
                    kind = RecordedRequest[ENDPOINTS[endpoint].request]
                    yield RequestEntry(message.log_time, endpoint, _decoded(kind, message))
                case ["replies", endpoint] if endpoint in ENDPOINTS:
                    kind = RecordedReply[ENDPOINTS[endpoint].reply]
                    yield ReplyEntry(message.log_time, endpoint, _decoded(kind, message))
                case ["telemetry", kind, *_] if kind in _TELEMETRY:
                    yield TelemetryEntry(message.log_time, _decoded(_TELEMETRY[kind], message))
                case ["requests" | "replies" | "telemetry", *_]:
                    raise SessionError(f"{self._path} is of a newer version: {channel.topic} is not known here")

    def _messages(self, topics: list[str]) -> Iterator[tuple[Schema | None, Channel, Message]]:
        try:
            yield from self._reader.iter_messages(topics=topics, log_time_order=True)
        except _DAMAGES as error:
            raise SessionError(f"{self._path} is damaged: {error}") from error

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> SessionReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _decoded(kind: Any, message: Message) -> Any:
    try:
        return msgspec.json.decode(message.data, type=kind)
    except msgspec.MsgspecError as error:
        raise SessionError(f"the recording has a message that is none: {error}") from error


def _payload(schema: Schema | None, message: Message) -> bytes:
    is_compressed = schema is not None and schema.name == CompressedImage.DESCRIPTOR.full_name
    return (CompressedImage if is_compressed else RawImage).FromString(message.data).data
