"""What `onlooker metrics` exports is what the node said, as long as it says it."""

import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from commands import endpoint_flags, onlooker, start_onlooker
from deadline import until
from fakes import FakeEngine
from msgspec.structs import replace
from nodes import remember, running_node
from prometheus_client import CollectorRegistry, generate_latest
from records import NS, hello, node_stats, stream_stats
from telemetry_publisher import TelemetryPublisher
from test_commands import run_without

from onlooker.protocol.errors import DropReason, ErrorCode
from onlooker.protocol.messages import UNSET, Event, QuestionCounters, StageTimings
from onlooker.tools.exporter import Exporter
from onlooker.tools.families import DROPPED, EVENT_KINDS, FAMILIES, OF_HEARING, REJECTED
from onlooker.tools.metrics import parse_address, serving

ROOT = Path(__file__).parent.parent
Values = dict[tuple[str, ...], float]


@dataclass(eq=False)
class Followed:
    """An exporter that has heard what was published, at a time of our own."""

    node: TelemetryPublisher
    exporter: Exporter
    now: float = 100.0

    def hear(self, *records: Any) -> None:
        for _ in range(self.node.publish(*records)):
            self.exporter.follow(5)

    def text(self) -> str:
        registry = CollectorRegistry()
        registry.register(self.exporter)
        return generate_latest(registry).decode()

    def samples(self) -> dict[str, Values]:
        """Values by the name of the metric and those of the labels, in the order they are exported."""
        found: dict[str, Values] = {}
        for family in self.exporter.collect():
            for sample in family.samples:
                found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
        return found


@pytest.fixture
def followed() -> Iterator[Followed]:
    with TelemetryPublisher() as node, node.subscriber() as subscriber:
        followed = Followed(node, Exporter(subscriber, node.endpoint, lambda: followed.now))
        yield followed


@pytest.mark.parametrize(
    ("name", "labels", "value"),
    [
        ("onlooker_node_info", ("n1", "0.1.0", "Qwen2.5-VL", "qwen2_5_vl", "bfloat16", "cuda:0"), 1),
        ("onlooker_node_state", ("n1", "ready"), 1),
        ("onlooker_node_state", ("n1", "stopping"), 0),
        ("onlooker_node_uptime_seconds", ("n1",), 90),
        ("onlooker_engine_progress_age_seconds", ("n1",), 0.001),
        ("onlooker_vram_bytes", ("n1", "weights"), 7.5e9),
        ("onlooker_vram_bytes", ("n1", "free"), 60e9),
        ("onlooker_questions_received_total", ("n1",), 3),
        ("onlooker_questions_failed_total", ("n1", "BUSY"), 1),
        ("onlooker_questions_failed_total", ("n1", "INTERNAL"), 0),
        ("onlooker_question_traces_total", ("n1",), 0),
        ("onlooker_messages_rejected_total", ("n1", "handshake_failed"), 0),
        ("onlooker_stream_state", ("n1", "gate", "online"), 1),
        ("onlooker_stream_state", ("n1", "gate", "offline"), 0),
        ("onlooker_stream_lag_seconds", ("n1", "gate"), 0.12),
        ("onlooker_frames_received_total", ("n1", "gate"), 12),
        ("onlooker_frames_dropped_total", ("n1", "gate", "sampled_out"), 3),
        ("onlooker_frames_dropped_total", ("n1", "gate", "memory_full"), 0),
        ("onlooker_frames_missed_total", ("n1", "gate"), 5),
        ("onlooker_chunk_stage_mean_seconds", ("n1", "gate", "vision"), 0.03),
        ("onlooker_memory_tokens", ("n1", "gate"), 250),
        ("onlooker_memory_capacity_tokens", ("n1", "gate"), 1000),
        ("onlooker_memory_logical_bytes", ("n1", "gate"), 16_000),
        ("onlooker_memory_resident_bytes", ("n1", "gate"), 64_000),
        ("onlooker_memory_span_seconds", ("n1", "gate"), 2.5),
        ("onlooker_memory_full", ("n1", "gate"), 0),
    ],
)
def test_what_a_node_says_is_exported_in_base_units(
    followed: Followed, name: str, labels: tuple[str, ...], value: float
) -> None:
    followed.hear(hello(), node_stats(), stream_stats())
    assert followed.samples()[name][labels] == pytest.approx(value)


