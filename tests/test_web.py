"""`onlooker web` before its page is there: what it refuses, and the node it may start."""

import socket
from importlib.util import find_spec
from pathlib import Path

import pytest
from commands import onlooker
from deadline import until
from test_commands import run_without

from onlooker.tools.own_node import OwnNode, why_not

NEAR = {name: "tcp://127.0.0.1:*" for name in ("frames", "ask", "control", "telemetry")}


def test_without_the_web_extra_it_says_what_to_install() -> None:
    run = run_without("gradio", "web")
    assert run.returncode == 1
    assert run.stderr == "onlooker: the page needs gradio; install it with: pip install 'onlooker[web]'\n"


def test_a_page_for_all_the_world_must_be_asked_for() -> None:
    if find_spec("gradio") is None:
        pytest.skip("the extra `web` is not installed")
    ended = onlooker("web", "--host", "0.0.0.0")
    assert ended.status == 2
    assert "--insecure" in ended.err


def test_an_endpoint_that_is_none_is_a_mistake() -> None:
    assert onlooker("web", "--telemetry", "nowhere").status == 2


def test_a_node_of_another_machine_is_not_started_here() -> None:
    assert why_not(NEAR) is None
    reason = why_not(NEAR | {"ask": "tcp://192.168.1.7:5560"})
    assert reason is not None and "tcp://192.168.1.7:5560, which is not this machine" in reason


def test_a_node_that_cannot_start_says_why_and_is_not_tried_again(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        places = NEAR | {"ask": f"tcp://127.0.0.1:{taken.getsockname()[1]}"}
        with OwnNode(places, tmp_path) as node:
            until(lambda: not node.state.is_starting and node.state.text, 60.0)
            assert "could not be started" in node.state.text
            assert str(tmp_path / "node.log") in node.state.text
            assert node.state.pid is None
