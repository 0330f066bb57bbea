"""What a page knows, against a node around a fake engine."""

from collections.abc import Iterator
from functools import partial

import pytest
from deadline import until
from fakes import FakeEngine
from nodes import remember, running_node
from records import NS, hello, node_stats, stream_stats

from onlooker.node.node import Node
from onlooker.protocol.client import NodeClient
from onlooker.protocol.errors import AuthError, ClosedError, ErrorCode, NodeError, NoReplyError
from onlooker.protocol.messages import Answer, Choice, Event
from onlooker.protocol.telemetry import TelemetrySubscriber
from onlooker.tools import web_session
from onlooker.tools.web_session import MAX_QUESTIONS, MAX_SAMPLES, Knowledge, Question, Session, in_words


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    with FakeEngine() as engine:
        yield engine


@pytest.fixture
def node(engine: FakeEngine) -> Iterator[Node]:
    with running_node(engine, telemetry__period_s=0.05) as node:
        yield node


@pytest.fixture
def session(node: Node, monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    monkeypatch.setattr(web_session, "MARKS_PERIOD_S", 0.05)
    places = node.endpoints
    client = NodeClient(places["ask"], places["control"], timeout_s=5.0)
    with Session(client, partial(TelemetrySubscriber, places["telemetry"]), places["telemetry"]) as session:
        yield session


def test_it_hears_of_the_node_and_its_streams(session: Session) -> None:
    until(lambda: session.presence.is_online and session.stream_names == ["front"])
    assert session.presence.num_restarts == 0


def test_several_questions_are_answered_at_once_each_with_its_proof(engine: FakeEngine, session: Session) -> None:
    remember(engine)
    engine.hold()
    questions = [Question("front", f"say {n} and more") for n in range(3)]
    for question in questions:
        session.ask(question)
    assert len(session.running) == 3
    engine.let_go()
    until(lambda: not session.running)
    for question in questions:
        assert isinstance(question.reply, Answer)
        assert question.answer == question.text
        assert question.reply.memory.unchanged


def test_an_answer_is_shown_while_it_grows(engine: FakeEngine, session: Session) -> None:
    remember(engine)
    engine.word_s = 0.02
    question = Question("front", "one two three four five six seven eight nine ten")
    session.ask(question)
    until(lambda: question.answer.startswith("one"))
    assert question.state == "running"
    assert question.answer != question.text


def test_a_choice_has_a_score_for_each_option(engine: FakeEngine, session: Session) -> None:
    remember(engine)
    question = Question("front", "which?", ("a circle", "a square"))
    session.ask(question)
    until(lambda: question.state == "answered")
    assert isinstance(question.reply, Choice)
    assert question.answer == question.reply.option
    assert {score.option for score in question.reply.scores} == set(question.options)


def test_a_question_that_fails_says_so_and_others_go_on(engine: FakeEngine, session: Session) -> None:
    remember(engine)
    failing, fine = Question("nowhere", "hm"), Question("front", "yes")
    session.ask(failing)
    session.ask(fine)
    until(lambda: not session.running)
    assert (failing.state, fine.state) == ("failed", "answered")
    assert failing.error is not None and "does not know this stream" in in_words(failing.error)


def test_what_is_running_can_be_cancelled(engine: FakeEngine, session: Session) -> None:
    remember(engine)
    engine.word_s = 0.05
    question = Question("front", " ".join(["word"] * 200))
    session.ask(question)
    until(lambda: question.answer)
    session.cancel_all()
    until(lambda: question.state == "failed")
    assert isinstance(question.error, NodeError) and question.error.code == ErrorCode.CANCELLED


def test_old_questions_make_room_and_those_that_are_over_are_cleared(engine: FakeEngine, session: Session) -> None:
    for n in range(MAX_QUESTIONS + 1):
        session.ask(Question("nowhere", f"question {n}"))
    assert len(session.questions) == MAX_QUESTIONS
    until(lambda: not session.running)
    session.clear_questions()
    assert session.questions == []


def test_marks_of_others_are_seen_too(engine: FakeEngine, session: Session, node: Node) -> None:
    remember(engine)
    with NodeClient(node.endpoints["ask"], node.endpoints["control"]) as other:
        other.mark("front", "lunch")
    until(lambda: [mark.name for mark in session.marks.get("front", [])] == ["lunch"])


def test_a_node_of_another_session_is_a_restart_that_forgot_everything() -> None:
    knowledge = Knowledge("tcp://127.0.0.1:1")
    for record in (hello("one"), node_stats(), stream_stats()):
        knowledge.take(record, 1.0)
    assert knowledge.timelines["gate"].num_remembered == 8
    knowledge.take(hello("one"), 2.0)
    assert (knowledge.num_restarts, knowledge.timelines["gate"].num_remembered) == (0, 8)
    knowledge.take(hello("two"), 3.0)
    assert (knowledge.num_restarts, knowledge.timelines["gate"].num_remembered) == (1, 0)
    assert knowledge.restarted_s is not None


def test_a_silent_node_is_not_online() -> None:
    knowledge = Knowledge("tcp://127.0.0.1:1")
    assert not knowledge.presence(0.0).has_been_seen
    knowledge.take(hello("one"), 1.0)
    assert knowledge.presence(2.0).is_online
    gone = knowledge.presence(60.0)
    assert (gone.is_online, gone.has_been_seen, gone.silent_s) == (False, True, 59.0)


def test_a_stream_that_was_removed_is_remembered_no_more() -> None:
    knowledge = Knowledge("tcp://127.0.0.1:1")
    knowledge.take(stream_stats(), 1.0)
    knowledge.take(Event(ts=2 * NS, kind="stream_removed", stream="gate", message="gone"), 2.0)
    assert knowledge.timelines["gate"].num_remembered == 0


def test_samples_of_device_memory_are_bounded() -> None:
    knowledge = Knowledge("tcp://127.0.0.1:1")
    for second in range(5 * MAX_SAMPLES):
        knowledge.take(node_stats(ts=second * NS), float(second))
    assert len(knowledge.samples) <= MAX_SAMPLES
    assert knowledge.samples[-1].time_s == 5 * MAX_SAMPLES - 1


@pytest.mark.parametrize("code", ErrorCode)
def test_every_error_of_a_node_is_said_in_words(code: ErrorCode) -> None:
    said = in_words(NodeError(code, "the node's own words"))
    assert said.endswith((".", ")"))
    assert not said.startswith(code)


def test_errors_of_the_connection_are_said_in_words() -> None:
    assert "did not answer" in in_words(NoReplyError("tcp://127.0.0.1:1", 1.0))
    assert "the key is unknown" in in_words(AuthError("tcp://127.0.0.1:1", "the key is unknown"))
    assert "closing" in in_words(ClosedError("closed"))
    assert "a newer code" in in_words(NodeError("LATER", "a newer code"))
