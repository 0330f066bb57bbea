"""Schemas keep to what Foxglove reads: its parser refuses a whole channel for a field that it does not know."""

from typing import Any, Generic, TypeVar

import msgspec
import pytest
from records import stream_stats

from onlooker.protocol.endpoints import ENDPOINTS
from onlooker.protocol.messages import Event, Hello, NodeStats, StreamStats
from onlooker.tools.message_schema import object_schema
from onlooker.tools.session_file import Numbered, RecordedReply, RecordedRequest

T = TypeVar("T")

KINDS: list[Any] = [Numbered, Hello, NodeStats, StreamStats, Event]
KINDS += [RecordedRequest[endpoint.request] for endpoint in ENDPOINTS.values()]
KINDS += [RecordedReply[endpoint.reply] for endpoint in ENDPOINTS.values()]


def check_as_foxglove_does(schema: dict[str, Any]) -> None:
    """Walk through an object as parseJsonSchema of Foxglove's mcap-support does; what it refuses is an error."""
    assert schema["type"] == "object"
    for name, field in schema["properties"].items():
        assert "oneOf" not in field, name
        match field["type"]:
            case "boolean" | "number" | "integer":
                pass
            case "string":
                assert "contentEncoding" not in field, name
            case "object":
                check_as_foxglove_does(field)
            case "array" if field["items"]["type"] == "object":
                check_as_foxglove_does(field["items"])
            case "array":
                assert field["items"]["type"] in ("boolean", "string", "number", "integer"), name
            case other:
                raise AssertionError(f"{name} is of the type {other}")


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_message_of_a_recording_is_read_by_foxglove(kind: Any) -> None:
    check_as_foxglove_does(object_schema(kind))


def test_a_schema_names_every_field() -> None:
    fields = msgspec.to_builtins(stream_stats())
    schema = object_schema(StreamStats)
    assert set(fields) <= set(schema["properties"])
    assert set(fields["cache"]) <= set(schema["properties"]["cache"]["properties"])
    assert schema["properties"]["received_size"] == {"type": "array", "items": {"type": "integer"}}
    assert schema["properties"]["state"]["enum"][0] == "ended"
    assert schema["properties"]["frames"]["properties"]["dropped"] == {"type": "object", "properties": {}}


class Either(msgspec.Struct, Generic[T]):
    value: int | str


def test_what_cannot_be_said_is_an_error_and_no_unreadable_channel() -> None:
    with pytest.raises(TypeError, match="anyOf"):
        object_schema(Either[int])
