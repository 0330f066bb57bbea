import math
from typing import Any

import msgpack
import msgspec
import pytest
import wire
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_node import ANSWER, packed

from onlooker.protocol import messages
from onlooker.protocol.codec import (
    MAX_HEADER_BYTES,
    check_stream_name,
    decode,
    decode_frame,
    decode_reply,
    decode_request,
    decode_telemetry,
    encode,
    encode_frame,
    encode_telemetry,
    error_reply,
    frame_topic,
    ok_reply,
    partial_reply,
    reply_data,
    request_data,
    telemetry_topic,
)
from onlooker.protocol.endpoints import ENDPOINTS
from onlooker.protocol.errors import DecodeError, DropReason, ErrorCode, NodeError
from onlooker.protocol.messages import UNSET, Answer, Ask, Empty, FrameHeader, PartialAnswer, Request

HEADER = FrameHeader(session="s", stream="cam", ts=5, enc="rgb8", w=2, h=1)
NODE = {"node": "n1", "session": "n-s1"}


def plain(message: msgspec.Struct) -> dict[str, Any]:
    """What a program that knows nothing but MessagePack sees of a message."""
    return msgpack.unpackb(encode(message))


@pytest.mark.parametrize("row", wire.rows("frames", "accept"), ids=wire.name_of)
def test_a_valid_frame_is_read_as_it_was_written(row: wire.Row) -> None:
    expected, parts = row["accept"], wire.parts_of(row)
    frame = decode_frame(parts)
    assert frame.header == msgspec.convert(expected["header"], FrameHeader)
    assert (frame.seq, bytes(frame.payload).hex()) == (expected["seq"], expected["payload"])
    assert msgpack.unpackb(parts[2]).items() >= expected["header"].items()


@pytest.mark.parametrize("row", wire.rows("frames", "accept"), ids=wire.name_of)
def test_a_frame_that_is_written_can_be_read_by_anybody(row: wire.Row) -> None:
    expected = row["accept"]
    header = msgspec.convert(expected["header"], FrameHeader)
    topic, seq, raw_header, *payload = encode_frame(header, expected["seq"], bytes.fromhex(expected["payload"]))
    assert (topic, seq) == tuple(wire.parts_of(row)[:2])
    assert [bytes(part).hex() for part in payload] == ([] if header.eos else [expected["payload"]])
    assert {"ts_kind": "capture", "enc": "", "eos": False} | expected["header"] == msgpack.unpackb(raw_header)


@pytest.mark.parametrize("row", wire.rows("frames", "reject"), ids=wire.name_of)
def test_a_frame_that_breaks_a_rule_has_a_drop_reason(row: wire.Row) -> None:
    with pytest.raises(DecodeError) as caught:
        decode_frame(wire.parts_of(row))
    assert caught.value.details["reason"] == row["reject"]
    assert row["reject"] in set(DropReason)


def test_a_header_of_more_than_64_kib_is_malformed() -> None:
    largest = "x" * (MAX_HEADER_BYTES - len(encode(HEADER)) - len(packed("note")) - 3)
    for note, reason in ((largest, None), (largest + "x", "malformed")):
        header = packed(plain(HEADER) | {"note": note})
        assert (len(header) > MAX_HEADER_BYTES) is (reason is not None)
        assert _drop_reason([b"frame/cam/", bytes(8), header, bytes(6)]) == reason


def _drop_reason(parts: list[bytes]) -> str | None:
    try:
        decode_frame(parts)
    except DecodeError as error:
        return error.details["reason"]
    return None


def test_a_payload_is_not_copied() -> None:
    payload = memoryview(bytearray(6))
    topic, seq, header, _ = encode_frame(HEADER, 0, payload)
    frame = decode_frame([memoryview(topic), memoryview(seq), memoryview(header), payload])
    assert frame.payload is payload


@pytest.mark.parametrize("name", ["a", "cam-1", "A.b_c-9", "x" * 64])
def test_a_name_is_a_segment_of_a_topic(name: str) -> None:
    assert check_stream_name(name) == name
    assert frame_topic(name) == f"frame/{name}/".encode()
    assert telemetry_topic("stream", "n1", name) == f"stream/n1/{name}/".encode()
    assert telemetry_topic("stats", name) == f"stats/{name}/".encode()


@pytest.mark.parametrize("name", ["", "a/b", "a b", "ä", "a\n", "\na", "x" * 65, "a\0"])
def test_a_name_that_is_no_segment_is_refused(name: str) -> None:
    for make in (check_stream_name, frame_topic, lambda name: telemetry_topic("stats", name)):
        with pytest.raises(DecodeError, match="1 to 64 characters"):
            make(name)


@pytest.mark.parametrize("row", wire.rows("requests", "accept"), ids=wire.name_of)
def test_a_valid_request_is_read_as_it_was_written(row: wire.Row) -> None:
    expected = row["accept"]
    fields = {name: value for name, value in expected["request"].items() if name != "data"}
    request = decode_request(wire.body_of(row))
    assert {name: getattr(request, name) for name in fields} == fields
    kind = getattr(messages, expected["data_kind"])
    assert request_data(request, kind) == msgspec.convert(expected["request"]["data"], kind)


