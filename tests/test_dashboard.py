"""The dashboard and the alerting rules ask for what is exported: a real Prometheus server says so."""

import json
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from commands import onlooker
from deadline import until
from msgspec.structs import replace
from prometheus import Prometheus, needs_prometheus, running_prometheus
from records import NS, hello, node_stats, stream_stats
from telemetry_publisher import TelemetryPublisher

from onlooker.protocol.messages import Event, QuestionCounters, StreamStats, Vram
from onlooker.protocol.telemetry import TelemetrySubscriber
from onlooker.tools.dashboard import PANELS, VARIABLES, WIDTH, dashboard_json
from onlooker.tools.exporter import Exporter
from onlooker.tools.families import FAMILIES
from onlooker.tools.metrics import parse_address, serving
from onlooker.tools.rules import RULES, rules_yaml

LAUNCH = Path(__file__).parent.parent / "launch"
RULES_FILE = LAUNCH / "prometheus" / "alerts.yml"
DASHBOARD_FILE = LAUNCH / "grafana" / "onlooker.json"

GONE = "ipc:///nowhere/at/all"
EXPRESSIONS = [query.expression for panel in PANELS for query in panel.queries]
# What Grafana puts in for its variables.
VALUES = {"$__rate_interval": "1m", "$node": ".*", "$stream": ".*"}


def test_the_dashboard_that_is_shipped_is_the_one_that_is_made() -> None:
    assert DASHBOARD_FILE.read_text() == dashboard_json() == onlooker("metrics", "--dashboard").out


def test_the_rules_that_are_shipped_are_those_that_are_made() -> None:
    assert RULES_FILE.read_text() == rules_yaml() == onlooker("metrics", "--rules").out


def test_every_metric_is_on_the_dashboard() -> None:
    shown = {name for expression in EXPRESSIONS for name in re.findall(r"onlooker_[a-z_]+", expression)}
    assert shown == {family.name for family in FAMILIES}


