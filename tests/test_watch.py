import io
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from commands import endpoint_flags, onlooker, start_onlooker
from deadline import until
from fakes import FakeEngine
from msgspec.structs import replace
from nodes import remember, running_node
from records import NS, hello, node_stats, stream_stats
from rich.console import Console

from onlooker.node.node import Node
from onlooker.protocol.messages import UNSET, Event, StageTimings
from onlooker.tools.watch import View, fitted, render


def drawn(view: View, now: float) -> str:
    console = Console(width=120, file=io.StringIO())
    console.print(render(view, now))
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.fixture
def view() -> View:
    view = View("tcp://127.0.0.1:1")
    for record in (hello(), node_stats(), stream_stats()):
        view.take(record, now=100.0)
    return view


@pytest.mark.parametrize(
    "words",
    [
        "n1  ready for 1 min 30 s",
        "bfloat16 on cuda:0",
        "the weights are untrained",
        "7.5 GB",
        "60 GB",
        "gate online",
        "1920x1080 as 644x364",
        "25%  250 of 1000 tokens",
        "16 kB of 64 kB, 8 frames of 2.5 s",
        "received 12, kept 8, encoded 8",
        "sampled_out 3, ring_full 1; 5 never arrived",
        "lag 120 ms, decode 4 ms, vision 30 ms",
        "answered 2",
        "failed BUSY 1",
        "traces left: 0",
    ],
)
def test_what_is_known_is_shown(view: View, words: str) -> None:
    assert words in drawn(view, now=100.0)


def test_what_is_unknown_is_left_out(view: View) -> None:
    view.take(stream_stats(lag_ms=UNSET, stages=StageTimings(), received_size=UNSET), now=100.0)
    text = drawn(view, now=100.0)
    assert "lag" not in text
    assert "other processes" not in text
    assert "none yet" in text


def test_the_settings_that_decide_over_a_memory_are_shown(view: View) -> None:
    view.take(stream_stats(retention="window", gate=10.0, drop=0.95), now=100.0)
    assert "native, 4 a chunk, retention window, gate 10, drop 0.95" in drawn(view, now=100.0)


def test_the_last_frames_and_what_was_given_up_are_shown_where_there_are_any(view: View) -> None:
    assert "the last" not in drawn(view, now=100.0) and "given up" not in drawn(view, now=100.0)
    view.take(stream_stats(last_frames=16, degraded=["frame_rate"]), now=100.0)
    text = drawn(view, now=100.0)
    assert "the last 16 frames at most" in text and "given up: frame_rate" in text


def test_a_silent_node_is_offline_and_what_was_known_stays(view: View) -> None:
    text = drawn(view, now=104.0)
    assert "node offline, silent for 4 s" in text
    assert "250 of 1000 tokens" in text


def test_a_node_that_is_heard_again_is_online(view: View) -> None:
    view.take(node_stats(uptime_s=95.0), now=105.0)
    assert view.is_online(105.5)


def test_silence_is_measured_in_the_node_s_own_periods(view: View) -> None:
    view.take(node_stats(uptime_s=100.0), now=110.0)
    assert view.is_online(140.0)
    assert not view.is_online(150.0)


def test_a_report_that_comes_early_after_a_late_one_makes_no_short_period(view: View) -> None:
    for uptime_s in (100.0, 102.9, 103.0):  # a report a second; one of them was late
        view.take(node_stats(uptime_s=uptime_s), now=uptime_s)
    assert view.is_online(104.0)


def test_before_the_first_record_the_node_is_offline() -> None:
    assert "node offline" in drawn(View("tcp://127.0.0.1:1"), now=0.0)


def test_a_restarted_node_starts_from_nothing(view: View) -> None:
    view.take(hello(session="s2", streams=()), now=101.0)
    assert view.stats is None
    assert not view.streams


def test_events_are_shown_the_newest_first_and_bounded(view: View) -> None:
    for n in range(20):
        view.take(Event(ts=NS * n, kind="x", stream="gate", message=f"event {n}"), now=100.0)
    text = drawn(view, now=100.0)
    assert text.index("event 19") < text.index("event 18")
    assert "event 1 " not in text


def test_a_removed_stream_disappears(view: View) -> None:
    view.take(Event(ts=NS, kind="stream_removed", stream="gate", message="gone"), now=100.0)
    assert "250 of 1000" not in drawn(view, now=100.0)


