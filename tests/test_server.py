"""A server answers every request once, in time, whatever its endpoints do."""

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future

import msgspec
import pytest
import zmq
from deadline import until
from nodes import RawClient

from onlooker.node.requests import Call, Endpoint, Limits, Steps
from onlooker.node.security import RefusedPeers
from onlooker.node.server import Server
from onlooker.node.tally import Tally
from onlooker.protocol.errors import ErrorCode, NodeError
from onlooker.protocol.sockets import bind, open_socket


class Word(msgspec.Struct, frozen=True, kw_only=True):
    word: str


class Desk:
    """A server whose endpoints leave the work to the test: it completes `futures` when it likes."""

    def __init__(self, max_open: int = 4, max_per_client: int = 3) -> None:
        self.futures: list[Future[Word]] = []
        self.deltas: list = []
        self.defects: list[tuple[str, str]] = []
        self.rejected = Tally()
        self._context = zmq.Context()
        socket = open_socket(self._context, zmq.ROUTER, max_message_bytes=1 << 20)
        self.endpoint = bind(socket, "tcp://127.0.0.1:*")
        self.server = Server(
            socket,
            {
                "echo": Endpoint(Word, lambda call: call.data),
                "work": Endpoint(Word, self._work, is_cancellable=True),
                "must_end": Endpoint(Word, self._work),
                "broken": Endpoint(Word, self._broken),
            },
            node="desk",
            session="s1",
            limits=Limits(max_open, max_per_client, default_deadline_s=30, retry_after_ms=lambda: 123),
            rejected=self.rejected,
            refused=RefusedPeers(socket, "desk", self.rejected),
            on_internal=lambda endpoint, error_id: self.defects.append((endpoint, error_id)),
            name="desk",
        )
        self.server.start()

    def close(self) -> None:
        self.server.close()
        self._context.term()

    def _work(self, call: Call[Word]) -> Steps[Word]:
        future: Future[Word] = Future()
        self.deltas.append(call.on_delta)
        self.futures.append(future)
        return (yield future)

    def _broken(self, call: Call[Word]) -> Word:
        raise ZeroDivisionError("a defect")

    def future(self, n: int = 0) -> Future[Word]:
        until(lambda: len(self.futures) > n)
        return self.futures[n]


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk()
    yield desk
    desk.close()


@pytest.fixture
def client(desk: Desk) -> Iterator[RawClient]:
    with RawClient(desk.endpoint) as client:
        yield client


WORD = {"word": "hello"}


@pytest.mark.parametrize(
    ("kind", "prefix", "options"),
    [
        pytest.param(zmq.REQ, (), {}, id="REQ"),
        pytest.param(zmq.REQ, (), {"REQ_CORRELATE": 1, "REQ_RELAXED": 1}, id="REQ with CORRELATE and RELAXED"),
        pytest.param(zmq.DEALER, (b"",), {}, id="DEALER"),
        pytest.param(zmq.DEALER, (b"an id", b""), {}, id="DEALER with an id of its own"),
        pytest.param(zmq.DEALER, (), {}, id="DEALER without the empty frame"),
    ],
)
def test_every_kind_of_client_gets_its_reply_back(desk: Desk, kind, prefix, options):
    with RawClient(desk.endpoint, kind, prefix, **options) as client:
        for _ in range(2):
            reply = client.call("echo", WORD)
            assert (reply["status"], reply["data"]) == ("ok", WORD)
            assert (reply["node"], reply["session"]) == ("desk", "s1")


def test_a_relaxed_client_that_gave_up_gets_the_reply_to_its_new_question(desk: Desk):
    with RawClient(desk.endpoint, zmq.REQ, REQ_CORRELATE=1, REQ_RELAXED=1) as client:
        client.send("work", {"word": "old"})
        first = desk.future(0)
        asked = client.send("work", {"word": "new"})
        first.set_result(Word(word="late"))
        desk.future(1).set_result(Word(word="right"))
        reply = client.receive()
        assert (reply["id"], reply["data"]["word"]) == (asked, "right")


def test_slow_work_delays_nobody_else(desk: Desk, client: RawClient):
    client.send("work", WORD)
    desk.future()
    with RawClient(desk.endpoint) as other:
        assert other.ok("echo", WORD) == WORD
    desk.future().set_result(Word(word="done"))
    assert client.receive()["data"] == {"word": "done"}


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "BAD_REQUEST"),
        (b"\xc1", "BAD_REQUEST"),
        (b"GET / HTTP/1.1\r\n\r\n", "BAD_REQUEST"),
        (b"\x85\xa1v", "BAD_REQUEST"),
        (b"\x91" * 5000, "BAD_REQUEST"),
        (b"\xdf\xff\xff\xff\xff", "BAD_REQUEST"),
        (b"\x82\xa1v\x02\xa2id\xa1x", "UNSUPPORTED_VERSION"),
    ],
)
def test_bytes_that_are_no_request_get_an_error(desk: Desk, client: RawClient, body: bytes, code: str):
    client.send_bytes(body)
    reply = client.receive()
    assert (reply["status"], reply["error"]["code"], reply["error"]["retryable"]) == ("error", code, False)
    assert desk.rejected.counts() == {code.lower(): 1}


