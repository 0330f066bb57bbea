"""A recorded session is read as it was written, and by others as well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from mcap.reader import make_reader
from mcap.writer import Writer
from mcap_protobuf.decoder import DecoderFactory
from records import NS, hello, node_stats, stream_stats

from onlooker.protocol.codec import TelemetryRecord
from onlooker.protocol.messages import Ask, Event, Failure, FrameHeader
from onlooker.tools.session_file import (
    FrameEntry,
    RecordedReply,
    RecordedRequest,
    ReplyEntry,
    RequestEntry,
    SessionError,
    SessionReader,
    SessionWriter,
    TelemetryEntry,
)

JPEG = FrameHeader(session="s", stream="front", ts=5 * NS + 7, enc="jpeg", fps=29.97)
HEADERS = {
    "jpeg": JPEG,
    "png of a file": FrameHeader(session="s", stream="front", ts=0, ts_kind="media", enc="png", loop=2),
    "rgb8": FrameHeader(session="s", stream="front", ts=1, ts_kind="publish", enc="rgb8", w=2, h=1),
    "mono8 with a step": FrameHeader(session="s", stream="a.b-c_d", ts=2**63 - 1, enc="mono8", w=2, h=2, step=3),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "session.mcap"


def entries(path: Path, **settings: Any) -> list[Any]:
    with SessionReader(path) as reader:
        return list(reader.entries(**settings))


def written(path: Path, *frames: tuple[FrameHeader, int, bytes]) -> Path:
    writer = SessionWriter(path)
    for frame in frames:
        writer.write_frame(*frame)
    writer.close()
    return path


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
@pytest.mark.parametrize("payload", [b"\0\xff" * 3, bytes(range(256)) * 5000])
def test_a_frame_is_read_byte_for_byte(path: Path, header: FrameHeader, payload: bytes) -> None:
    (entry,) = entries(written(path, (header, 2**64 - 1, payload)))
    assert isinstance(entry, FrameEntry)
    assert (entry.header, entry.seq, entry.payload) == (header, 2**64 - 1, payload)


def test_the_end_of_a_stream_has_no_picture(path: Path) -> None:
    end = FrameHeader(session="s", stream="front", ts=9, eos=True)
    first, last = entries(written(path, (JPEG, 0, b"x"), (end, 1, b"")))
    assert (first.payload, last.header, last.payload) == (b"x", end, b"")


def test_everything_is_read_in_its_order_and_at_times_of_its_own(path: Path) -> None:
    streams = [msgspec.structs.replace(JPEG, stream=name) for name in ("front", "yard")]
    frames = [(streams[n % 2], n // 2, str(n).encode()) for n in range(100)]
    found = entries(written(path, *frames))
    assert [(entry.header, entry.seq, entry.payload) for entry in found] == frames
    times = [entry.at_ns for entry in found]
    assert times == sorted(set(times))


def test_without_the_pictures_only_these_are_missing(path: Path) -> None:
    written(path, (JPEG, 0, b"x"), (JPEG, 1, b"y"))
    assert [(entry.seq, entry.payload) for entry in entries(path, has_payloads=False)] == [(0, b""), (1, b"")]


def test_requests_and_replies_are_read_as_what_they_are(path: Path) -> None:
    request = RecordedRequest(id="1", session="c", data=Ask(stream="front", question="Où ? \N{SNOWMAN}\n", seed=2**62))
    failure = RecordedReply(
        id="1", session="c", status="error", error=Failure(code="BUSY", message="later", retryable=True)
    )
    writer = SessionWriter(path)
    writer.write_request("ask", request)
    writer.write_reply("ask", failure)
    writer.close()
    asked, replied = entries(path)
    assert isinstance(asked, RequestEntry) and isinstance(replied, ReplyEntry)
    assert (asked.endpoint, asked.request) == ("ask", request)
    assert (replied.endpoint, replied.reply) == ("ask", failure)


def test_telemetry_is_read_and_what_is_unknown_is_left_out(path: Path) -> None:
    records = {
        "hello/n1/": hello(),
        "stats/n1/": node_stats(),
        "stream/n1/gate/": stream_stats(),
        "event/n1/": Event(ts=1, kind="reset", stream="gate", message="m", details={"a": [1, None]}),
        "weather/n1/": None,
    }
    writer = SessionWriter(path)
    for topic, record in records.items():
        writer.write_telemetry(TelemetryRecord(topic, 0, topic.partition("/")[0], record))
    writer.close()
    found = entries(path)
    assert all(isinstance(entry, TelemetryEntry) for entry in found)
    assert [entry.record for entry in found] == [record for record in records.values() if record is not None]


# For Foxglove


def test_pictures_have_the_well_known_schemas(path: Path) -> None:
    written(path, (JPEG, 0, b"a picture"), (HEADERS["mono8 with a step"], 1, b"abcdef"))
    with path.open("rb") as file:
        reader = make_reader(file, decoder_factories=[DecoderFactory()])
        images = {
            schema.name: (channel.topic, image)
            for schema, channel, _, image in reader.iter_decoded_messages(
                topics=["/frames/front/image", "/frames/a.b-c_d/image"]
            )
            if schema
        }
    topic, compressed = images["foxglove.CompressedImage"]
    assert (topic, compressed.format, compressed.data, compressed.frame_id) == (
        "/frames/front/image",
        "jpeg",
        b"a picture",
        "front",
    )
    assert (compressed.timestamp.seconds, compressed.timestamp.nanos) == (5, 7)
    _, raw = images["foxglove.RawImage"]
    assert (raw.encoding, raw.width, raw.height, raw.step, raw.data) == ("mono8", 2, 2, 3, b"abcdef")


def test_a_message_has_what_its_schema_says(path: Path) -> None:
    written(path, (JPEG, 0, b"x"))
    with path.open("rb") as file:
        ((schema, channel, message),) = make_reader(file).iter_messages(topics=["/frames/front/header"])
    assert schema and (schema.name, schema.encoding, channel.message_encoding) == (
        "onlooker.Numbered",
        "jsonschema",
        "json",
    )
    properties = msgspec.json.decode(schema.data)["properties"]
    fields = msgspec.json.decode(message.data)
    assert set(fields) <= set(properties)
    assert set(fields["header"]) <= set(properties["header"]["properties"])


# Files that are none


def test_a_file_that_was_not_closed_says_so(path: Path) -> None:
    written(path, (JPEG, 0, b"x" * 10_000))
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(SessionError, match="was not closed"):
        SessionReader(path)


@pytest.mark.parametrize("content", [b"", b"not at all", b"\x89MCAP0\r\n"])
def test_what_is_no_recording_says_so(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(SessionError, match="is no MCAP file"):
        SessionReader(path)


def test_a_recording_of_something_else_says_so(path: Path) -> None:
    writer = Writer(str(path))
    writer.start(library="a robot")
    writer.finish()
    with pytest.raises(SessionError, match="not a recording of `onlooker record`"):
        SessionReader(path)


@pytest.mark.parametrize("topic", ["/requests/dream", "/replies/dream", "/telemetry/weather"])
def test_a_recording_of_a_newer_version_says_so(path: Path, topic: str) -> None:
    writer = Writer(str(path))
    writer.start(library="onlooker")
    writer.add_message(writer.register_channel(topic, "json", 0), 1, b"{}", 1)
    writer.finish()
    with pytest.raises(SessionError, match=f"newer version: {topic} is not known"):
        entries(path)


def test_a_damaged_recording_says_so(path: Path) -> None:
    content = bytearray(written(path, (JPEG, 0, bytes(range(256)) * 100)).read_bytes())
    place = content.index(bytes(range(256)))
    content[place] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(SessionError, match="damaged"):
        entries(path)
