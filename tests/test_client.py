import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgpack
import msgspec
import numpy as np
import pytest
import zmq
from deadline import until
from raw_node import ANSWER, CACHE, CHOICE, FRAMES, HELLO, STATUS, STREAM, Fields, RawNode, error, ok, packed
from zmq.auth.thread import ThreadAuthenticator

from onlooker.protocol.client import NodeClient
from onlooker.protocol.curve import KeyPair, become_server, generate, write_keypair
from onlooker.protocol.endpoints import ENDPOINTS
from onlooker.protocol.errors import (
    AuthError,
    ClosedError,
    DecodeError,
    ErrorCode,
    NodeError,
    NoReplyError,
)
from onlooker.protocol.interface import VideoMemory
from onlooker.protocol.messages import Answer, PartialAnswer, StreamAdded, StreamSpec, StreamStats

RED = np.full((2, 3, 3), (255, 0, 0), np.uint8)

REPLIES: dict[str, Fields] = {
    "ask": ANSWER,
    "ask_choice": CHOICE,
    "hello": HELLO,
    "status": STATUS,
    "streams": {"streams": [STREAM]},
    "ping": {"live": True, "ready": True, "engine_progress_age_ms": 1.0},
    "cache_info": CACHE,
    "reset": CACHE,
    "rollback": CACHE,
    "mark": {"name": "m", "num_tokens": 1, "num_frames": 2},
    "marks": {"marks": []},
    "mark_delete": {"marks": []},
}


def usual(request: Fields) -> Iterator[Fields]:
    yield ok(request, REPLIES.get(request["endpoint"]))


def nothing(request: Fields) -> Iterable[Fields]:
    return []


@pytest.fixture
def node() -> Iterator[RawNode]:
    with RawNode(usual) as node:
        yield node


@pytest.fixture
def client(node: RawNode) -> Iterator[NodeClient]:
    with NodeClient(node.ask, node.control, timeout_s=5.0) as client:
        yield client


def test_a_question_is_one_plain_messagepack_map(node: RawNode, client: NodeClient) -> None:
    answer = client.ask("cam", "what?", seed=7, stop=["."], as_of="start")
    assert answer.text == "a red circle"
    assert answer.memory.unchanged
    request = node.seen.get_nowait()
    assert 4000 < request.pop("deadline_ms") < 5000
    assert request == {
        "v": 1,
        "id": request["id"],
        "session": client.session,
        "endpoint": "ask",
        "stream_reply": False,
        "data": {
            "stream": "cam",
            "question": "what?",
            "max_new_tokens": 128,
            "temperature": 0.0,
            "top_p": 1.0,
            "seed": 7,
            "stop": ["."],
            "as_of": "start",
        },
    }


VERBS: list[tuple[str, Callable[[NodeClient], object], Fields]] = [
    ("cache_info", lambda c: c.cache_info("cam"), {"stream": "cam"}),
    ("reset", lambda c: c.reset("cam"), {"stream": "cam"}),
    ("mark", lambda c: c.mark("cam", "m"), {"stream": "cam", "name": "m"}),
    ("rollback", lambda c: c.rollback("cam", "m"), {"stream": "cam", "name": "m"}),
    ("mark_delete", lambda c: c.delete_mark("cam", "m"), {"stream": "cam", "name": "m"}),
    ("marks", lambda c: c.marks("cam"), {"stream": "cam"}),
    ("status", lambda c: c.status(), {}),
    ("hello", lambda c: c.hello(), {}),
    ("streams", lambda c: c.streams(), {}),
    ("ping", lambda c: c.ping(), {}),
    ("stream_add", lambda c: c.add_stream(StreamSpec(stream="cam", fps=2.0)), {"stream": "cam", "fps": 2.0}),
    ("stream_remove", lambda c: c.remove_stream("cam"), {"stream": "cam"}),
    ("stream_pause", lambda c: c.pause_stream("cam"), {"stream": "cam"}),
    ("stream_resume", lambda c: c.resume_stream("cam"), {"stream": "cam"}),
    ("cancel", lambda c: c.cancel("q1", "s2"), {"id": "q1", "session": "s2"}),
    (
        "ask_choice",
        lambda c: c.ask_choice("cam", "which?", ["red", "blue"], rank_by="raw"),
        {"stream": "cam", "question": "which?", "options": ["red", "blue"], "rank_by": "raw"},
    ),
]


