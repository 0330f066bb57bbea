"""`onlooker ask` and the small commands of the memory, against a node with an engine that repeats the question."""

import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from commands import Ended, endpoint_flags, onlooker, start_onlooker
from deadline import until
from fakes import FakeEngine
from msgspec.structs import replace
from nodes import remember, running_node
from replies import MEMORY

from onlooker.node.node import Node
from onlooker.protocol.messages import Answer, TimeRange
from onlooker.tools import connection
from onlooker.tools.ask import knowledge_text


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


def test_it_says_until_when_nothing_new_came() -> None:
    seen = replace(MEMORY, seen_until_ns=10**10)
    assert "the newest of 0.00 s of the file, and nothing new until 10.00 s of the file (8" in knowledge_text(seen)


@pytest.mark.parametrize(
    ("from_s", "until_s", "seconds", "forgotten_s", "text"),
    [
        (4, 6, 2.0, 4.0, ", 5 forgotten: forgotten until 4.00 s of the file"),
        (5, 1, 2.0, 5.0, ", 5 forgotten: 5 s of a file that has started over"),
        (1, 3, 2.0, 7.0, ", 5 forgotten: 7 s of a file that has started over"),
    ],
    ids=["once", "in the memory", "before it"],
)
def test_no_time_of_a_file_that_has_started_over_says_what_is_forgotten(
    from_s: int, until_s: int, seconds: float, forgotten_s: float, text: str
) -> None:
    gone = TimeRange(from_ns=0, until_ns=4 * 10**9, known="forgotten", num_frames=0)
    looped = replace(
        MEMORY,
        from_ns=from_s * 10**9,
        until_ns=until_s * 10**9,
        seconds=seconds,
        num_forgotten_frames=5,
        seconds_forgotten=forgotten_s,
        ranges=[gone],
    )
    assert knowledge_text(looped).endswith(text)


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
    assert f"no node answers at {nowhere}; is one running? onlooker node" in ended.err


def test_a_node_that_is_not_there_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "PING_TIMEOUT_S", 0.2)
    ended = onlooker("status", "--control", f"ipc://{tmp_path}/nowhere", "--timeout", 3600)
    assert ended.status == 3
    assert "is one running?" in ended.err


@pytest.mark.parametrize("command", ["status", "streams", "marks"])
def test_a_node_that_is_loading_its_model_is_waited_for(command: str, engine: FakeEngine) -> None:
    with running_node(None) as node, start_onlooker(command, *endpoint_flags(node, "control")) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "the node is loading its model ...\n"
        node.attach(engine)
        assert process.wait(10) == 0


def test_a_node_that_loads_for_too_long_is_told_from_one_that_is_not_there() -> None:
    with running_node(None) as node:
        ended = control(node, "streams", "--timeout", 0.1)
    assert ended.status == 1
    assert "the model is still being loaded after 0.1 s; --timeout waits longer" in ended.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("ask", " "), "more than white space"),
        (("ask", "x", "--stream", "back yard"), "a name has 1 to 64 characters"),
        (("ask", "x", "--as-of", ""), "a name has 1 to 64 characters"),
        (("ask", "x", "-c", "yes", "-c", ""), "more than white space"),
        (("mark", "a/b"), "a name has 1 to 64 characters"),
        (("reset", "a/b"), "a name has 1 to 64 characters"),
        (("add", "x" * 65), "a name has 1 to 64 characters"),
        (("marks", "--delete", "a b"), "a name has 1 to 64 characters"),
        (("camera", "0", "--stream", "a b"), "a name has 1 to 64 characters"),
    ],
    ids=lambda each: " ".join(each)[:20] if isinstance(each, tuple) else "",
)
def test_a_name_or_a_question_that_is_none_is_refused_before_it_is_sent(arguments: tuple[str, ...], words: str) -> None:
    ended = onlooker(*arguments)
    assert ended.status == 2
    assert words in " ".join(ended.err.replace("│", " ").split())


def test_an_error_amid_an_answer_begins_on_a_line_of_its_own(node: Node, engine: FakeEngine) -> None:
    engine.word_s = 0.1
    ended = ask(node, " ".join(["word"] * 60), "--timeout", 1)
    assert ended.status in (1, 3)
    assert ended.out.startswith("word word")
    assert ended.out.endswith("word\n")


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


def test_the_prompt_of_a_stream_that_is_none_does_not_open(node: Node) -> None:
    master, slave = pty.openpty()
    flags = ("--stream", "nowhere", *endpoint_flags(node, "ask", "control"))
    command = [sys.executable, "-m", "onlooker.tools.cli", "ask", *flags]
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=subprocess.PIPE, text=True) as process:
        os.close(slave)
        _, err = process.communicate(timeout=20)
    os.close(master)
    assert process.returncode == 1
    assert "UNKNOWN_STREAM" in err
    assert "Ask about" not in err


def test_what_was_cancelled_is_said_on_a_line_of_its_own(node: Node, engine: FakeEngine) -> None:
    engine.word_s = 0.1
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "onlooker.tools.cli", "ask", *endpoint_flags(node, "ask", "control")]
    written = ""
    environment = {**os.environ, "TERM": "dumb"}
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment) as process:
        os.close(slave)
        while "? " not in written:
            written += os.read(master, 4096).decode()
        os.write(master, b"one two three " * 9 + b"\n")
        while not re.search(r"\n[^?\n]*one two", written):  # the answer, not the echo of what was typed
            written += os.read(master, 4096).decode()
        process.send_signal(signal.SIGINT)
        while "? " not in written.partition("(cancelled)")[2]:
            written += os.read(master, 4096).decode()
        os.write(master, b"\n")
        assert process.wait(10) == 0
    os.close(master)
    assert re.search(r"[a-z ]\r?\n\S*\(cancelled\)", written)


