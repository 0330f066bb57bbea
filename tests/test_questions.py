"""What the ask socket refuses before the engine sees it, and how it answers the rest."""

from collections.abc import Iterator

import pytest
from deadline import until
from fakes import FakeEngine
from nodes import RawClient, remember, running_node

from onlooker.node.node import Node

QUESTION = {"stream": "front", "question": "what do you see"}
CHOICE = {"stream": "front", "question": "which", "options": ["red", "blue"]}


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    with FakeEngine() as engine:
        yield engine


@pytest.fixture
def node(engine: FakeEngine) -> Iterator[Node]:
    with running_node(
        engine, questions__max_per_client=2, questions__max_concurrent=1, questions__max_waiting=2
    ) as node:
        remember(engine)
        yield node


@pytest.fixture
def client(node: Node) -> Iterator[RawClient]:
    with RawClient(node.endpoints["ask"]) as client:
        yield client


def test_a_question_is_answered_with_what_the_answer_knows(client: RawClient):
    answer = client.ok("ask", QUESTION)
    assert answer["text"] == QUESTION["question"]
    assert answer["memory"]["num_frames"] == 2
    assert answer["memory"]["unchanged"]


def test_a_streamed_answer_adds_up(client: RawClient):
    client.send("ask", QUESTION, stream_reply=True)
    replies = [client.receive()]
    while replies[-1]["status"] == "partial":
        replies.append(client.receive())
    *partial, final = replies
    assert [reply["data"]["n"] for reply in partial] == [0, 1, 2, 3]
    assert "".join(reply["data"]["delta"] for reply in partial) == final["data"]["text"]


def test_the_likeliest_option_is_chosen(client: RawClient):
    assert client.ok("ask_choice", CHOICE)["option"] == "red"


@pytest.mark.parametrize(
    ("change", "code", "path"),
    [
        ({"question": ""}, "BAD_REQUEST", "question"),
        ({"question": " \n\t"}, "BAD_REQUEST", "question"),
        ({"question": "x" * 2001}, "TOO_LARGE", None),
        ({"question": 5}, "BAD_REQUEST", "question"),
        ({"question": None}, "BAD_REQUEST", "question"),
        ({"stream": "nowhere"}, "UNKNOWN_STREAM", None),
        ({"stream": "../etc"}, "BAD_REQUEST", "stream"),
        ({"max_new_tokens": 0}, "BAD_REQUEST", "max_new_tokens"),
        ({"max_new_tokens": 65}, "BAD_REQUEST", "max_new_tokens"),
        ({"max_new_tokens": 2**63}, "BAD_REQUEST", "max_new_tokens"),
        ({"temperature": -0.1}, "BAD_REQUEST", "temperature"),
        ({"temperature": float("inf")}, "BAD_REQUEST", "temperature"),
        ({"temperature": float("nan")}, "BAD_REQUEST", "temperature"),
        ({"top_p": 0.0}, "BAD_REQUEST", "top_p"),
        ({"top_p": 1.1}, "BAD_REQUEST", "top_p"),
        ({"top_p": float("nan")}, "BAD_REQUEST", "top_p"),
        ({"seed": -1}, "BAD_REQUEST", "seed"),
        ({"stop": [""]}, "BAD_REQUEST", "stop"),
        ({"stop": "end"}, "BAD_REQUEST", "stop"),
        ({"as_of": "no such"}, "BAD_REQUEST", "as_of"),
        ({"as_of": "nosuch"}, "UNKNOWN_MARK", None),
    ],
)
def test_a_bad_question_gets_its_code(client: RawClient, change, code, path):
    error = client.error("ask", QUESTION | change)
    assert (error["code"], error["retryable"]) == (code, False)
    assert path is None or error["details"]["path"].startswith(f"$.data.{path}")
    assert client.ok("ask", QUESTION)["text"] == QUESTION["question"]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"options": []}, "BAD_REQUEST"),
        ({"options": ["red"]}, "BAD_REQUEST"),
        ({"options": ["red", "red"]}, "BAD_REQUEST"),
        ({"options": ["red", ""]}, "BAD_REQUEST"),
        ({"options": ["red", " "]}, "BAD_REQUEST"),
        ({"options": ["red", 5]}, "BAD_REQUEST"),
        ({"options": "red"}, "BAD_REQUEST"),
        ({"options": [str(n) for n in range(9)]}, "TOO_LARGE"),
        ({"options": ["a" * 1500, "b" * 1500]}, "TOO_LARGE"),
        ({"question": "x" * 2001}, "TOO_LARGE"),
        ({"stream": "nowhere"}, "UNKNOWN_STREAM"),
        ({"rank_by": "luck"}, "BAD_REQUEST"),
    ],
)
def test_a_bad_choice_gets_its_code(client: RawClient, change, code):
    assert client.error("ask_choice", CHOICE | change)["code"] == code


