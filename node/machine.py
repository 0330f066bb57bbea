"""What a measurement was made with, and by which command: the figures hold for nothing else."""

import datetime
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import torch
import transformers


def machine(device: str, command: str, arguments: Sequence[str] | None = None) -> dict[str, str]:
    """Facts for a report's JSON; without `arguments`, those of this process."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{platform.machine()} CPU"
    return {
        "command": shlex.join([*command.split(), *(sys.argv[1:] if arguments is None else arguments)]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": name,
        "onlooker": _version("onlooker"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from the tree
        return "unknown"
