"""`onlooker bench`: how fast this machine is, and how fast it could be.

onlooker bench --model Qwen/Qwen2.5-VL-3B-Instruct --size 1920x1080 --json bench.json
"""

import typer

from .node import CONTEXT_SETTINGS as CONTEXT_SETTINGS
from .node import exec_node


def bench(context: typer.Context) -> None:
    """Measure encoding and answering on this machine, beside their limits. Every flag: `onlooker bench --help`."""
    exec_node("onlooker.node.bench", context.args)