def test_what_is_unknown_has_no_sample(followed: Followed) -> None:
    followed.hear(hello(), node_stats(), stream_stats(lag_ms=UNSET, stages=StageTimings()))
    samples = followed.samples()
    assert samples.keys().isdisjoint({"onlooker_stream_lag_seconds", "onlooker_chunk_stage_mean_seconds"})
    assert ("n1", "other_process") not in samples["onlooker_vram_bytes"]


def test_a_reason_of_a_newer_node_is_exported_too(followed: Followed) -> None:
    frames = replace(stream_stats().frames, dropped={"bored": 2})
    followed.hear(hello(), node_stats(), stream_stats(frames=frames))
    assert followed.samples()["onlooker_frames_dropped_total"]["n1", "gate", "bored"] == 2


def test_of_a_silent_node_only_what_the_exporter_knows_is_left(followed: Followed) -> None:
    followed.hear(hello(), node_stats(), stream_stats())
    followed.now += 3.6
    samples = followed.samples()
    assert samples["onlooker_up"] == {(followed.node.endpoint,): 0}
    assert samples.keys() == {family.name for family in OF_HEARING}


def test_a_node_that_is_heard_again_has_its_series_again(followed: Followed) -> None:
    followed.hear(hello(), node_stats(), stream_stats())
    followed.now += 60
    followed.hear(node_stats(uptime_s=150.0))
    samples = followed.samples()
    assert samples["onlooker_up"] == {(followed.node.endpoint,): 1}
    assert samples["onlooker_node_uptime_seconds"] == {("n1",): 150}


def test_a_restarted_node_counts_from_nothing_and_old_streams_are_gone(followed: Followed) -> None:
    followed.hear(hello(streams=("gate", "yard")), node_stats(), stream_stats(), stream_stats(stream="yard"))
    followed.hear(hello(session="s2"))
    assert "onlooker_questions_received_total" not in followed.samples()
    counters = QuestionCounters(received=1, answered=0, failed={}, waiting=1, running=0)
    frames = replace(stream_stats().frames, received=2, dropped={})
    followed.hear(node_stats(questions=counters), stream_stats(frames=frames))
    samples = followed.samples()
    assert samples["onlooker_questions_received_total"] == {("n1",): 1}
    assert samples["onlooker_frames_received_total"] == {("n1", "gate"): 2}
    assert samples["onlooker_frames_dropped_total"]["n1", "gate", "sampled_out"] == 0


def test_a_stream_that_was_removed_while_nobody_listened_is_gone(followed: Followed) -> None:
    followed.hear(hello(streams=("gate", "yard")), node_stats(), stream_stats(), stream_stats(stream="yard"))
    followed.hear(hello())  # as on every new connection
    assert followed.samples()["onlooker_memory_tokens"].keys() == {("n1", "gate")}


def test_events_are_counted_by_kind_over_restarts(followed: Followed) -> None:
    event = Event(ts=NS, kind="reset", stream="gate", message="the memory was forgotten")
    followed.hear(hello(), event, hello(session="s2"), event)
    samples = followed.samples()["onlooker_events_total"]
    assert samples[followed.node.endpoint, "reset"] == 2
    assert samples[followed.node.endpoint, "memory_full"] == 0


def test_records_that_never_came_and_those_that_are_none_are_counted(followed: Followed) -> None:
    followed.hear(node_stats())
    followed.node.lose(3, "stats/n1/")
    followed.hear(node_stats())
    followed.node.publish_parts(b"stats/n1/", b"short")
    followed.exporter.follow(0.2)
    samples = followed.samples()
    assert samples["onlooker_telemetry_missed_total"] == {(followed.node.endpoint,): 3}
    assert samples["onlooker_telemetry_malformed_total"] == {(followed.node.endpoint,): 1}


@pytest.mark.parametrize(
    ("stats", "is_ready", "reason"),
    [
        ({}, True, "ready"),
        ({"state": "stopping"}, False, "the node is stopping"),
        ({"engine_progress_age_ms": 12_000.0}, False, "the engine has not come round for 12 s"),
    ],
)
def test_a_node_is_ready_if_it_would_answer(followed: Followed, stats: dict[str, Any], is_ready: bool, reason: str):
    followed.hear(hello(), node_stats(**stats))
    assert (followed.exporter.readiness.is_ready, followed.exporter.readiness.reason) == (is_ready, reason)


