"""The alerting rules for Prometheus that belong to the metrics: `launch/prometheus/alerts.yml`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

from . import families as of

HEADER = """\
# Alerting rules for `onlooker metrics`, written by `onlooker metrics --rules`.
# They are a beginning: bounds and severities are the operator's.
"""

# Dropped because somebody wished it so, or told by an alert of its own.
_WISHED = "sampled_out|gated|paused|reset|removed|memory_full"
_FAILURES = "INTERNAL|OUT_OF_MEMORY|DEADLINE_EXCEEDED|BUSY"


@dataclass(frozen=True, slots=True)
class Rule:
    """An alert: the query that has a result while something is wrong, and what people then read."""

    name: str
    expression: str
    for_s: int
    severity: Literal["warning", "critical"]
    summary: str
    description: str


RULES = (
    Rule(
        "OnlookerExporterDown",
        f"absent({of.UP})",
        60,
        "critical",
        "No onlooker metrics at all",
        "`onlooker metrics` does not run, or Prometheus does not scrape it: nothing is watched.",
    ),
    Rule(
        "OnlookerNodeDown",
        f"{of.UP} == 0",
        30,
        "critical",
        "The node at {{ $labels.endpoint }} is silent",
        "No telemetry comes in. The node has ended, is still loading its model, or cannot be reached.",
    ),
    Rule(
        "OnlookerNodeRestarts",
        f"resets({of.UPTIME}[15m]) > 2",
        0,
        "warning",
        "Node {{ $labels.node }} restarts again and again",
        "It has restarted {{ $value }} times within 15 minutes. What it remembered is gone each time.",
    ),
    Rule(
        "OnlookerEngineStuck",
        f"{of.ENGINE_AGE} > 30",
        30,
        "critical",
        "The engine of node {{ $labels.node }} does not come round",
        "Its last step began {{ $value | humanizeDuration }} ago: no frame is encoded and no question answered.",
    ),
    Rule(
        "OnlookerTraceLeft",
        f"{of.TRACES} > 0",
        0,
        "critical",
        "A question changed a memory of node {{ $labels.node }}",
        "After {{ $value }} answers the memory was not what it had been before. That is a defect: please report it. "
        "Reset the stream before you trust further answers.",
    ),
    Rule(
        "OnlookerStreamOffline",
        f'{of.STREAM_STATE}{{state="offline"}} == 1',
        60,
        "critical",
        "Stream {{ $labels.stream }} of node {{ $labels.node }} is offline",
        "No frame comes from its camera. Answers go on from what is remembered.",
    ),
    Rule(
        "OnlookerStreamLags",
        f"{of.LAG} > 5",
        60,
        "warning",
        "Stream {{ $labels.stream }} of node {{ $labels.node }} lags behind",
        "What it remembers is {{ $value | humanizeDuration }} old when it is remembered. "
        "Lower its fps or its encode size, or give the node less to do.",
    ),
    Rule(
        "OnlookerFramesDropped",
        f'sum by (node, stream) (rate({of.DROPPED_FRAMES}{{reason!~"{_WISHED}"}}[5m]))'
        f" / sum by (node, stream) (rate({of.RECEIVED_FRAMES}[5m])) > 0.05",
        300,
        "warning",
        "Stream {{ $labels.stream }} of node {{ $labels.node }} drops frames",
        f"{{{{ $value | humanizePercentage }}}} of its frames are dropped; {of.DROPPED_FRAMES} says why.",
    ),
    Rule(
        "OnlookerFramesMissed",
        f"rate({of.MISSED_FRAMES}[5m]) / (rate({of.MISSED_FRAMES}[5m]) + rate({of.RECEIVED_FRAMES}[5m])) > 0.05",
        300,
        "warning",
        "Frames of stream {{ $labels.stream }} never reach node {{ $labels.node }}",
        "{{ $value | humanizePercentage }} of them are lost between the camera and the node.",
    ),
    Rule(
        "OnlookerMemoryNearlyFull",
        f"{of.TOKENS} / {of.CAPACITY} > 0.9 unless {of.FULL} == 1",
        60,
        "warning",
        "The memory of stream {{ $labels.stream }} of node {{ $labels.node }} is nearly full",
        "{{ $value | humanizePercentage }} of it are in use. Once it is full, new frames are dropped.",
    ),
    Rule(
        "OnlookerMemoryFull",
        f"{of.FULL} == 1",
        0,
        "critical",
        "The memory of stream {{ $labels.stream }} of node {{ $labels.node }} is full",
        "New frames are dropped and answers are about the past. Reset it, roll it back, or give it more memory.",
    ),
    Rule(
        "OnlookerDeviceMemoryLow",
        f'{of.VRAM}{{component="free"}} / ignoring (component) {of.VRAM_CAPACITY} < 0.05',
        300,
        "warning",
        "The device of node {{ $labels.node }} has little memory left",
        "{{ $value | humanizePercentage }} of it are free. Lower resolutions or frame rates, or remove a stream.",
    ),
    Rule(
        "OnlookerQuestionsFail",
        f'sum by (node) (rate({of.FAILED_QUESTIONS}{{code=~"{_FAILURES}"}}[5m]))'
        f" / sum by (node) (rate({of.RECEIVED_QUESTIONS}[5m])) > 0.1",
        300,
        "warning",
        "Questions to node {{ $labels.node }} fail",
        f"{{{{ $value | humanizePercentage }}}} of them get no answer; {of.FAILED_QUESTIONS} says why.",
    ),
    Rule(
        "OnlookerHandshakesFail",
        f'increase({of.REJECTED_MESSAGES}{{reason="handshake_failed"}}[15m]) > 3',
        0,
        "warning",
        "Somebody tries to connect to node {{ $labels.node }} with a wrong key",
        "A camera or client has the wrong keys, or a stranger tries.",
    ),
)


def rules_yaml() -> str:
    """The rules as Prometheus reads them. Texts are quoted as in JSON, which YAML contains."""
    return HEADER + "groups:\n  - name: onlooker\n    rules:\n" + "".join(map(_yaml, RULES))


def _yaml(rule: Rule) -> str:
    return (
        f"      - alert: {rule.name}\n"
        f"        expr: {json.dumps(rule.expression)}\n"
        f"        for: {rule.for_s}s\n"
        f"        labels:\n"
        f"          severity: {rule.severity}\n"
        f"        annotations:\n"
        f"          summary: {json.dumps(rule.summary)}\n"
        f"          description: {json.dumps(rule.description)}\n"
    )
