"""`onlooker ask` and the small commands of the memory, against a node with an engine that repeats the question."""

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Ended, endpoint_flags, onlooker, start_onlooker
from deadline import until
from fakes import FakeEngine
from nodes import remember, running_node

from onlooker.node.node import Node


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    with FakeEngine() as engine:
        yield engine


@pytest.fixture
def node(engine: FakeEngine) -> Iterator[Node]:
    with running_node(engine) as node:
        remember(engine, 4)
        yield node


def ask(node: Node, *arguments: object, input: str | None = None) -> Ended:
    return onlooker("ask", *arguments, *endpoint_flags(node, "ask", "control"), input=input)


def control(node: Node, *arguments: object) -> Ended:
    return onlooker(*arguments, *endpoint_flags(node, "control"))


# ask


@pytest.mark.parametrize("flags", [(), ("--no-stream",)])
def test_the_answer_alone_goes_to_standard_output(node: Node, flags: tuple[str, ...]) -> None:
    ended = ask(node, "is the door open", *flags)
    assert (ended.status, ended.out) == (0, "is the door open\n")


@pytest.mark.parametrize("flags", [(), ("--no-stream",)])
def test_an_answer_cannot_steer_the_terminal(node: Node, flags: tuple[str, ...]) -> None:
    out = ask(node, "red \x1b[31m \x07 \x9b1m café", *flags).out
    assert out == "red \ufffd[31m \ufffd \ufffd1m café\n"


def test_what_it_knew_how_long_it_took_and_the_proof_go_to_standard_error(node: Node) -> None:
    err = ask(node, "is the door open").err
    assert "knew 4 frames" in err
    assert "first token" in err
    assert "memory unchanged" in err


def test_a_choice_is_one_of_the_options_with_their_probabilities(node: Node) -> None:
    ended = ask(node, "which", "--choice", "circle", "--choice", "dot")
    assert (ended.status, ended.out) == (0, "dot\n")
    assert "95.3%  dot" in ended.err


def test_json_is_one_document(node: Node) -> None:
    facts = ask(node, "is it open", "--json").json
    assert (facts["stream"], facts["question"], facts["reply"]["text"]) == ("front", "is it open", "is it open")
    assert facts["reply"]["memory"]["unchanged"] is True


def test_json_of_a_choice_has_every_score(node: Node) -> None:
    facts = ask(node, "which", "-c", "yes", "-c", "no", "--json").json
    assert [score["option"] for score in facts["reply"]["scores"]] == ["yes", "no"]


def test_the_length_of_an_answer_can_be_bounded(node: Node) -> None:
    assert ask(node, "one two three", "--max-new-tokens", 2).out == "one two\n"


def test_an_answer_can_be_as_of_a_mark(node: Node, engine: FakeEngine) -> None:
    assert control(node, "mark", "before").status == 0
    remember(engine, 4, first_seq=4)
    assert ask(node, "x", "--json").json["reply"]["memory"]["num_frames"] == 8
    assert ask(node, "x", "--as-of", "before", "--json").json["reply"]["memory"]["num_frames"] == 4


def test_with_several_streams_one_has_to_be_named() -> None:
    with FakeEngine() as engine, running_node(engine, streams=[{"name": "gate"}]) as node:
        ended = ask(node, "x")
    assert ended.status == 2
    assert "front, gate" in ended.err


def test_a_refusal_is_told_with_its_code(node: Node) -> None:
    ended = ask(node, "x", "--stream", "nowhere")
    assert (ended.status, ended.out) == (1, "")
    assert "UNKNOWN_STREAM" in ended.err


def test_no_reply_has_a_status_of_its_own(tmp_path: Path) -> None:
    nowhere = f"ipc://{tmp_path}/nowhere"
    ended = onlooker("ask", "x", "-s", "front", "--ask", nowhere, "--control", nowhere, "--timeout", 0.2)
    assert ended.status == 3
    assert "no reply" in ended.err


@pytest.mark.parametrize(
    "flags",
    [("--choice", "only"), ("--max-new-tokens", 0), ("--temperature", -1), ("--timeout", 0), ("--ask", "nonsense")],
    ids=lambda flags: f"{flags[0]} {flags[1]}",
)
def test_a_flag_that_cannot_work_is_a_mistake_of_the_command_line(node: Node, flags: tuple[object, ...]) -> None:
    assert onlooker("ask", "x", *flags).status == 2


