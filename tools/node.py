"""`onlooker node`: run a node in this terminal.

onlooker node --config launch/node.toml --set device=cpu
"""

import importlib.util
import os
import sys

import typer

from .commands import EXIT_FAILED

CONTEXT_SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

NODE_MODULES = ("torch", "transformers", "accelerate", "cv2", "pydantic_settings")


def node(context: typer.Context) -> None:
    """Run a node. Every flag: `onlooker node --help`."""
    exec_node("onlooker.node", context.args)


def exec_node(module: str, args: list[str]) -> None:
    """Become `python -m module args`, so that signals reach the node itself."""
    require_node()
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *args])


def require_node() -> None:
    """Exit with a word on what to install, if something a node needs is missing."""
    missing = [module for module in NODE_MODULES if importlib.util.find_spec(module) is None]
    if missing:
        install = "pip install 'onlooker[node]'"
        typer.echo(f"onlooker: a node needs {', '.join(missing)}; install it with: {install}", err=True)
        raise typer.Exit(EXIT_FAILED)
