"""A node with the built-in model that a tool runs for itself, where no other one answers."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from ..protocol.sockets import is_loopback
from .node import NODE_MODULES
from .node_process import NodeProcess, NodeProcessError

MAX_STARTS = 5
PAUSE_S = 1.0
POLL_S = 0.1

ARGUMENTS = (
    *("--model", "builtin", "--device", "cpu"),
    *("--set", "stream_defaults.memory_bytes=64MiB", "--set", "telemetry.period_s=0.5"),
)


@dataclass(frozen=True, slots=True)
class OwnNodeState:
    """What the node does, in words for people, and its process."""

    text: str
    pid: int | None = None
    is_starting: bool = False


class OwnNode:
    """Keeps a node with the built-in model running at given endpoints, and starts it again if it ends by itself."""

    def __init__(self, endpoints: Mapping[str, str], folder: Path) -> None:
        """The log goes to `node.log` in `folder`."""
        self.state = OwnNodeState("")
        self._log = folder / "node.log"
        places = (("--set", f"endpoints.{name}={endpoint}") for name, endpoint in endpoints.items())
        self._arguments = [*ARGUMENTS, *(part for place in places for part in place)]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="own node", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        why = "No node answers"
        for _ in range(MAX_STARTS):
            self.state = OwnNodeState(f"{why}: starting one with the built-in model ...", is_starting=True)
            try:
                why = self._run_once()
            except NodeProcessError as error:
                reason = str(error).splitlines()[-1]
                self.state = OwnNodeState(f"No node answers, and one could not be started: {reason} (see {self._log})")
                return
            if self._stop.wait(PAUSE_S):
                return
        self.state = OwnNodeState(f"{why} {MAX_STARTS} times: it is not started again. See {self._log}.")

    def _run_once(self) -> str:
        """Run a node until it ends or is not wanted any more; say how it ended."""
        node = NodeProcess(self._arguments, self._log)
        try:
            text = (
                f"No other node answered: this one, with the built-in model, belongs to the page (process {node.pid})."
            )
            self.state = OwnNodeState(text, node.pid)
            while node.status is None and not self._stop.wait(POLL_S):
                pass
            if node.status is not None:
                return f"The node ended by itself, with status {node.status}"
            node.end()
            return "The node has ended"
        finally:
            node.kill()


def why_not(endpoints: Mapping[str, str]) -> str | None:
    """Why no node can be run here at these endpoints, in words; None if one can."""
    far = [endpoint for endpoint in endpoints.values() if not is_loopback(endpoint)]
    if far:
        return f"No node answers at {far[0]}, which is not this machine. The page goes on by itself when one does."
    missing = [module for module in NODE_MODULES if importlib.util.find_spec(module) is None]
    if missing:
        return "No node answers, and this installation has none of its own: pip install 'onlooker[node]'."
    return None
