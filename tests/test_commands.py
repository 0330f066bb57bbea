"""The command itself: what it lists, what it loads, and what it says when something is missing."""

import subprocess
import sys
from pathlib import Path

import pytest
from commands import onlooker

from onlooker.tools.commands import COMMANDS, load


@pytest.mark.parametrize("name", COMMANDS)
def test_the_line_in_the_list_is_how_the_command_s_own_help_begins(name: str) -> None:
    assert (load(name).help or "").startswith(COMMANDS[name].summary)


def test_every_command_is_listed() -> None:
    out = onlooker("--help").out
    assert all(f" {name} " in out for name in COMMANDS)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("node", "verify", "bench")])
def test_every_command_has_help(name: str) -> None:
    ended = onlooker(name, "--help")
    assert ended.status == 0
    assert f"onlooker {name}" in ended.out.replace("root", "onlooker")


def test_the_version_is_that_of_the_package() -> None:
    from importlib.metadata import version

    assert onlooker("--version").out == f"onlooker {version('onlooker')}\n"


def test_a_command_that_is_none_is_a_mistake_with_a_suggestion() -> None:
    ended = onlooker("replya")
    assert ended.status == 2
    assert "replay" in ended.err


def run_without(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command where a module cannot be imported."""
    code = f"import sys; sys.modules[{module!r}] = None; from onlooker.tools.cli import main; main({list(arguments)!r})"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_without_the_tools_extra_it_says_what_to_install() -> None:
    run = run_without("typer", "ask", "x")
    assert run.returncode == 1
    assert run.stderr == ("onlooker: the module typer is missing; install it with: pip install 'onlooker[tools]'\n")


def test_without_the_node_extra_it_says_what_to_install() -> None:
    run = run_without("torch", "node")
    assert run.returncode == 1
    assert run.stderr == "onlooker: a node needs torch; install it with: pip install 'onlooker[node]'\n"


def test_without_a_reader_of_videos_it_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "x.mp4").write_bytes(b"x")
    code = "import sys; sys.modules['av'] = sys.modules['cv2'] = None; from onlooker.tools.cli import main; "
    code += f"main(['replay', {str(tmp_path / 'x.mp4')!r}])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert "pip install 'onlooker[tools]'" in run.stderr


def test_every_flag_of_the_node_reaches_it() -> None:
    command = [sys.executable, "-m", "onlooker.tools.cli", "node", "--set", "model=", "--stream", "x"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert "model" in run.stderr


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:65536", "tcp://127.0.0.1", "http://127.0.0.1:5560"])
def test_an_endpoint_that_is_none_is_a_mistake_of_the_command_line(endpoint: str) -> None:
    ended = onlooker("ask", "x", "--ask", endpoint)
    assert ended.status == 2
    assert "an endpoint is" in ended.err