def test_an_unknown_stream_is_answered_with_those_there_are(client: RawClient):
    assert client.error("ask", QUESTION | {"stream": "back"})["details"]["streams"] == ["front"]


def test_a_stream_without_frames_is_no_answer_yet():
    with FakeEngine() as engine, running_node(engine) as node, RawClient(node.endpoints["ask"]) as client:
        error = client.error("ask", QUESTION)
        assert (error["code"], error["retryable"]) == ("NO_FRAMES", True)


def test_the_operator_may_bound_more_tightly_than_the_model():
    with FakeEngine() as engine, running_node(engine, questions__max_question_chars=10) as node:
        remember(engine)
        with RawClient(node.endpoints["ask"]) as client:
            assert client.ok("hello")["max_question_chars"] == 10
            assert client.error("ask", QUESTION)["details"]["max_question_chars"] == 10


def test_who_names_no_length_gets_what_the_node_allows():
    with FakeEngine() as engine, running_node(engine, questions__max_new_tokens=2) as node:
        remember(engine)
        with RawClient(node.endpoints["ask"]) as client:
            assert client.ok("ask", QUESTION)["finish"] == "length"
            assert client.error("ask", QUESTION | {"max_new_tokens": 3})["code"] == "BAD_REQUEST"


def test_a_crowd_is_told_to_come_back(engine: FakeEngine, node: Node, client: RawClient):
    engine.hold()
    for _ in range(2):
        client.send("ask", QUESTION)
    busy = client.error("ask", QUESTION)
    assert busy["code"] == "BUSY" and busy["retry_after_ms"] >= 100
    with RawClient(node.endpoints["ask"]) as other:
        other.send("ask", QUESTION)
        until(lambda: engine.question_counters().received == 3)
        with RawClient(node.endpoints["ask"]) as late:
            assert late.error("ask", QUESTION)["code"] == "BUSY"
        engine.let_go()
        assert other.receive()["status"] == "ok"
    assert [client.receive()["status"] for _ in range(2)] == ["ok", "ok"]


def test_a_stuck_engine_does_not_delay_the_deadline(engine: FakeEngine, client: RawClient):
    engine.hold()
    assert client.error("ask", QUESTION, deadline_ms=50)["code"] == "DEADLINE_EXCEEDED"
    assert client.error("ask_choice", CHOICE, deadline_ms=50)["code"] == "DEADLINE_EXCEEDED"
    engine.let_go()
    assert client.ok("ask", QUESTION)["text"] == QUESTION["question"]


def test_a_question_asked_twice_is_answered_once(engine: FakeEngine, client: RawClient):
    first = client.call("ask", QUESTION, id="mine")
    assert client.call("ask", QUESTION, id="mine") == first
    assert engine.question_counters().received == 1


def test_an_engine_that_is_not_ready_says_so(engine: FakeEngine, client: RawClient):
    engine.is_ready = False
    error = client.error("ask", QUESTION)
    assert (error["code"], error["retryable"]) == ("NOT_READY", True)


def test_a_question_that_a_reset_ends_is_cancelled(engine: FakeEngine, node: Node, client: RawClient):
    engine.hold()
    client.send("ask", QUESTION)
    until(lambda: engine.question_counters().waiting)
    with RawClient(node.endpoints["control"]) as control:
        control.send("reset", {"stream": "front"})
        assert client.receive()["error"]["code"] == "CANCELLED"
        engine.let_go()
        assert control.receive()["data"]["num_tokens"] == 0


def test_streams_are_listed_on_the_ask_socket_too(client: RawClient):
    assert [stream["stream"] for stream in client.ok("streams")["streams"]] == ["front"]
