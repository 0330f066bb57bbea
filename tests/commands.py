"""Running `onlooker` in tests: in this process, or as a process of its own."""

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from typer.testing import CliRunner

from onlooker.node.node import Node
from onlooker.tools.commands import app


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it wrote."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def onlooker(*arguments: object, input: str | None = None) -> Ended:
    """Run a command in this process. An exception that it does not turn into a status is raised."""
    result = CliRunner().invoke(app, [str(each) for each in arguments], input=input)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Ended(result.exit_code, result.stdout, result.stderr)


def start_onlooker(*arguments: object) -> subprocess.Popen[str]:
    """Start a command as a process of its own."""
    command = [sys.executable, "-m", "onlooker.tools.cli", *(str(each) for each in arguments)]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def endpoint_flags(node: Node, *names: str) -> list[str]:
    """The flags that lead to a node's sockets."""
    return [part for name in names for part in (f"--{name}", node.endpoints[name])]