@pytest.mark.parametrize("num_parts", [0, 2])
def test_a_request_that_is_not_one_part_gets_an_error(desk: Desk, client: RawClient, num_parts: int):
    client.socket.send_multipart([b"", *[b"\x80"] * num_parts] if num_parts else [b""])
    *_, body = client.socket.recv_multipart()
    assert msgspec.msgpack.decode(body)["error"]["code"] == "BAD_REQUEST"


@pytest.mark.parametrize(
    ("fields", "code", "request_id"),
    [
        ({"v": 2}, "UNSUPPORTED_VERSION", "mine"),
        ({"v": "1"}, "BAD_REQUEST", "mine"),
        ({"session": 7}, "BAD_REQUEST", "mine"),
        ({"id": 7}, "BAD_REQUEST", ""),
        ({"id": "x" * 1000}, "BAD_REQUEST", None),
        ({"endpoint": "no such"}, "UNKNOWN_ENDPOINT", "mine"),
        ({"endpoint": None}, "BAD_REQUEST", "mine"),
        ({"data": []}, "BAD_REQUEST", "mine"),
        ({"data": {}}, "BAD_REQUEST", "mine"),
        ({"data": {"word": 5}}, "BAD_REQUEST", "mine"),
        ({"deadline_ms": -1}, "BAD_REQUEST", "mine"),
        ({"deadline_ms": 0}, "BAD_REQUEST", "mine"),
        ({"deadline_ms": 1e300}, "BAD_REQUEST", "mine"),
        ({"stream_reply": "yes"}, "BAD_REQUEST", "mine"),
    ],
)
def test_a_wrong_field_gets_an_error_with_the_id_if_it_can_be_read(client: RawClient, fields, code, request_id):
    client.send("echo", WORD, **({"id": "mine"} | fields))
    reply = client.receive()
    assert reply["error"]["code"] == code
    assert request_id is None or reply["id"] == request_id


def test_unknown_fields_are_ignored(client: RawClient):
    assert client.ok("echo", WORD | {"more": 1}, trace="x") == WORD


def test_a_defect_is_answered_with_an_id_that_the_log_knows(desk: Desk, client: RawClient, caplog):
    caplog.set_level(logging.ERROR)
    error = client.error("broken", WORD)
    assert error["code"] == "INTERNAL"
    assert "ZeroDivisionError" not in str(error), "a traceback is the operator's"
    logged = [record for record in caplog.records if error["error_id"] in record.getMessage()]
    assert logged and logged[0].exc_info and logged[0].exc_info[0] is ZeroDivisionError
    assert desk.defects == [("a request", error["error_id"])]
    assert client.ok("echo", WORD) == WORD


def test_a_defect_in_the_work_is_internal_too(desk: Desk, client: RawClient):
    client.send("work", WORD)
    desk.future().set_exception(KeyError("a defect"))
    assert client.receive()["error"]["code"] == "INTERNAL"
    assert desk.defects[0][0] == "work"


def test_the_deadline_is_kept_though_the_work_is_stuck(desk: Desk, client: RawClient):
    began = time.monotonic()
    error = client.error("work", WORD, deadline_ms=100)
    assert error["code"] == "DEADLINE_EXCEEDED"
    assert 0.1 <= time.monotonic() - began < 1.0
    until(desk.future().cancelled)


def test_work_that_must_not_stop_half_way_goes_on_past_its_deadline(desk: Desk, client: RawClient):
    request = {"id": "mine", "deadline_ms": 30}
    assert client.error("must_end", WORD, **request)["code"] == "DEADLINE_EXCEEDED"
    again = client.error("must_end", WORD, **request)
    assert (again["code"], again["retryable"]) == ("BUSY", True)
    desk.future().set_result(Word(word="done"))
    until(lambda: client.call("must_end", WORD, **request).get("data") == {"word": "done"})
    assert len(desk.futures) == 1


def test_a_client_gets_no_more_by_calling_itself_another_session(desk: Desk, client: RawClient):
    for number in range(3):
        client.send("work", WORD, session=f"session {number}")
    assert client.error("work", WORD, session="session 3")["code"] == "BUSY"
    with RawClient(desk.endpoint) as other:
        other.send("work", WORD)
        desk.future(3).set_result(Word(word="done"))
        assert other.receive()["status"] == "ok"


