"""What a node says of itself, as Prometheus reads it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..protocol.messages import Event
from ..protocol.telemetry import TelemetrySubscriber
from . import families
from .families import Family, Hearing, T
from .view import View

# An engine that has not come round for longer is stuck.
MAX_PROGRESS_AGE_S = 10.0


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether questions would be answered, and why not."""

    is_ready: bool
    reason: str


class Exporter(Collector):
    """Follows one node, and tells its metrics to whom asks, on any thread.

    The series of a node that has been silent for some of its periods disappear, all but `onlooker_up`, which is 0
    then. One that was restarted starts from nothing, as Prometheus expects of counters that are reset.
    """

    def __init__(self, subscriber: TelemetrySubscriber, endpoint: str, now: Callable[[], float] = time.monotonic):
        self._subscriber = subscriber
        self._now = now
        self._view = View(endpoint)
        self._events: Counter[str] = Counter()
        self._num_missed = self._num_malformed = 0
        self._lock = threading.Lock()

    def follow(self, timeout_s: float) -> None:
        """Take in what comes within a time, on one thread alone. Raises AuthError while the keys are refused."""
        message = self._subscriber.receive(timeout_s)
        with self._lock:
            self._num_missed = sum(self._subscriber.gaps.values())
            self._num_malformed = self._subscriber.num_malformed
            if message is not None:
                self._view.take(message.record, self._now())
                if isinstance(message.record, Event):
                    self._events[message.record.kind] += 1

    @property
    def readiness(self) -> Readiness:
        with self._lock:
            stats, is_online = self._view.stats, self._view.is_online(self._now())
        if stats is None or not is_online:
            return Readiness(False, f"no telemetry from {self._view.endpoint}")
        if stats.state != "ready":
            return Readiness(False, f"the node is {stats.state}")
        if stats.engine_progress_age_ms > MAX_PROGRESS_AGE_S * 1e3:
            return Readiness(False, f"the engine has not come round for {stats.engine_progress_age_ms / 1e3:.0f} s")
        return Readiness(True, "ready")

    def describe(self) -> list[Metric]:
        """Nothing is known before the node is heard."""
        return []

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            view, is_up = self._view, self._view.is_online(self._now())
            hello, stats, streams = view.hello, view.stats, list(view.streams.values())
            hearing = Hearing(is_up, dict(self._events), self._num_missed, self._num_malformed)
        yield from _metrics(families.OF_HEARING, ("endpoint",), [((view.endpoint,), hearing)])
        if not is_up or hello is None:
            return
        node = (hello.node,)
        yield from _metrics(families.OF_HELLO, ("node",), [(node, hello)])
        yield from _metrics(families.OF_NODE, ("node",), [] if stats is None else [(node, stats)])
        yield from _metrics(families.OF_STREAM, ("node", "stream"), [((*node, each.stream), each) for each in streams])


def _metrics(
    of_records: Iterable[Family[T]], labels: tuple[str, ...], records: list[tuple[tuple[str, ...], T]]
) -> Iterator[Metric]:
    """The metrics of some families, each with what it reads from every record."""
    for family in of_records:
        kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
        metric = kind(family.name, family.help, labels=(*labels, *family.labels))
        for values, record in records:
            for sample in family.read(record):
                metric.add_metric((*values, *sample.labels), sample.value)
        yield metric