@pytest.mark.parametrize("row", wire.rows("requests", "error"), ids=wire.name_of)
def test_a_request_that_breaks_a_rule_has_an_error_code_and_keeps_its_id(row: wire.Row) -> None:
    expected = row["error"]
    with pytest.raises(DecodeError) as caught:
        request = decode_request(wire.body_of(row))
        if "data_kind" in expected:
            request_data(request, getattr(messages, expected["data_kind"]))
    assert caught.value.code == expected["code"]
    for name in ("id", "path", "supported"):
        if name in expected:
            assert caught.value.details.get(name) == expected[name]


def test_a_request_that_is_written_can_be_read_by_anybody() -> None:
    data = msgspec.Raw(encode(Ask(stream="cam", question="what?", as_of="start")))
    request = Request(id="q1", session="c1", endpoint="ask", deadline_ms=15, data=data)
    assert plain(request) == {
        "v": 1,
        "id": "q1",
        "session": "c1",
        "endpoint": "ask",
        "deadline_ms": 15,
        "stream_reply": False,
        "data": {
            "stream": "cam",
            "question": "what?",
            "max_new_tokens": 128,
            "temperature": 0.0,
            "top_p": 1.0,
            "stop": [],
            "as_of": "start",
        },
    }


@pytest.mark.parametrize("row", wire.rows("replies", "accept"), ids=wire.name_of)
def test_a_valid_reply_is_read_as_it_was_written(row: wire.Row) -> None:
    expected = row["accept"]
    reply = decode_reply(wire.body_of(row))
    if "error" in expected:
        with pytest.raises(NodeError) as caught:
            reply_data(reply, Empty)
        error = caught.value
        failure = {"details": {}, **expected["error"]}
        failure["details"] |= {"error_id": failure.pop("error_id")} if "error_id" in failure else {}
        assert (error.code, error.message, error.retryable) == (
            failure["code"],
            failure["message"],
            failure["retryable"],
        )
        assert (error.details, error.retry_after_ms) == (failure["details"], failure.get("retry_after_ms"))
    else:
        kind = getattr(messages, expected["data_kind"])
        assert reply_data(reply, kind) == msgspec.convert(expected["data"], kind)


@pytest.mark.parametrize("row", wire.rows("replies", "reject"), ids=wire.name_of)
def test_a_reply_that_breaks_a_rule_is_refused(row: wire.Row) -> None:
    with pytest.raises(DecodeError) as caught:
        decode_reply(wire.body_of(row))
    assert caught.value.code == row["reject"]


def test_replies_that_are_written_can_be_read_by_anybody() -> None:
    answer = msgspec.convert(ANSWER, Answer)
    envelope = {"v": 1, "id": "q1", **NODE}
    assert msgpack.unpackb(ok_reply("q1", answer, **NODE)) == envelope | {"status": "ok", "data": ANSWER}
    assert msgpack.unpackb(partial_reply("q1", PartialAnswer(n=0, delta="a"), **NODE)) == envelope | {
        "status": "partial",
        "data": {"n": 0, "delta": "a"},
    }
    busy = NodeError(ErrorCode.BUSY, "full", retry_after_ms=400, details={"waiting": 3})
    assert msgpack.unpackb(error_reply("q1", busy, **NODE, error_id="e7")) == envelope | {
        "status": "error",
        "error": {
            "code": "BUSY",
            "message": "full",
            "retryable": True,
            "retry_after_ms": 400,
            "error_id": "e7",
            "details": {"waiting": 3},
        },
    }


def test_the_answer_to_bad_bytes_says_where_and_does_not_repeat_the_id() -> None:
    with pytest.raises(DecodeError) as caught:
        decode_request(packed({"v": 1, "id": "q1", "session": "s", "endpoint": 5}))
    reply = msgpack.unpackb(error_reply("q1", caught.value, **NODE))
    assert reply["error"]["code"] == "BAD_REQUEST"
    assert reply["error"]["details"] == {"path": "$.endpoint"}
    assert reply["error"]["retryable"] is False
    assert msgpack.unpackb(error_reply(None, caught.value, **NODE))["id"] == ""


@pytest.mark.parametrize("row", wire.rows("telemetry", "accept"), ids=wire.name_of)
def test_valid_telemetry_is_read_as_it_was_written(row: wire.Row) -> None:
    expected = row["accept"]
    received = decode_telemetry(wire.parts_of(row))
    assert (received.kind, received.seq, received.node) == (expected["kind"], expected["seq"], "n1")
    if expected["record"] is None:
        assert received.record is None
        return
    assert received.record is not None
    assert received.record == msgspec.convert(expected["record"], type(received.record))
    assert encode_telemetry(received.topic.encode(), received.seq, received.record)[:2] == wire.parts_of(row)[:2]
    assert _holds(plain(received.record), expected["record"])