@pytest.mark.parametrize("state", ["waiting", "offline", "paused", "ended"])
def test_only_a_memory_that_fills_says_when_it_is_full(view: View, state: str) -> None:
    filling = replace(stream_stats().cache, seconds_until_full=30.0)
    view.take(stream_stats(cache=filling), now=100.0)
    assert "full in 30 s" in drawn(view, now=100.0)
    view.take(stream_stats(cache=filling, state=state), now=100.0)
    assert "full in" not in drawn(view, now=100.0)


@pytest.mark.parametrize(("height", "num_streams"), [(24, 1), (24, 5), (40, 2), (40, 9), (200, 9)])
def test_on_a_small_terminal_questions_and_events_stay_and_what_is_left_out_is_said(
    view: View, height: int, num_streams: int
) -> None:
    names = ["gate", *(f"yard-{n}" for n in range(num_streams - 1))]
    for name in names:
        view.take(stream_stats(stream=name), now=100.0)
    for n in range(6):
        view.take(Event(ts=NS * n, kind="x", stream="gate", message=f"event {n}"), now=100.0)
    console = Console(width=100, height=height, file=io.StringIO())
    console.print(fitted(view, 100.0, console))
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert len(text.splitlines()) <= height
    assert "traces left: 0" in text
    assert "event 5" in text
    assert "Ctrl-C ends it" in text
    num_shown = sum(f"{name} online" in text for name in names)
    assert num_shown >= 1
    assert (f"and {num_streams - num_shown} more stream" in text) == (num_shown < num_streams)


# With a node


@pytest.fixture
def node() -> Iterator[Node]:
    with FakeEngine() as engine, running_node(engine, telemetry__period_s=0.1) as node:
        remember(engine, 4)
        yield node


def test_one_picture_of_a_running_node(node: Node) -> None:
    ended = onlooker("watch", "--once", *endpoint_flags(node, "telemetry"))
    assert ended.status == 0
    assert "16 of 100000 tokens" in ended.out


def test_one_document_of_a_running_node(node: Node) -> None:
    facts = onlooker("watch", "--once", "--json", *endpoint_flags(node, "telemetry")).json
    assert facts["hello"]["node"] == facts["stats"]["model"].replace("fake", "n1")
    assert [stream["cache"]["logical_bytes"] for stream in facts["streams"]] == [16 * 64]


def test_no_telemetry_in_time_is_no_reply() -> None:
    ended = onlooker("watch", "--once", "--timeout", 0.2, "--telemetry", "ipc:///nowhere/at/all")
    assert (ended.status, ended.err) == (
        3,
        "onlooker: no node answers at ipc:///nowhere/at/all; is one running? onlooker node\n",
    )


def test_each_record_is_a_line_of_json_until_ctrl_c(node: Node) -> None:
    with start_onlooker("watch", "--json", *endpoint_flags(node, "telemetry")) as command:
        assert command.stdout is not None
        lines = [command.stdout.readline() for _ in range(5)]
        command.send_signal(signal.SIGINT)
        assert command.wait(10) == 0
    assert any(line.startswith('{"topic":"stats/n1/"') for line in lines)
    assert all(line.endswith("}\n") for line in lines)


def test_without_a_terminal_a_form_has_to_be_chosen(node: Node) -> None:
    assert onlooker("watch", *endpoint_flags(node, "telemetry")).status == 2


class Screen:
    """A command on a terminal, and everything that it wrote there."""

    def __init__(self, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "60"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "onlooker.tools.cli", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
        )
        os.close(slave)
        self.written = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                self.written += os.read(self._master, 65536).decode(errors="replace")
            except OSError:  # the terminal ends with its last process
                return

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(5)
        os.close(self._master)


def test_on_a_terminal_a_node_that_dies_is_offline_and_comes_back() -> None:
    settings = {"telemetry__period_s": 0.1}
    with FakeEngine() as engine, running_node(engine, **settings) as node:
        endpoint = node.endpoints["telemetry"]
        terminal = Screen("watch", "--telemetry", endpoint)
        until(lambda: "front waiting" in terminal.written or "ready" in terminal.written, 10)
    try:
        until(lambda: "node offline" in terminal.written, 10)
        before = len(terminal.written)
        with FakeEngine() as engine, running_node(engine, endpoints__telemetry=endpoint, **settings):
            until(lambda: "ready" in terminal.written[before:], 10)
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.process.wait(10) == 0
    finally:
        terminal.close()