class NotingEngine(FakeEngine):
    """A fake engine that says something with every answer."""

    def ask(self, *arguments: Any, **settings: Any) -> Future[Answer]:
        noted: Future[Answer] = Future()
        plain = super().ask(*arguments, **settings)
        plain.add_done_callback(lambda done: noted.set_result(replace(done.result(), notice="It is noise.")))
        return noted


def test_a_note_is_said_once_in_a_conversation() -> None:
    with NotingEngine() as engine, running_node(engine) as node:
        remember(engine, 4)
        ended = ask(node, input="first\nsecond\n")
    assert ended.out == "first\nsecond\n"
    assert ended.err.count("It is noise.") == 1


# status, streams, add, remove, pause, resume, reset, mark, rollback, marks


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


def test_a_stream_is_added_with_its_memory(node: Node, engine: FakeEngine) -> None:
    assert control(node, "add", "gate", "--memory", "16MiB").status == 0
    assert engine._memories["gate"].options.memory_bytes == 16 << 20
    assert "512MiB" in control(node, "add", "yard", "--memory", "much").err


def test_a_stream_is_told_that_it_reserves_more_than_it_can_use(node: Node) -> None:
    assert "that takes 6.4 MB of the memory: a smaller --memory" in control(node, "add", "gate", "--memory", "1GiB").out
    assert "that takes" not in control(node, "add", "yard", "--memory", "12MiB").out


def test_a_stream_is_added_with_what_others_leave_of_its_memory(engine: FakeEngine) -> None:
    with running_node(engine, limits__max_memory_bytes="20MiB", stream_defaults__memory_bytes="16MiB") as node:
        assert "TOO_LARGE" in control(node, "add", "gate", "--memory", "32MiB").err
        added = control(node, "add", "gate", "--memory", "16MiB", "--min-memory", "1MiB", "--fps", "2")
    assert "(4.19 MB of memory reserved instead of 16.8 MB: other streams have the rest)" in added.out
    assert engine._memories["gate"].options.fps == 2.0


def test_a_stream_is_added_with_its_retention(node: Node) -> None:
    assert control(node, "add", "gate", "--retention", "thin", "--json").json["retention"] == "thin"
    assert control(node, "streams", "--json").json[0]["retention"] == "stop"
    assert "--retention" in control(node, "add", "yard", "--retention", "never").err


def test_a_stream_is_added_that_may_give_up_quality(node: Node, engine: FakeEngine) -> None:
    assert control(node, "add", "gate", "--degrade").status == 0
    assert control(node, "add", "yard", "--no-degrade").status == 0
    assert [engine._memories[name].options.degrade for name in ("gate", "yard")] == [True, False]


def test_a_stream_is_added_with_its_last_frames(node: Node) -> None:
    assert control(node, "add", "gate", "--last-frames", "8", "--json").json["last_frames"] == 8
    assert "last_frames" not in control(node, "streams", "--json").json[0]
    front, gate = control(node, "streams").out.splitlines()
    assert "the last 8 frames at most" in gate and "the last" not in front
    assert "last_frames must be 0 or at least" in control(node, "add", "yard", "--last-frames", "2").err


def test_a_stream_is_added_with_its_gate_and_drop(node: Node) -> None:
    added = control(node, "add", "gate", "--gate", "10", "--drop", "0.9", "--json").json
    assert (added["gate"], added["drop"]) == (10.0, 0.9)
    assert not {"gate", "drop"} & control(node, "streams", "--json").json[0].keys()
    assert "--drop" in control(node, "add", "yard", "--drop", "2").err


def test_a_stream_is_added_and_removed(node: Node, engine: FakeEngine) -> None:
    added = control(node, "add", "gate")
    assert (added.status, added.out.split(" (")[0]) == (0, "stream gate added to the node")
    assert "it holds 25000 frames of the largest pictures, 16 tokens a chunk" in added.out
    assert set(engine.streams()) == {"front", "gate"}
    assert "STREAM_EXISTS" in control(node, "add", "gate").err
    assert control(node, "remove", "gate").status == 0
    assert set(engine.streams()) == {"front"}


def test_a_stream_is_paused_and_resumed(node: Node) -> None:
    assert control(node, "pause", "front").status == 0
    assert control(node, "streams").out.startswith("front: paused")
    assert control(node, "resume", "front").status == 0
    assert control(node, "streams").out.startswith("front: waiting")


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


def test_what_is_wrong_with_a_key_file_is_said_with_its_option(tmp_path: Path) -> None:
    assert onlooker("keygen", tmp_path, "me").status == 0
    public, secret = tmp_path / "me.key", tmp_path / "me.key_secret"
    cases = [
        ((public, public), "--client-key", "this is a public key"),
        ((public, tmp_path / "none"), "--client-key", "No such file"),
        ((tmp_path / "none", secret), "--server-key", "No such file"),
        ((tmp_path, secret), "--server-key", "directory"),
    ]
    for (server, client), option, words in cases:
        err = onlooker("status", "--server-key", server, "--client-key", client).err
        assert f"Invalid value for {option}: " in err
        assert words in " ".join(err.replace("│", " ").split())
    assert "--client-key" in onlooker("status", "--server-key", public).err


def test_defaults_of_endpoints_are_not_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = " ".join(onlooker("replay", "--help").out.replace("│", " ").split())
    assert "127.0.0.1" not in out
    assert "Default: port 5561 of this machine." in out
