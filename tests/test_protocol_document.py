"""PROTOCOL.md says what the code does: its tables, its rules and its examples are checked."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import msgspec
import pytest
import wire
import zmq
from raw_node import ANSWER, HELLO, RawNode, ok

from onlooker.node.clock import MAX_BACKWARDS_FRAMES
from onlooker.node.degradation import STEP_EVENTS
from onlooker.node.state import MAX_PROGRESS_AGE_MS
from onlooker.node.telemetry import STATE_EVENTS
from onlooker.protocol import codec, messages, sockets
from onlooker.protocol.endpoints import ENDPOINTS
from onlooker.protocol.errors import DropReason, ErrorCode
from onlooker.protocol.messages import PROTOCOL_VERSION, FrameHeader

DOCUMENT = (Path(__file__).parent.parent / "protocol" / "PROTOCOL.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
STRUCTS = {
    name: kind
    for name, kind in vars(messages).items()
    if isinstance(kind, type) and issubclass(kind, messages.Message) and kind is not messages.Message
}


def table_of(heading: str) -> list[list[str]]:
    """The rows of the first table under a heading, without its head."""
    section = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert section, f"there is no section {heading}"
    lines = re.search(r"(^\|.*\n)+", section[1], re.MULTILINE)[0].splitlines()  # pyright: ignore[reportOptionalSubscript]
    assert lines[1].replace("|", "").replace("-", "").strip() == ""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def code(cell: str) -> str:
    return re.findall(r"`([^`]*)`", cell)[0]


def test_the_document_has_the_version_of_the_code() -> None:
    assert DOCUMENT.startswith(f"# The Onlooker protocol, version {PROTOCOL_VERSION}\n")


@pytest.mark.parametrize("name", sorted(STRUCTS))
def test_every_message_has_a_table_of_its_fields(name: str) -> None:
    written = {code(field): required for field, _, _, required, _ in table_of(name)}
    fields = msgspec.structs.fields(STRUCTS[name])
    # A version is checked before the rest, so it has a default only for those who make a message.
    assert written == {field.name: "yes" if field.required or field.name == "v" else "no" for field in fields}


@pytest.mark.parametrize("name", sorted(STRUCTS))
def test_a_unit_in_a_name_is_the_unit_in_the_table(name: str) -> None:
    units = {"_ns": "ns", "_ms": "ms", "_s": "s", "_bytes": "bytes"}
    for field, _, unit, _, _ in table_of(name):
        ending = next((each for each in units if code(field).endswith(each)), None)
        assert ending is None or unit == units[ending], field


def test_the_error_codes_are_those_of_the_code() -> None:
    written = {code(name): retryable for name, retryable, _ in table_of("Error codes")}
    assert written == {str(each): "yes" if each.retryable else "no" for each in ErrorCode}


def test_the_drop_reasons_are_those_of_the_code() -> None:
    assert [code(name) for name, _ in table_of("Drop reasons")] == [str(each) for each in DropReason]


def test_the_event_kinds_are_those_of_the_code() -> None:
    sources = [path.read_text() for path in (Path(__file__).parent.parent / "node").glob("*.py")]
    announced = {kind for text in sources for kind in re.findall(r'announce\(\s*"(\w+)"', text)}
    announced |= {kind for events in (STATE_EVENTS, STEP_EVENTS) for kind, _ in events.values()}
    assert {code(kind) for kind, _, _ in table_of("Event kinds")} == announced


def test_ready_means_what_the_code_does() -> None:
    assert f"came round in the last {MAX_PROGRESS_AGE_MS // 1000} s" in DOCUMENT


def test_a_camera_s_clock_is_understood_as_in_the_code() -> None:
    assert f"After {MAX_BACKWARDS_FRAMES}\n  of them in a row" in DOCUMENT


def test_the_endpoints_are_those_of_the_code() -> None:
    def named(cell: str) -> str:
        return re.split(r"\W", cell)[0]

    written = {
        code(name): (named(data), named(reply), tuple(socket.split(", ")))
        for name, socket, data, reply in table_of("Endpoints")
    }
    assert written == {
        name: (each.request.__name__, each.reply.__name__, each.sockets) for name, each in ENDPOINTS.items()
    }


def test_the_sockets_are_those_of_the_code() -> None:
    mib = 1 << 20
    limits = {"frames": sockets.MAX_FRAME_BYTES // mib, "ask": sockets.MAX_REQUEST_BYTES // mib}
    for name, _, endpoint, _, largest in table_of("Sockets"):
        assert code(endpoint) == getattr(sockets, f"{name.upper()}_ENDPOINT")
        assert largest == f"{limits.get(name, limits['ask'])} MiB"
    assert f"`HEARTBEAT_IVL` {sockets.HEARTBEAT_IVL_MS}" in DOCUMENT
    assert f"\n  {sockets.HEARTBEAT_TIMEOUT_MS}, `TCP_KEEPALIVE` 1" in DOCUMENT


def test_the_encodings_and_kinds_of_time_are_those_of_the_code() -> None:
    listed = re.search(r"\| encoding \| channels \| payload \|\n\|[ |-]*\|\n(.*?)\n\n", DOCUMENT, re.DOTALL)
    assert listed
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in listed[1].splitlines()]
    channels = {code(name): int(number) for name, number, _ in rows if number}
    assert channels == messages.RAW_CHANNELS
    assert {code(row[0]) for row in rows} == messages.ENCODINGS
    meaning = next(row[4] for row in table_of("FrameHeader") if code(row[0]) == "ts_kind")
    assert set(re.findall(r"`([^`]*)`", meaning)) == set(get_args(messages.TimeKind))
    assert FrameHeader(session="s", stream="c", ts=0).ts_kind == re.findall(r"`([^`]*)` \(default\)", meaning)[0]


def test_the_limits_are_those_of_the_code() -> None:
    assert f"within 1 to {codec.MAX_SIDE_PIXELS}" in DOCUMENT
    assert f"at most {codec.MAX_HEADER_BYTES >> 10} KiB" in DOCUMENT
    assert f"at most {codec.MAX_TOPIC_BYTES} bytes" in DOCUMENT


def test_every_rule_has_byte_fixtures_and_every_fixture_a_rule() -> None:
    rules = re.findall(r"^- \*\*([FQRT]\d+)\*\*", DOCUMENT, re.MULTILINE)
    assert len(rules) == len(set(rules))
    fixtures = {rule for name in wire.NAMES for row in wire.rows(name) for rule in row["rules"]}
    assert fixtures == set(rules)


def test_the_names_of_the_fixtures_are_unique() -> None:
    for name in wire.NAMES:
        names = [row["name"] for row in wire.rows(name)]
        assert len(names) == len(set(names))


def _run(example: str, **endpoints: str) -> None:
    for name, endpoint in endpoints.items():
        default = getattr(sockets, f"{name.upper()}_ENDPOINT")
        assert default in example
        example = example.replace(default, endpoint)
    exec(compile(example, "PROTOCOL.md", "exec"), {})


@pytest.fixture
def context() -> Iterator[zmq.Context]:
    with zmq.Context() as context:
        yield context


def test_the_publishing_example_publishes(context: zmq.Context) -> None:
    with context.socket(zmq.SUB) as node, ThreadPoolExecutor(1) as pool:
        node.subscribe(b"frame/")
        node.set(zmq.RCVTIMEO, 5000)
        node.set(zmq.LINGER, 0)
        port = node.bind_to_random_port("tcp://127.0.0.1")
        published = pool.submit(_run, EXAMPLES[0], frames=f"tcp://127.0.0.1:{port}")
        frame, end = codec.decode_frame(node.recv_multipart()), codec.decode_frame(node.recv_multipart())
        published.result(timeout=5)
    assert (frame.header.enc, frame.header.w, frame.header.h, frame.seq) == ("rgb8", 2, 1, 0)
    assert bytes(frame.payload) == bytes([255, 0, 0] * 2)
    assert (end.header.eos, end.seq, end.header.session) == (True, 1, frame.header.session)


def test_the_asking_example_gets_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    with RawNode(lambda request: [ok(request, ANSWER)]) as node:
        _run(EXAMPLES[1], ask=node.ask)
        assert node.seen.get_nowait()["data"] == {"stream": "front", "question": "Is the door open?"}
    assert capsys.readouterr().out == "a red circle\n"


def test_the_watching_example_hears_hello(context: zmq.Context, capsys: pytest.CaptureFixture[str]) -> None:
    hello = msgspec.convert(HELLO, messages.Hello)
    with context.socket(zmq.XPUB) as node, ThreadPoolExecutor(1) as pool:
        node.set(zmq.RCVTIMEO, 5000)
        node.set(zmq.LINGER, 0)
        port = node.bind_to_random_port("tcp://127.0.0.1")
        watched = pool.submit(_run, EXAMPLES[2], telemetry=f"tcp://127.0.0.1:{port}")
        assert node.recv() == b"\x01hello/"
        node.send_multipart(codec.encode_telemetry(b"hello/n1/", 0, hello))
        watched.result(timeout=5)
    assert capsys.readouterr().out == "hello/n1/ ['cam']\n"