@pytest.mark.parametrize(("endpoint", "call", "data"), VERBS, ids=[verb[0] for verb in VERBS])
def test_every_verb_sends_its_data_and_returns_the_reply(
    node: RawNode, client: NodeClient, endpoint: str, call: Callable[[NodeClient], object], data: Fields
) -> None:
    result = call(client)
    request = node.seen.get_nowait()
    assert (request["endpoint"], request["data"]) == (endpoint, data)
    if endpoint == "stream_add":  # of a node that foretells nothing
        assert result == StreamAdded()
    elif endpoint not in REPLIES:
        assert result is None
    elif endpoint != "streams":
        assert result == msgspec.convert(REPLIES[endpoint], ENDPOINTS[endpoint].reply)


def test_streams_come_with_their_facts_or_by_name(client: NodeClient) -> None:
    assert client.streams() == [msgspec.convert(STREAM, StreamStats)]
    assert client.stream_names() == ["cam"]


def test_every_endpoint_has_a_verb() -> None:
    assert {verb[0] for verb in VERBS} | {"ask"} == ENDPOINTS.keys()


def test_the_client_is_a_video_memory(client: NodeClient) -> None:
    memory: VideoMemory = client  # pyright compares the signatures
    verbs = {name for name in vars(VideoMemory) if not name.startswith("_")}
    assert verbs <= set(dir(memory))


def test_arguments_of_earlier_backends_are_ignored(node: RawNode, client: NodeClient) -> None:
    client.ask("cam", "what?", manual_time=3.0)
    assert "manual_time" not in node.seen.get_nowait()["data"]


def test_an_error_reply_is_an_exception_with_all_its_facts(node: RawNode, client: NodeClient) -> None:
    node.answers = lambda request: [
        error(request, code="BUSY", retryable=True, retry_after_ms=400, details={"waiting": 32}, error_id="e7")
    ]
    with pytest.raises(NodeError) as caught:
        client.ask("cam", "what?")
    assert caught.value.code == ErrorCode.BUSY
    assert (caught.value.retryable, caught.value.retry_after_ms) == (True, 400)
    assert caught.value.details == {"waiting": 32, "error_id": "e7"}


def test_whether_to_retry_an_unknown_error_is_the_nodes_word(node: RawNode, client: NodeClient) -> None:
    node.answers = lambda request: [error(request, code="OVERHEATED", retryable=True)]
    with pytest.raises(NodeError, match="OVERHEATED") as caught:
        client.ask("cam", "what?")
    assert caught.value.retryable


def test_unknown_fields_of_a_reply_are_ignored(node: RawNode, client: NodeClient) -> None:
    node.answers = lambda request: [ok(request, {**ANSWER, "mood": "good"}) | {"extra": [1, 2]}]
    assert client.ask("cam", "what?").text == "a red circle"


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x80", b"\x81\xa1v\x01", b"\xff" * 100, b"\x91" * 100_000], ids=repr)
def test_bytes_that_are_no_reply_are_an_error_and_the_next_call_works(node: RawNode, body: bytes) -> None:
    node.answers = lambda request: [body]
    with NodeClient(node.ask, node.control, timeout_s=5.0) as client:
        with pytest.raises(DecodeError):
            client.ask("cam", "what?")
        node.answers = usual
        assert client.ask("cam", "what?").text == "a red circle"