def test_without_a_question_every_line_of_standard_input_is_asked(node: Node) -> None:
    ended = ask(node, input="first one\n\nsecond one\n")
    assert (ended.status, ended.out) == (0, "first one\nsecond one\n")


def test_an_error_ends_a_question_but_not_the_conversation(node: Node, engine: FakeEngine) -> None:
    control(node, "reset", "front")
    ended = ask(node, input="first\nsecond\n")
    assert ended.status == 1
    assert ended.err.count("NO_FRAMES") == 2


def test_ctrl_c_cancels_the_question_at_the_node(node: Node, engine: FakeEngine) -> None:
    engine.word_s = 0.05
    flags = endpoint_flags(node, "ask", "control")
    with start_onlooker("ask", " ".join(["word"] * 60), *flags) as command:
        until(lambda: engine.question_counters().received, 20)
        command.send_signal(signal.SIGINT)
        assert command.wait(10) == 130
    until(lambda: engine.question_counters().failed.get("CANCELLED") == 1)


def test_on_a_terminal_there_is_a_prompt_until_an_empty_line(node: Node) -> None:
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "onlooker.tools.cli", "ask", *endpoint_flags(node, "ask", "control")]
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave) as process:
        os.close(slave)
        written = ""
        for typed in ("who is there\n", "\n"):
            while "? " not in written.rpartition("\n")[2]:
                written += os.read(master, 4096).decode()
            os.write(master, typed.encode())
            written += "\n"
        assert process.wait(10) == 0
    os.close(master)


# status, streams, reset, mark, rollback, marks


def test_status_names_the_node_and_its_model(node: Node) -> None:
    out = control(node, "status").out
    assert out.startswith("n1: ready")
    assert "model fake" in out


def test_status_in_json_is_what_the_node_says(node: Node) -> None:
    facts = control(node, "status", "--json").json
    assert facts["hello"]["streams"] == ["front"]
    assert facts["stats"]["questions"]["answered"] == 0


def test_streams_are_listed_with_what_is_remembered(node: Node) -> None:
    assert control(node, "streams").out.startswith("front: waiting; remembers 4 frames in 16 of 100000 tokens")
    assert control(node, "streams", "--json").json[0]["cache"]["num_tokens"] == 16


def test_a_reset_forgets(node: Node, engine: FakeEngine) -> None:
    assert "remembers 0 frames" in control(node, "reset", "front").out
    assert engine.chunks("front") == []


def test_a_rollback_forgets_what_came_after_the_mark(node: Node, engine: FakeEngine) -> None:
    assert control(node, "mark", "here").out == "here: 4 frames, 16 tokens\n"
    remember(engine, 2, first_seq=4)
    assert control(node, "rollback", "here", "--json").json["num_frames"] == 4


def test_marks_are_listed_and_deleted(node: Node) -> None:
    control(node, "mark", "a")
    control(node, "mark", "b", "--stream", "front")
    assert [line.split(":")[0] for line in control(node, "marks").out.splitlines()] == ["a", "b"]
    assert [mark["name"] for mark in control(node, "marks", "--delete", "a", "--json").json] == ["b"]


def test_an_unknown_mark_is_refused_with_its_code(node: Node) -> None:
    ended = control(node, "rollback", "nowhere")
    assert ended.status == 1
    assert "UNKNOWN_MARK" in ended.err


# keygen


def test_keys_are_written_once_and_the_secret_for_its_owner_alone(tmp_path: Path) -> None:
    ended = onlooker("keygen", tmp_path / "keys", "gate")
    secret = tmp_path / "keys" / "gate.key_secret"
    assert ended.out.splitlines() == [str(tmp_path / "keys" / "gate.key"), str(secret)]
    assert secret.stat().st_mode & 0o777 == 0o600
    before = secret.read_text()
    again = onlooker("keygen", tmp_path / "keys", "gate")
    assert again.status == 1
    assert "exists" in again.err
    assert secret.read_text() == before


def test_a_name_that_is_none_is_a_mistake_of_the_command_line(tmp_path: Path) -> None:
    assert onlooker("keygen", tmp_path, "../gate").status == 2
    assert list(tmp_path.iterdir()) == []