def _holds(whole: Any, part: Any) -> bool:
    """Whether all of `part` is in `whole`, which may also have defaults."""
    if not isinstance(part, dict):
        return whole == part
    return all(_holds(whole[name], value) for name, value in part.items())


@pytest.mark.parametrize("row", wire.rows("telemetry", "reject"), ids=wire.name_of)
def test_telemetry_that_breaks_a_rule_is_refused(row: wire.Row) -> None:
    with pytest.raises(DecodeError) as caught:
        decode_telemetry(wire.parts_of(row))
    assert caught.value.code == row["reject"]


def test_an_error_of_decoding_says_where_it_is() -> None:
    with pytest.raises(DecodeError, match=r"Expected `int`, got `str` - at `\$\.w`") as caught:
        decode(FrameHeader, packed(plain(HEADER) | {"w": "2"}))
    assert caught.value.details == {"path": "$.w"}


def test_what_is_not_known_is_absent() -> None:
    header = FrameHeader(session="s", stream="cam", ts=5, enc="jpeg", fps=UNSET)
    assert plain(header).keys() == {"v", "session", "stream", "ts", "ts_kind", "enc", "eos"}


# What no bytes may do: raise anything but DecodeError.

VALID_FRAMES = [wire.parts_of(row) for row in wire.rows("frames", "accept")]
VALID_BODIES = [wire.body_of(row) for name in ("requests", "replies") for row in wire.rows(name, "accept")]
VALID_TELEMETRY = [wire.parts_of(row) for row in wire.rows("telemetry", "accept") if row["accept"]["record"]]

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def damaged(draw: st.DrawFn, originals: list[bytes]) -> bytes:
    """A valid body with some bytes changed, cut out or put in."""
    body = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(body)))
        body[start : start + draw(st.integers(0, 4))] = draw(st.binary(max_size=4))
    return bytes(body)


@st.composite
def retyped(draw: st.DrawFn, originals: list[bytes]) -> bytes:
    """A valid map with some of its values replaced by anything."""
    fields = msgpack.unpackb(draw(st.sampled_from(originals)))
    for name in draw(st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=3)):
        fields[name] = draw(values)
    return packed(fields)


def bodies(originals: list[bytes]) -> st.SearchStrategy[bytes]:
    return st.binary(max_size=64) | damaged(originals) | retyped(originals) | values.map(packed)


def messages_like(originals: list[list[bytes]]) -> st.SearchStrategy[list[bytes]]:
    maps = [parts[2] for parts in originals]
    topics = st.sampled_from([parts[0] for parts in originals]) | st.binary(max_size=12)
    seqs = st.binary(min_size=8, max_size=8) | st.binary(max_size=9)
    tail = st.lists(st.binary(max_size=12), max_size=2)
    whole = st.tuples(topics, seqs, bodies(maps), tail).map(lambda m: [*m[:3], *m[3]])
    return whole | st.lists(st.binary(max_size=12), max_size=5)


@settings(max_examples=150, deadline=None)
@given(messages_like(VALID_FRAMES))
def test_no_bytes_make_the_decoding_of_a_frame_fail_in_another_way(parts: list[bytes]) -> None:
    try:
        frame = decode_frame(parts)
    except DecodeError as error:
        assert error.details["reason"] in set(DropReason)
        return
    assert parts[0] == frame_topic(frame.header.stream)
    if frame.header.enc in messages.RAW_CHANNELS and not frame.header.eos:
        assert frame.header.w is not UNSET
        assert len(frame.payload) >= frame.header.w * messages.RAW_CHANNELS[frame.header.enc]


@settings(max_examples=150, deadline=None)
@given(bodies(VALID_BODIES))
def test_no_bytes_make_the_decoding_of_a_request_fail_in_another_way(body: bytes) -> None:
    try:
        request = decode_request(body)
        for endpoint in ENDPOINTS.values():
            _bounds_hold(request_data(request, endpoint.request))
    except DecodeError as error:
        reply = error_reply(error.details.get("id"), error, **NODE)
        assert msgpack.unpackb(reply)["error"]["code"] in set(ErrorCode)


def _bounds_hold(data: msgspec.Struct) -> None:
    if isinstance(data, Ask):
        assert 0 <= data.temperature <= 100
        assert math.isfinite(data.top_p)


@settings(max_examples=150, deadline=None)
@given(bodies(VALID_BODIES))
def test_no_bytes_make_the_decoding_of_a_reply_fail_in_another_way(body: bytes) -> None:
    try:
        reply = decode_reply(body)
        for endpoint in ENDPOINTS.values():
            reply_data(reply, endpoint.reply)
    except (DecodeError, NodeError):
        pass


@settings(max_examples=150, deadline=None)
@given(messages_like(VALID_TELEMETRY))
def test_no_bytes_make_the_decoding_of_telemetry_fail_in_another_way(parts: list[bytes]) -> None:
    try:
        record = decode_telemetry(parts)
    except DecodeError:
        return
    assert isinstance(record.node, str)