def test_a_node_of_another_version_is_named_as_such(node: RawNode, client: NodeClient) -> None:
    node.answers = lambda request: [ok(request, ANSWER) | {"v": 2}]
    with pytest.raises(DecodeError) as caught:
        client.ask("cam", "what?")
    assert caught.value.code == ErrorCode.UNSUPPORTED_VERSION


def test_questions_of_several_threads_run_in_parallel(node: RawNode, client: NodeClient) -> None:
    waiting: list[Fields] = []

    def when_all_have_asked(request: Fields) -> Iterable[Fields]:
        waiting.append(request)
        if len(waiting) < 3:
            return []
        return [ok(each, {**ANSWER, "text": each["data"]["question"]}) for each in waiting]

    node.answers = when_all_have_asked
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda question: client.ask("cam", question), "abc"))
    assert [answer.text for answer in answers] == ["a", "b", "c"]


@pytest.mark.parametrize("timeout_s", [0, -1, -0.5, float("nan")])
def test_a_timeout_that_is_none_is_refused(node: RawNode, client: NodeClient, timeout_s: float) -> None:
    with pytest.raises(ValueError, match="timeout_s"):
        NodeClient(node.ask, timeout_s=timeout_s)
    with pytest.raises(ValueError, match="timeout_s"):
        client.ask("cam", "what?", timeout_s=timeout_s)
    with pytest.raises(ValueError, match="timeout_s"):
        client.ask_stream("cam", "what?", timeout_s=timeout_s)
    assert node.seen.empty()


def test_silence_is_an_error_in_time_and_the_next_call_gets_its_own_answer(node: RawNode, client: NodeClient) -> None:
    late: list[Fields] = []
    node.answers = lambda request: late.append(request) or []
    with pytest.raises(NoReplyError, match=r"within 0\.2 s"):
        client.ask("cam", "first?", timeout_s=0.2)
    node.answers = lambda request: [
        *(ok(each, {**ANSWER, "text": "late"}) for each in late),
        ok(request, ANSWER),
    ]
    assert client.ask("cam", "second?").text == "a red circle"


def test_a_late_reply_on_the_same_connection_is_passed_over(node: RawNode, client: NodeClient) -> None:
    other = packed(ok({"id": "other"}, {**ANSWER, "text": "late"}))
    node.answers = lambda request: [other, ok(request, ANSWER)]
    assert client.ask("cam", "what?").text == "a red circle"


def test_the_node_hears_of_its_time_a_little_before_the_client_gives_up(node: RawNode, client: NodeClient) -> None:
    client.ask("cam", "what?", timeout_s=0.5)
    assert 400 <= node.seen.get_nowait()["deadline_ms"] <= 450
    client.ask("cam", "what?", timeout_s=10**9)
    assert node.seen.get_nowait()["deadline_ms"] <= 86_400_000