def test_a_duplicate_of_running_work_attaches_to_it(desk: Desk, client: RawClient):
    client.send("work", WORD, id="mine")
    desk.future()
    with RawClient(desk.endpoint) as reconnected:
        reconnected.session = client.session
        reconnected.send("work", WORD, id="mine")
        reconnected.ok("echo", WORD)
        desk.future().set_result(Word(word="done"))
        assert reconnected.receive()["data"] == client.receive()["data"] == {"word": "done"}
    assert len(desk.futures) == 1


def test_a_duplicate_of_done_work_gets_the_stored_reply(desk: Desk, client: RawClient):
    client.send("work", WORD, id="mine")
    desk.future().set_result(Word(word="done"))
    first = client.receive()
    assert client.call("work", WORD, id="mine") == first
    assert len(desk.futures) == 1


def test_a_request_that_may_be_retried_is_tried_again(desk: Desk, client: RawClient):
    client.send("work", WORD, id="mine")
    desk.future(0).set_exception(NodeError(ErrorCode.NO_FRAMES, "not yet"))
    assert client.receive()["error"]["retryable"]
    client.send("work", WORD, id="mine")
    desk.future(1).set_result(Word(word="done"))
    assert client.receive()["data"] == {"word": "done"}


def test_one_id_for_two_requests_is_refused(desk: Desk, client: RawClient):
    client.send("work", WORD, id="mine")
    desk.future()
    assert client.error("work", {"word": "other"}, id="mine")["code"] == "BAD_REQUEST"


def test_the_same_id_of_another_session_is_another_request(desk: Desk, client: RawClient):
    with RawClient(desk.endpoint) as other:
        client.send("work", WORD, id="mine")
        other.send("work", WORD, id="mine")
        desk.future(1)


def test_one_client_cannot_have_it_all(desk: Desk, client: RawClient):
    for _ in range(3):
        client.send("work", WORD)
    desk.future(2)
    busy = client.error("work", WORD)
    assert (busy["code"], busy["retryable"], busy["retry_after_ms"]) == ("BUSY", True, 123)
    with RawClient(desk.endpoint) as other:
        other.send("work", WORD)
        desk.future(3)
        with RawClient(desk.endpoint) as third:
            assert third.error("work", WORD)["code"] == "BUSY"
            desk.future(0).set_result(Word(word="done"))
            client.receive()
            third.send("work", WORD)
            desk.future(4)
    assert desk.rejected.counts() == {"busy": 2}


def test_partial_replies_are_numbered_and_end_with_the_final_one(desk: Desk, client: RawClient):
    client.send("work", WORD, stream_reply=True)
    desk.future()
    for delta in ("a", "b"):
        desk.deltas[0](delta)
    desk.future().set_result(Word(word="ab"))
    replies = [client.receive() for _ in range(3)]
    assert [reply["status"] for reply in replies] == ["partial", "partial", "ok"]
    assert [reply["data"] for reply in replies[:2]] == [{"n": 0, "delta": "a"}, {"n": 1, "delta": "b"}]
    desk.deltas[0]("too late")
    assert client.ok("echo", WORD) == WORD


def test_who_did_not_ask_for_partial_replies_gets_none(desk: Desk, client: RawClient):
    client.send("work", WORD)
    desk.future()
    assert desk.deltas == [None]


def test_a_request_is_cancelled_by_its_name(desk: Desk, client: RawClient):
    request_id = client.send("work", WORD)
    future = desk.future()
    assert desk.server.cancel(client.session, request_id).result(5)
    assert client.receive()["error"]["code"] == "CANCELLED"
    assert future.cancelled()
    assert not desk.server.cancel(client.session, request_id).result(5)


def test_a_client_that_goes_away_costs_nothing(desk: Desk):
    with RawClient(desk.endpoint) as gone:
        gone.send("work", WORD, stream_reply=True)
        desk.future()
    desk.deltas[0]("nobody hears")
    desk.future().set_result(Word(word="nor this"))
    with RawClient(desk.endpoint) as client:
        assert client.ok("echo", WORD) == WORD


def test_closing_answers_what_is_open(desk: Desk, client: RawClient):
    client.send("work", WORD)
    future = desk.future()
    began = time.monotonic()
    desk.server.close()
    assert time.monotonic() - began < 1
    reply = client.receive()
    assert (reply["error"]["code"], reply["error"]["retryable"]) == ("NOT_READY", True)
    assert future.cancelled()
    assert not any(thread.name == "desk" for thread in threading.enumerate())


def test_results_after_the_end_do_no_harm(desk: Desk, client: RawClient):
    client.send("must_end", WORD)
    future = desk.future()
    desk.server.close()
    future.set_result(Word(word="nobody waits"))