def test_panels_do_not_lie_on_each_other() -> None:
    panels = json.loads(dashboard_json())["panels"]
    cells = [
        (place["x"] + right, place["y"] + down)
        for place in (panel["gridPos"] for panel in panels)
        for right in range(place["w"])
        for down in range(place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < WIDTH
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_every_query_of_a_panel_is_a_target() -> None:
    targets = [target for panel in json.loads(dashboard_json())["panels"] for target in panel.get("targets", [])]
    assert [target["expr"] for target in targets] == EXPRESSIONS


def test_an_alert_says_what_to_think_of_it() -> None:
    for rule in RULES:
        assert re.fullmatch(r"Onlooker[A-Z][A-Za-z]+", rule.name)
        assert rule.description.endswith(".")
    assert len({rule.name for rule in RULES}) == len(RULES)


# With a server

VRAM = Vram(
    device="cuda:0",
    weights_bytes=7,
    kv_bytes=60,
    activations_peak_bytes=3,
    total_bytes=100,
    free_bytes=40,
    other_process_bytes=1,
    torch_allocated_bytes=50,
    torch_reserved_bytes=60,
    torch_peak_bytes=55,
)


@dataclass(frozen=True)
class Life:
    """What a node says at its n-th report."""

    node: str
    is_troubled: bool

    def records(self, n: int) -> list[Any]:
        greeting = replace(hello(streams=("gate", "yard")), node=self.node)
        return [greeting, *(self._troubled(n) if self.is_troubled else self._well(n))]

    def _well(self, n: int) -> list[Any]:
        questions = QuestionCounters(received=n, answered=n, failed={"CANCELLED": n}, waiting=0, running=1)
        return [
            node_stats(uptime_s=n / 10, vram=VRAM, questions=questions),
            _stream(n, "gate"),
            _stream(n, "yard", state="full", cache=replace(stream_stats().cache, num_tokens=899)),
        ]

    def _troubled(self, n: int) -> list[Any]:
        """Everything goes wrong, and everything is known."""
        questions = QuestionCounters(
            received=n,
            answered=n // 2,
            failed={"INTERNAL": n // 2},
            waiting=1,
            running=1,
            traces=1,
            mean_first_token_ms=50.0,
            mean_total_ms=500.0,
        )
        stats = node_stats(
            uptime_s=1e6 - n,  # started anew each time it is looked at
            engine_progress_age_ms=40_000.0,
            vram=replace(VRAM, free_bytes=1),
            questions=questions,
            rejected={"handshake_failed": n},
            host_rss_bytes=1 << 30,
        )
        frames = replace(stream_stats().frames, received=n, dropped={"ring_full": n, "sampled_out": n}, gaps=n)
        frames = replace(frames, forgotten=n)
        nearly = replace(
            stream_stats().cache, num_tokens=950, positions_used=950, positions_left=50, seconds_until_full=9.0
        )
        nearly = replace(nearly, seconds_of_memory=99.0)
        full = replace(stream_stats().cache, num_tokens=1000, full=True)
        return [
            stats,
            _stream(n, "gate", state="offline", lag_ms=9000.0, load=0.5, frames=frames, cache=nearly),
            _stream(n, "yard", cache=full),
            Event(ts=NS, kind="publisher_restarted", stream="gate", message="another session publishes the stream"),
        ]


def _stream(n: int, name: str, **changes: Any) -> StreamStats:
    frames = replace(
        stream_stats().frames,
        received=10 * n,
        kept=n,
        encoded=n,
        padded=n,
        dropped={"sampled_out": 9 * n},
        gaps=n // 10,
    )
    return stream_stats(**{"stream": name, "frames": frames} | changes)


class Living(NamedTuple):
    """Where a node tells of itself, and the `host:port` of its exporter."""

    endpoint: str
    target: str


class Watched(NamedTuple):
    """The server, and where the node that does well tells of itself."""

    prometheus: Prometheus
    well: str


@contextmanager
def living(life: Life) -> Iterator[Living]:
    """A node with such a life, and an exporter that follows it."""
    should_end = threading.Event()

    def follow(exporter: Exporter) -> None:
        while not should_end.is_set():
            exporter.follow(0.05)

    def live(node: TelemetryPublisher) -> None:
        n = 10
        while not should_end.wait(0.05):
            n += node.publish(*life.records(n))

    with TelemetryPublisher(life.node) as node, node.subscriber() as subscriber:
        exporter = Exporter(subscriber, node.endpoint)
        threads = [threading.Thread(target=follow, args=(exporter,)), threading.Thread(target=live, args=(node,))]
        for thread in threads:
            thread.start()
        try:
            with serving(exporter, parse_address("127.0.0.1:0")) as url:
                yield Living(node.endpoint, url.removeprefix("http://"))
        finally:
            should_end.set()
            for thread in threads:
                thread.join()


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A server that watches a node whose every figure is known and bad, one that does well, and one that is gone."""
    folder = tmp_path_factory.mktemp("prometheus")
    with (
        living(Life("n1", is_troubled=True)) as troubled,
        living(Life("n2", is_troubled=False)) as well,
        TelemetrySubscriber(GONE) as nobody,
        serving(Exporter(nobody, GONE), parse_address("127.0.0.1:0")) as url,
        running_prometheus(folder, [troubled.target, well.target, url.removeprefix("http://")], RULES_FILE) as server,
    ):
        yield Watched(server, well.endpoint)


@needs_prometheus
def test_promtool_takes_the_rules() -> None:
    check = subprocess.run(["promtool", "check", "rules", str(RULES_FILE)], capture_output=True, text=True)
    assert check.returncode == 0, check.stderr
    assert f"{len(RULES)} rules found" in check.stdout


@needs_prometheus
@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_query_of_the_dashboard_has_data(watched: Watched, expression: str) -> None:
    for variable, value in VALUES.items():
        expression = expression.replace(variable, value)
    assert "$" not in expression
    until(lambda: watched.prometheus.query(expression), 15)


@needs_prometheus
@pytest.mark.parametrize(("variable", "values"), [("node", {"n1", "n2"}), ("stream", {"gate", "yard"})])
def test_every_variable_of_the_dashboard_has_values(watched: Watched, variable: str, values: set[str]) -> None:
    match = re.fullmatch(r"label_values\((.+), (\w+)\)", VARIABLES[variable].replace("$node", ".*"))
    assert match
    until(lambda: {one["metric"][match[2]] for one in watched.prometheus.query(match[1])} == values, 15)


@needs_prometheus
@pytest.mark.parametrize("name", [rule.name for rule in RULES if rule.name != "OnlookerExporterDown"])
def test_every_alert_is_raised_by_what_it_is_about(watched: Watched, name: str) -> None:
    until(lambda: name in watched.prometheus.alerts(), 15)


@needs_prometheus
def test_what_people_read_of_an_alert_names_the_stream_and_the_figure(watched: Watched) -> None:
    wanted = "95% of it are in use. Once it is full, new frames are dropped."
    until(lambda: wanted in watched.prometheus.annotations(), 15)
    texts = watched.prometheus.annotations()
    assert "Stream gate of node n1 is offline" in texts
    assert not [text for text in texts if "error" in text or "<no value>" in text]


@needs_prometheus
def test_that_nothing_is_exported_is_an_alert(watched: Watched) -> None:
    (rule,) = [rule for rule in RULES if rule.name == "OnlookerExporterDown"]
    an_hour_ago = time.time() - 3600
    assert watched.prometheus.query(rule.expression, an_hour_ago)
    until(lambda: not watched.prometheus.query(rule.expression), 15)


@needs_prometheus
def test_of_a_node_that_does_well_no_alert_is_raised(watched: Watched) -> None:
    server = watched.prometheus
    until(lambda: server.query('rate(onlooker_frames_received_total{node="n2"}[5m]) > 0'), 15)
    known = datetime.now(UTC)
    until(lambda: all(datetime.fromisoformat(rule["lastEvaluation"]) > known for rule in server.rules()), 15)
    assert server.alerts(node="n2") == server.alerts(endpoint=watched.well) == set()
    assert {rule["health"] for rule in server.rules()} == {"ok"}
