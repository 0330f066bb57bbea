"""The Grafana dashboard that belongs to the metrics: `launch/grafana/onlooker.json`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from . import families as of
from .families import Family

WIDTH = 24  # columns of Grafana's grid
ROW_HEIGHT, STAT_HEIGHT, PLOT_HEIGHT = 1, 4, 8
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}

Unit = Literal["short", "s", "bytes", "percentunit", "cps", "bool"]


@dataclass(frozen=True, slots=True)
class Query:
    """A PromQL expression, and what its series are called."""

    expression: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """A plot over time, or one figure."""

    title: str
    queries: tuple[Query, ...]
    unit: Unit = "short"
    kind: Literal["timeseries", "stat", "state-timeline"] = "timeseries"
    is_stacked: bool = False
    width: int = 8
    description: str = ""
    max: float | None = None
    alarm: float | None = None  # red from here on

    @property
    def height(self) -> int:
        return STAT_HEIGHT if self.kind == "stat" else PLOT_HEIGHT


def _of_node(family: Family[Any], **labels: str) -> str:
    return _selected(family, {"node": '=~"$node"'}, labels)


def _of_stream(family: Family[Any], **labels: str) -> str:
    return _selected(family, {"node": '=~"$node"', "stream": '=~"$stream"'}, labels)


def _selected(family: Family[Any], chosen: dict[str, str], labels: dict[str, str]) -> str:
    selector = {**chosen, **{name: f'="{value}"' for name, value in labels.items()}}
    return f"{family}{{{', '.join(name + test for name, test in selector.items())}}}"


def _rate(selected: str) -> str:
    return f"rate({selected}[$__rate_interval])"


ROWS: dict[str, tuple[Panel, ...]] = {
    "How it does": (
        Panel(
            "Nodes up",
            (Query(f"sum({of.UP})", "up"),),
            kind="stat",
            width=4,
            description="Nodes whose telemetry comes in.",
        ),
        Panel(
            "Streams online",
            (Query(f"sum({_of_stream(of.STREAM_STATE, state='online')})", "online"),),
            kind="stat",
            width=4,
        ),
        Panel(
            "Traces left",
            (Query(f"sum({_of_node(of.TRACES)})", "traces"),),
            kind="stat",
            width=4,
            alarm=1,
            description="Answers after which the memory was not what it had been. Anything but 0 is a defect.",
        ),
        Panel("Up for", (Query(_of_node(of.UPTIME), "{{node}}"),), "s", kind="stat", width=4),
        Panel(
            "Engine came round",
            (Query(_of_node(of.ENGINE_AGE), "{{node}}"),),
            "s",
            kind="stat",
            width=4,
            alarm=10,
            description="Time since the engine last came round.",
        ),
        Panel("Model", (Query(_of_node(of.INFO), "{{model}} {{dtype}} {{device}}"),), kind="stat", width=4),
        Panel(
            "State of the streams",
            (Query(f"{_of_stream(of.STREAM_STATE)} == 1", "{{node}}/{{stream}} {{state}}"),),
            "bool",
            kind="state-timeline",
            width=16,
        ),
        Panel(
            "State of the nodes",
            (Query(f"{_of_node(of.NODE_STATE)} == 1", "{{node}} {{state}}"),),
            "bool",
            kind="state-timeline",
            width=8,
        ),
    ),
    "Frames": (
        Panel(
            "Frames a second",
            (
                Query(_rate(_of_stream(of.RECEIVED_FRAMES)), "{{stream}} received"),
                Query(_rate(_of_stream(of.KEPT_FRAMES)), "{{stream}} kept"),
                Query(_rate(_of_stream(of.ENCODED_FRAMES)), "{{stream}} encoded"),
            ),
            "cps",
        ),
        Panel(
            "Dropped a second",
            (
                Query(f"{_rate(_of_stream(of.DROPPED_FRAMES))} > 0", "{{stream}} {{reason}}"),
                Query(f"{_rate(_of_stream(of.MISSED_FRAMES))} > 0", "{{stream}} never arrived"),
            ),
            "cps",
            is_stacked=True,
        ),
        Panel(
            "Lag",
            (Query(_of_stream(of.LAG), "{{stream}}"),),
            "s",
            description="From capture to memory; only of cameras that tell when they captured.",
        ),
        Panel(
            "Time for a chunk, by stage",
            (Query(_of_stream(of.STAGES), "{{stream}} {{stage}}"),),
            "s",
            is_stacked=True,
            width=12,
        ),
        Panel(
            "Frames on their way",
            (
                Query(_of_stream(of.PENDING_FRAMES), "{{stream}} pending"),
                Query(f"increase({_of_stream(of.PADDED_FRAMES)}[$__rate_interval])", "{{stream}} padded"),
            ),
            width=12,
        ),
        Panel(
            "Share of the engine's time",
            (Query(_of_stream(of.LOAD), "{{stream}}"),),
            "percentunit",
            is_stacked=True,
            width=12,
        ),
        Panel(
            "Steps down",
            (Query(_of_stream(of.DEGRADED), "{{stream}}"),),
            width=12,
            description="Quality that streams have given up for want of time or memory.",
        ),
    ),
    "Memory": (
        Panel(
            "Share in use",
            (Query(f"{_of_stream(of.TOKENS)} / {_of_stream(of.CAPACITY)}", "{{stream}}"),),
            "percentunit",
            max=1,
            alarm=0.9,
        ),
        Panel(
            "Bytes",
            (
                Query(_of_stream(of.LOGICAL_BYTES), "{{stream}} in use"),
                Query(_of_stream(of.RESIDENT_BYTES), "{{stream}} reserved"),
            ),
            "bytes",
        ),
        Panel(
            "Span",
            (
                Query(_of_stream(of.SPAN), "{{stream}} remembered"),
                Query(_of_stream(of.UNTIL_FULL), "{{stream}} until full"),
                Query(_of_stream(of.HORIZON), "{{stream}} once full"),
            ),
            "s",
        ),
        Panel(
            "Frames remembered, and forgotten a second",
            (
                Query(_of_stream(of.MEMORY_FRAMES), "{{stream}}"),
                Query(f"{_rate(_of_stream(of.FORGOTTEN_FRAMES))} > 0", "{{stream}} forgotten a second"),
            ),
        ),
        Panel(
            "Tokens",
            (
                Query(_of_stream(of.TOKENS), "{{stream}}"),
                Query(f"{_of_stream(of.FULL)} * {_of_stream(of.TOKENS)} > 0", "{{stream}} full"),
                Query(_of_stream(of.DROPPED_TOKENS), "{{stream}} dropped"),
            ),
        ),
        Panel(
            "Positions",
            (
                Query(_of_stream(of.POSITIONS_USED), "{{stream}} used"),
                Query(_of_stream(of.POSITIONS_LEFT), "{{stream}} left"),
            ),
        ),
    ),
    "Device": (
        Panel(
            "Device memory by component",
            (Query(_of_node(of.VRAM), "{{node}} {{component}}"),),
            "bytes",
            is_stacked=True,
            width=12,
        ),
        Panel(
            "Device memory in all, and as PyTorch counts it",
            (
                Query(_of_node(of.VRAM_CAPACITY), "{{node}} the device has"),
                Query(_of_node(of.TORCH_MEMORY), "{{node}} {{measure}}"),
            ),
            "bytes",
            width=6,
        ),
        Panel("Host memory", (Query(_of_node(of.HOST_MEMORY), "{{node}}"),), "bytes", width=6),
    ),
    "Questions": (
        Panel(
            "Questions a second",
            (
                Query(_rate(_of_node(of.RECEIVED_QUESTIONS)), "{{node}} received"),
                Query(_rate(_of_node(of.ANSWERED_QUESTIONS)), "{{node}} answered"),
                Query(f"{_rate(_of_node(of.FAILED_QUESTIONS))} > 0", "{{node}} {{code}}"),
            ),
            "cps",
        ),
        Panel(
            "Time to answer",
            (
                Query(_of_node(of.FIRST_TOKEN), "{{node}} first token"),
                Query(_of_node(of.ANSWER_TIME), "{{node}} whole answer"),
            ),
            "s",
            description="Means of the recent answers.",
        ),
        Panel(
            "Questions open",
            (
                Query(_of_node(of.RUNNING_QUESTIONS), "{{node}} running"),
                Query(_of_node(of.WAITING_QUESTIONS), "{{node}} waiting"),
            ),
            is_stacked=True,
        ),
    ),
    "Wire": (
        Panel(
            "Messages refused a second",
            (Query(f"{_rate(_of_node(of.REJECTED_MESSAGES))} > 0", "{{node}} {{reason}}"),),
            "cps",
        ),
        Panel(
            "Events",
            (Query(f"increase({of.EVENTS}[$__rate_interval]) > 0", "{{kind}}"),),
            is_stacked=True,
        ),
        Panel(
            "Telemetry lost",
            (
                Query(f"increase({of.MISSED_RECORDS}[$__rate_interval])", "{{endpoint}} missed"),
                Query(f"increase({of.MALFORMED_RECORDS}[$__rate_interval])", "{{endpoint}} malformed"),
            ),
        ),
    ),
}

PANELS = tuple(panel for panels in ROWS.values() for panel in panels)
VARIABLES = {
    "node": f"label_values({of.INFO}, node)",
    "stream": f'label_values({of.STREAM_STATE}{{node=~"$node"}}, stream)',
}


def dashboard_json() -> str:
    """The dashboard as Grafana imports it, or is provisioned with it."""
    dashboard = {
        "uid": "onlooker",
        "title": "Onlooker",
        "description": "Written by `onlooker metrics --dashboard`.",
        "tags": ["onlooker"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "5s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [_datasource(), *(_variable(name, query) for name, query in VARIABLES.items())]},
        "panels": list(_numbered()),
    }
    return json.dumps(dashboard, indent=2) + "\n"


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,  # whenever the time range changes
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _numbered() -> Iterator[dict[str, Any]]:
    """All rows and panels from the left to the right and from the top down, each with a number."""
    number = top = 0
    for title, panels in ROWS.items():
        number += 1
        place = {"x": 0, "y": top, "w": WIDTH, "h": ROW_HEIGHT}
        yield {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}
        top += ROW_HEIGHT
        left = height = 0
        for panel in panels:
            if left + panel.width > WIDTH:
                top, left, height = top + height, 0, 0
            number += 1
            place = {"x": left, "y": top, "w": panel.width, "h": panel.height}
            yield _panel(panel, number, place)
            left, height = left + panel.width, max(height, panel.height)
        top += height


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": place,
        "targets": [_target(query, letter) for query, letter in zip(panel.queries, "ABCDEF", strict=False)],
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": _options(panel),
    }


def _target(query: Query, letter: str) -> dict[str, Any]:
    return {"refId": letter, "datasource": DATASOURCE, "expr": query.expression, "legendFormat": query.legend}


def _defaults(panel: Panel) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    if panel.alarm is not None:
        steps.append({"color": "red", "value": panel.alarm})
    defaults: dict[str, Any] = {
        "unit": panel.unit,
        "min": 0,
        "thresholds": {"mode": "absolute", "steps": steps},
        "noValue": "unknown",
    }
    if panel.max is not None:
        defaults["max"] = panel.max
    if panel.kind == "timeseries":
        stacking = {"mode": "normal" if panel.is_stacked else "none", "group": "A"}
        defaults["custom"] = {"fillOpacity": 30 if panel.is_stacked else 5, "showPoints": "never", "stacking": stacking}
    return defaults


def _options(panel: Panel) -> dict[str, Any]:
    if panel.kind == "stat":
        has_text = panel.queries[0].expression.startswith(of.INFO.name)
        return {
            "reduceOptions": {"calcs": ["lastNotNull"]},
            "colorMode": "none" if panel.alarm is None else "value",
            "textMode": "name" if has_text else "value",
        }
    if panel.kind == "state-timeline":
        return {"showValue": "never", "mergeValues": True, "legend": {"showLegend": False}}
    return {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
