"""What a measurement was made with, and by which command: the figures hold for nothing else."""

from __future__ import annotations

import datetime
import platform
import shlex
import sys
from importlib.metadata import version


def machine(device: str, *, is_own_node: bool) -> dict[str, str]:
    """Facts for a report's JSON. A node that was started for it is of this installation; of another one's only the
    device is known."""
    facts = {
        "command": shlex.join(["onlooker", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device,
        "onlooker": version("onlooker"),
    }
    if is_own_node:
        facts |= {name: version(name) for name in ("torch", "transformers")}
    return facts | {"python": platform.python_version()}
