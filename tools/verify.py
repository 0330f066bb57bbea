"""`onlooker verify`: the exactness gate, on this machine.

onlooker verify --model Qwen/Qwen2.5-VL-3B-Instruct --json
"""

import typer

from .node import CONTEXT_SETTINGS as CONTEXT_SETTINGS
from .node import exec_node


def verify(context: typer.Context) -> None:
    """Prove on this machine that the memory and the answers are exact. Every flag: `onlooker verify --help`."""
    exec_node("onlooker.node.verify", context.args)