def test_a_node_that_comes_late_is_told_the_time_that_is_left(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/late"
    with NodeClient(endpoint, endpoint, timeout_s=10.0) as client, ThreadPoolExecutor(1) as pool:
        started = time.monotonic()
        asked = pool.submit(client.ping)
        until(lambda: time.monotonic() - started > 0.5)
        with zmq.Context() as context, context.socket(zmq.ROUTER) as node:
            node.set(zmq.RCVTIMEO, 5000)
            node.bind(endpoint)
            *envelope, body = node.recv_multipart()
            request = msgpack.unpackb(body)
            node.send_multipart([*envelope, packed(ok(request, REPLIES["ping"]))])
            assert asked.result(timeout=5.0).ready
    assert request["deadline_ms"] <= 9400


def test_nobody_there_is_no_reply_and_not_a_hang(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/nobody"
    with NodeClient(endpoint, endpoint, timeout_s=0.1) as client, pytest.raises(NoReplyError):
        client.ask("cam", "what?")


def test_a_lost_connection_sends_the_same_request_again(node: RawNode, client: NodeClient) -> None:
    def lose_the_first(request: Fields) -> Iterable[Fields]:
        node.answers = usual
        node.lose_connections()
        return []

    node.answers = lose_the_first
    assert client.ask("cam", "what?").text == "a red circle"
    first, second = node.seen.get_nowait(), node.seen.get_nowait()
    assert (first["id"], first["session"]) == (second["id"], second["session"])
    assert second["deadline_ms"] < first["deadline_ms"]


def test_a_connection_lost_between_two_calls_costs_nothing(node: RawNode, client: NodeClient) -> None:
    client.ask("cam", "what?")
    node.lose_connections()
    assert client.ask("cam", "what?").text == "a red circle"


NODE_PROCESS = """
import sys, msgpack, zmq
router = zmq.Context().socket(zmq.ROUTER)
router.bind(sys.argv[1])
print("bound", flush=True)
while True:
    *envelope, body = router.recv_multipart()
    request = msgpack.unpackb(body)
    print("asked", flush=True)
    if sys.argv[2] == "answer":
        pong = {"live": True, "ready": True, "engine_progress_age_ms": 1.0}
        reply = {"v": 1, "id": request["id"], "status": "ok", "node": "n", "session": "s", "data": pong}
        router.send_multipart([*envelope, msgpack.packb(reply)])
"""


def _node_process(endpoint: str, manner: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", NODE_PROCESS, endpoint, manner]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "bound\n"
    return process


def test_a_node_killed_mid_question_is_no_reply_in_time_and_the_restarted_one_answers(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/node"
    with NodeClient(endpoint, endpoint, timeout_s=0.5) as client, ThreadPoolExecutor(1) as pool:
        with _node_process(endpoint, "hang") as process:
            asked = pool.submit(client.ping)
            assert process.stdout is not None
            assert process.stdout.readline() == "asked\n"
            process.send_signal(signal.SIGKILL)
            with pytest.raises(NoReplyError):
                asked.result(timeout=5.0)
        with _node_process(endpoint, "answer") as process:
            assert client.ping(timeout_s=5.0).ready
            process.kill()


def test_an_answer_comes_piece_by_piece_and_then_whole(node: RawNode, client: NodeClient) -> None:
    node.answers = lambda request: [
        ok(request, {"n": 0, "delta": "a red"}, "partial"),
        ok(request, {"n": 1, "delta": " circle"}, "partial"),
        ok(request, ANSWER),
    ]
    *pieces, answer = client.ask_stream("cam", "what?")
    assert pieces == [PartialAnswer(n=0, delta="a red"), PartialAnswer(n=1, delta=" circle")]
    assert isinstance(answer, Answer)
    assert node.seen.get_nowait()["stream_reply"] is True


def test_pieces_that_are_sent_again_are_shown_once(node: RawNode, client: NodeClient) -> None:
    node.answers = lambda request: [
        *(ok(request, {"n": n, "delta": str(n)}, "partial") for n in (0, 1, 0, 1, 2)),
        ok(request, ANSWER),
    ]
    *pieces, _ = client.ask_stream("cam", "what?")
    assert [piece.n for piece in pieces if isinstance(piece, PartialAnswer)] == [0, 1, 2]


def test_closing_an_answer_early_cancels_the_question(node: RawNode, client: NodeClient) -> None:
    def one_piece(request: Fields) -> Iterator[Fields]:
        is_question = request["endpoint"] == "ask"
        yield ok(request, {"n": 0, "delta": "a"} if is_question else {}, "partial" if is_question else "ok")

    node.answers = one_piece
    pieces = client.ask_stream("cam", "what?")
    next(pieces)
    pieces.close()  # pyright: ignore[reportAttributeAccessIssue]
    question, cancel = node.seen.get_nowait(), node.seen.get_nowait()
    assert cancel["endpoint"] == "cancel"
    assert cancel["data"] == {"id": question["id"], "session": client.session}


def test_an_answer_that_is_whole_is_not_cancelled(node: RawNode, client: NodeClient) -> None:
    pieces = client.ask_stream("cam", "what?")
    next(pieces)
    pieces.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert node.seen.get_nowait()["endpoint"] == "ask"
    assert node.seen.empty()


def test_an_error_in_the_middle_of_an_answer_is_raised(node: RawNode, client: NodeClient) -> None:
    node.answers = lambda request: [
        ok(request, {"n": 0, "delta": "a"}, "partial"),
        error(request, code="CANCELLED"),
    ]
    with pytest.raises(NodeError, match="CANCELLED"):
        list(client.ask_stream("cam", "what?"))
    assert node.seen.qsize() == 1


def test_a_request_of_ones_own_name_can_be_cancelled(node: RawNode, client: NodeClient) -> None:
    client.ask("cam", "what?", request_id="q1")
    client.cancel("q1")
    assert node.seen.get_nowait()["id"] == "q1"
    assert node.seen.get_nowait()["data"] == {"id": "q1", "session": client.session}


def test_a_giant_request_is_refused_before_it_is_sent(node: RawNode, client: NodeClient) -> None:
    with pytest.raises(NodeError, match="TOO_LARGE"):
        client.ask("cam", "?" * (5 << 20))
    assert client.ask("cam", "what?").text == "a red circle"


def test_waiting_for_a_node_ends_when_it_is_ready(node: RawNode, client: NodeClient) -> None:
    states = iter([False, False, True])
    node.answers = lambda request: [ok(request, {**REPLIES["ping"], "ready": next(states)})]
    client.wait_ready(5.0)
    assert node.seen.qsize() == 3


def test_a_wait_in_vain_names_the_time_it_was_given(tmp_path: Path) -> None:
    with (
        NodeClient(control=f"ipc://{tmp_path}/nowhere") as client,
        pytest.raises(NoReplyError, match=r"within 0\.2 s$"),
    ):
        client.wait_ready(0.2)


def test_a_node_that_is_alive_but_never_ready_is_named_as_such(node: RawNode, client: NodeClient) -> None:
    node.answers = lambda request: [ok(request, {**REPLIES["ping"], "ready": False})]
    with pytest.raises(NodeError, match="NOT_READY"):
        client.wait_ready(0.2)


def test_a_closed_client_says_so(node: RawNode) -> None:
    client = NodeClient(node.ask, node.control)
    client.ask("cam", "what?")
    client.close()
    for call in (lambda: client.ask("cam", "what?"), lambda: client.process_frame("cam", RED)):
        with pytest.raises(ClosedError):
            call()


def test_closing_ends_a_question_of_another_thread_at_once(node: RawNode) -> None:
    node.answers = nothing
    client = NodeClient(node.ask, node.control, timeout_s=30.0)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.ask, "cam", "what?")
        node.seen.get(timeout=5.0)
        client.close()
        with pytest.raises(ClosedError):
            asked.result(timeout=2.0)


def test_a_context_of_ones_own_stays_open(node: RawNode) -> None:
    with zmq.Context() as context:
        with NodeClient(node.ask, node.control, context=context) as client:
            client.ask("cam", "what?")
        assert not context.closed


class _Admission:
    def __init__(self, key: bytes) -> None:
        self._key = key

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self._key


SERVER, CLIENT, STRANGER = generate(), generate(), generate()


@pytest.fixture
def curve_node() -> Iterator[RawNode]:
    """A node that knows the key of CLIENT alone."""
    with RawNode(usual, lambda socket: become_server(socket, SERVER)) as node:
        authenticator = ThreadAuthenticator(node.context)
        authenticator.start()
        authenticator.configure_curve_callback(domain="onlooker", credentials_provider=_Admission(CLIENT.public))
        yield node
        authenticator.stop()


def _client_with_keys(node: RawNode, folder: Path, server: KeyPair, own: KeyPair) -> NodeClient:
    server_key, _ = write_keypair(folder, "server", server)
    _, client_key = write_keypair(folder, "own", own)
    return NodeClient(node.ask, node.control, timeout_s=20.0, server_key=server_key, client_key=client_key)


def test_the_right_keys_get_an_answer(curve_node: RawNode, tmp_path: Path) -> None:
    with _client_with_keys(curve_node, tmp_path, SERVER, CLIENT) as client:
        assert client.ask("cam", "what?").text == "a red circle"


@pytest.mark.parametrize(
    ("server", "own"), [(STRANGER, CLIENT), (SERVER, STRANGER)], ids=["wrong server key", "unlisted key"]
)
def test_wrong_keys_are_an_error_at_once_and_not_a_silence(
    curve_node: RawNode, tmp_path: Path, server: KeyPair, own: KeyPair
) -> None:
    with _client_with_keys(curve_node, tmp_path, server, own) as client:
        with pytest.raises(AuthError):  # after a silence it would be another one
            client.ask("cam", "what?")
        with pytest.raises(AuthError):
            client.status()


def test_no_keys_where_the_node_wants_them_is_an_error_at_once(curve_node: RawNode) -> None:
    with NodeClient(curve_node.ask, curve_node.control, timeout_s=20.0) as client, pytest.raises(AuthError):
        client.ask("cam", "what?")


def test_keys_where_the_node_has_none_are_an_error_at_once(node: RawNode, tmp_path: Path) -> None:
    with _client_with_keys(node, tmp_path, SERVER, CLIENT) as client, pytest.raises(AuthError, match="CURVE"):
        client.ask("cam", "what?")


class RawFrames:
    """A SUB socket for frames, read by a thread."""

    def __init__(self, context: zmq.Context) -> None:
        self._socket = context.socket(zmq.SUB)
        self._socket.set(zmq.LINGER, 0)
        self._socket.set(zmq.RCVHWM, 1)
        self._socket.subscribe(b"frame/")
        self._socket.bind("tcp://127.0.0.1:*")
        self.endpoint = self._socket.get_string(zmq.LAST_ENDPOINT)
        self.received: queue.Queue[list[bytes]] = queue.Queue()
        self.is_reading = True
        self._should_stop = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._should_stop:
            if self._socket.poll(5) and self.is_reading:
                self.received.put(self._socket.recv_multipart())

    def close(self) -> None:
        self._should_stop = True
        self._thread.join()
        self._socket.close()


@pytest.fixture
def frames(node: RawNode) -> Iterator[RawFrames]:
    frames = RawFrames(node.context)
    yield frames
    frames.close()


@pytest.fixture
def feeder(node: RawNode, frames: RawFrames) -> Iterator[NodeClient]:
    with NodeClient(node.ask, node.control, frames=frames.endpoint, timeout_s=5.0) as client:
        yield client


def _header(parts: list[bytes]) -> Fields:
    return msgspec.msgpack.decode(parts[2])


def test_pictures_become_frames_of_one_session(feeder: NodeClient, frames: RawFrames) -> None:
    assert feeder.process_frame("cam", RED, ts=5, manual_time=1.0) == 0
    assert feeder.process_chunk("cam", [RED, RED], ts=[6, 7]) == 2
    messages = [frames.received.get(timeout=5.0) for _ in range(3)]
    headers = [_header(parts) for parts in messages]
    assert [header["ts"] for header in headers] == [5, 6, 7]
    assert len({header["session"] for header in headers}) == 1
    assert messages[0][3] == RED.tobytes()


def test_a_chunk_needs_a_time_for_each_picture(feeder: NodeClient) -> None:
    with pytest.raises(ValueError, match="time each"):
        feeder.process_chunk("cam", [RED, RED], ts=[6])
    with pytest.raises(ValueError, match="pictures"):
        feeder.process_chunk("cam", [])


def test_ending_a_stream_is_an_end_of_stream_and_more_pictures_a_new_session(
    feeder: NodeClient, frames: RawFrames
) -> None:
    feeder.end_stream("cam")
    feeder.process_frame("cam", RED)
    feeder.end_stream("cam")
    feeder.end_stream("cam")
    assert feeder.process_frame("cam", RED) == 0
    feeder.close()
    headers = [_header(frames.received.get(timeout=5.0)) for _ in range(4)]
    assert [header["eos"] for header in headers] == [False, True, False, True]
    assert headers[0]["session"] == headers[1]["session"] != headers[2]["session"] == headers[3]["session"]


def test_pictures_for_a_node_that_is_not_there_are_an_error_in_time(node: RawNode, tmp_path: Path) -> None:
    client = NodeClient(node.ask, frames=f"ipc://{tmp_path}/nobody", timeout_s=0.1)
    with client, pytest.raises(NoReplyError):
        client.process_frame("cam", RED)


def test_a_node_that_does_not_read_is_an_error_in_time_and_closing_still_works(
    node: RawNode, frames: RawFrames
) -> None:
    picture = np.zeros((1024, 1024, 3), np.uint8)
    frames.is_reading = False
    with NodeClient(node.ask, node.control, frames=frames.endpoint, timeout_s=0.2) as client:
        with pytest.raises(NoReplyError):
            for _ in range(100):
                client.process_frame("cam", picture)
        with pytest.raises(NoReplyError):
            client.end_stream("cam")


def _streams(cache: Fields, frames: Fields) -> Callable[[Fields], Iterable[Fields]]:
    stream = {**STREAM, "cache": {**CACHE, **cache}, "frames": {**FRAMES, **frames}}
    return lambda request: [ok(request, {"streams": [stream]})]


def test_a_picture_counts_as_encoded_once_the_memory_is_as_new(feeder: NodeClient, node: RawNode) -> None:
    seq = feeder.process_frame("cam", RED, ts=100)
    node.answers = _streams({}, {"last_seq": 0, "pending": 1})
    with ThreadPoolExecutor(1) as pool:
        waited = pool.submit(feeder.wait_encoded, "cam", seq)
        node.seen.get(timeout=5.0)
        node.seen.get(timeout=5.0)
        assert not waited.done()
        node.answers = _streams({"newest_seq": 0, "newest_ns": 100}, {"last_seq": 0})
        assert waited.result(timeout=5.0) is True


def test_the_number_of_an_earlier_session_does_not_count(feeder: NodeClient, node: RawNode) -> None:
    seq = feeder.process_frame("cam", RED, ts=100)
    node.answers = _streams({"newest_seq": 9, "newest_ns": 99}, {"last_seq": 9, "last_session": "earlier"})
    assert feeder.wait_encoded("cam", seq, 0.1) is False
    assert node.seen.qsize() > 2


def test_a_number_in_a_memory_that_is_older_than_the_picture_does_not_count(feeder: NodeClient, node: RawNode) -> None:
    seq = feeder.process_frame("cam", RED, ts=100)
    node.answers = _streams({"newest_seq": 9, "newest_ns": 99}, {"last_seq": 0, "pending": 1})
    assert feeder.wait_encoded("cam", seq, 0.1) is False
    assert node.seen.qsize() > 2


def test_a_picture_that_was_dropped_is_known_before_the_time_is_up(feeder: NodeClient, node: RawNode) -> None:
    seq = feeder.process_frame("cam", RED, ts=100)
    node.answers = _streams({}, {"last_seq": 0, "pending": 0, "dropped": {"sampled_out": 1}})
    assert feeder.wait_encoded("cam", seq, 3600.0) is False


def test_waiting_for_a_picture_that_was_never_given_is_a_mistake(feeder: NodeClient, node: RawNode) -> None:
    with pytest.raises(ValueError, match="no pictures"):
        feeder.wait_encoded("cam", 0)


def test_waiting_for_a_picture_of_an_unknown_stream_is_an_error(feeder: NodeClient, node: RawNode) -> None:
    seq = feeder.process_frame("cam", RED)
    node.answers = lambda request: [ok(request, {"streams": []})]
    with pytest.raises(NodeError, match="UNKNOWN_STREAM"):
        feeder.wait_encoded("cam", seq)