def test_a_node_that_is_silent_is_not_ready(followed: Followed) -> None:
    assert not followed.exporter.readiness.is_ready
    followed.hear(hello(), node_stats())
    followed.now += 3.6
    assert followed.exporter.readiness.reason == f"no telemetry from {followed.node.endpoint}"


# Names


def test_names_are_of_prometheus_kind() -> None:
    for family in FAMILIES:
        assert re.fullmatch(r"onlooker_[a-z_]+", family.name)
        assert not re.search(r"_(ms|percent|ratio_total|count|sum|bucket)$", family.name)
        assert family.help.endswith(".") or family.help.endswith("defect.")
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


def test_each_reason_and_code_of_the_protocol_is_counted_somewhere() -> None:
    assert {*REJECTED, *DROPPED} == {*DropReason, "handshake_failed"}
    assert len(ErrorCode) > 10


def test_the_event_kinds_are_those_of_the_protocol() -> None:
    document = (ROOT / "protocol" / "PROTOCOL.md").read_text()
    table = document.partition("### Event kinds")[2].partition("Minor versions")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == set(EVENT_KINDS)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
def test_promtool_has_nothing_to_say(followed: Followed) -> None:
    followed.hear(hello(), node_stats(), stream_stats())
    check = subprocess.run(["promtool", "check", "metrics"], input=followed.text(), capture_output=True, text=True)
    assert (check.returncode, check.stdout + check.stderr) == (0, "")


# Over HTTP


def status_of(url: str, method: str = "GET") -> int:
    return fetched(url, method)[0]


def fetched(url: str, method: str = "GET") -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=5) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_the_pages(followed: Followed) -> None:
    with serving(followed.exporter, parse_address("127.0.0.1:0")) as url:
        assert fetched(f"{url}/livez") == (200, "alive\n")
        assert fetched(f"{url}/readyz") == (503, f"no telemetry from {followed.node.endpoint}\n")
        followed.hear(hello(), node_stats(), stream_stats())
        assert fetched(f"{url}/readyz") == (200, "ready\n")
        assert 'onlooker_memory_tokens{node="n1",stream="gate"} 250.0' in fetched(f"{url}/metrics")[1]
        assert "process_resident_memory_bytes" in fetched(f"{url}/metrics")[1]
        assert status_of(f"{url}/") == 404
        assert status_of(f"{url}/livez", "POST") == 405
        assert fetched(f"{url}/livez", "HEAD") == (200, "")


def test_a_client_that_says_nothing_holds_up_nobody(followed: Followed) -> None:
    with serving(followed.exporter, parse_address("127.0.0.1:0")) as url:
        port = int(url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)):
            assert status_of(f"{url}/livez") == 200


@pytest.mark.parametrize("address", ["9562", "127.0.0.1", "127.0.0.1:65536", "::1:9562", ""])
def test_an_address_that_is_none_is_a_mistake_of_the_command_line(address: str) -> None:
    ended = onlooker("metrics", "--listen", address)
    assert ended.status == 2
    assert "host:port" in ended.err


def test_an_address_that_is_taken_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ended = onlooker("metrics", "--listen", f"127.0.0.1:{taken.getsockname()[1]}")
    assert ended.status == 1
    assert "cannot listen at 127.0.0.1" in ended.err


def test_the_command_follows_a_node_and_ends_when_it_is_asked_to() -> None:
    with FakeEngine() as engine, running_node(engine, telemetry__period_s=0.1) as node:
        remember(engine, 4)
        with start_onlooker("metrics", "--listen", "127.0.0.1:0", *endpoint_flags(node, "telemetry")) as command:
            assert command.stderr is not None
            url = command.stderr.readline().split()[0]
            until(answering(url.replace("/metrics", "/readyz")), 10)
            assert 'onlooker_memory_tokens{node="n1",stream="front"} 16.0' in fetched(url)[1]
            command.send_signal(signal.SIGTERM)
            assert command.wait(10) == 0


def answering(url: str) -> Callable[[], bool]:
    return lambda: status_of(url) == 200


def test_the_exporter_is_light() -> None:
    code = "import onlooker.tools.metrics, sys; print([m for m in ('torch', 'cv2', 'av', 'numpy', 'rich.live') "
    code += "if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_without_its_extra_it_says_what_to_install() -> None:
    run = run_without("prometheus_client", "metrics")
    assert run.returncode == 1
    assert run.stderr.endswith("install it with: pip install 'onlooker[metrics]'\n")
