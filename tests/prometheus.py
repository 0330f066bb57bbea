"""A real Prometheus server, where one is installed."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from deadline import until

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="prometheus is not installed (Debian and Ubuntu: apt-get install prometheus)",
)

CONFIG = """\
global:
  scrape_interval: 200ms
  evaluation_interval: 200ms
rule_files: ["{rules}"]
scrape_configs:
  - job_name: onlooker
    static_configs:
      - targets: {targets}
"""


@dataclass(frozen=True)
class Prometheus:
    """A server by its URL."""

    url: str

    def query(self, expression: str, at: float | None = None) -> list[dict[str, Any]]:
        """The series that an expression gives, now or at a time. A bad expression is an HTTPError."""
        arguments = {"query": expression} | ({} if at is None else {"time": str(at)})
        return self._get("query", arguments)["result"]

    def alerts(self, **labels: str) -> set[str]:
        """Names of the alerts with these labels that are pending or firing."""
        found = [alert["labels"] for alert in self._get("alerts")["alerts"]]
        return {each["alertname"] for each in found if labels.items() <= each.items()}

    def annotations(self) -> list[str]:
        """What people read of the alerts there are."""
        return [text for alert in self._get("alerts")["alerts"] for text in alert["annotations"].values()]

    def rules(self) -> list[dict[str, Any]]:
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    @property
    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=5) as reply:
                return reply.status == 200
        except OSError:
            return False

    def _get(self, page: str, arguments: dict[str, str] | None = None) -> Any:
        question = urllib.parse.urlencode(arguments or {})
        with urllib.request.urlopen(f"{self.url}/api/v1/{page}?{question}", timeout=5) as reply:
            return json.load(reply)["data"]


@contextmanager
def running_prometheus(folder: Path, targets: Sequence[str], rules: Path) -> Iterator[Prometheus]:
    """A server that scrapes `host:port` targets several times a second, and evaluates a file of rules."""
    config = folder / "prometheus.yml"
    config.write_text(CONFIG.format(rules=rules, targets=json.dumps(targets)))
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = [f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={address}"]
    with (folder / "prometheus.log").open("wb") as log:
        server = subprocess.Popen(["prometheus", *flags], stdout=log, stderr=log)
    try:
        prometheus = Prometheus(f"http://{address}")
        until(lambda: prometheus.is_ready, 30)
        yield prometheus
    finally:
        server.kill()
        server.wait()
