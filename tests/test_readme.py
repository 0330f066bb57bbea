"""What the README says is done as it says it."""

import re
from pathlib import Path

import numpy as np
import pytest
from deadline import until
from nodes import running_node

from onlooker.node.engine import load_engine
from onlooker.node.node import Node
from onlooker.protocol.client import NodeClient
from onlooker.tools.commands import COMMANDS

README = (Path(__file__).parent.parent / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def node():
    engine = load_engine(device="cpu")
    with running_node(engine) as node:
        yield node
    engine.close()


def run(snippet: str, node: Node) -> None:
    """Run a snippet against this node in place of the one at the default endpoints."""
    ends = node.endpoints
    snippet = snippet.replace('FramePublisher("front")', f'FramePublisher("front", connect="{ends["frames"]}")')
    client = f'NodeClient("{ends["ask"]}", "{ends["control"]}", frames="{ends["frames"]}")'
    exec(snippet.replace("NodeClient()", client), {"pictures": np.zeros((8, 60, 80, 3), np.uint8)})


def test_a_client_shows_pictures_and_asks(node: Node, capsys: pytest.CaptureFixture[str]):
    run(SNIPPETS[0], node)
    answer, choice = capsys.readouterr().out.splitlines()[-2:]
    assert answer.endswith("True")
    assert choice.startswith(("open", "closed", "not in view"))


def test_a_camera_publishes(node: Node):
    with NodeClient(node.endpoints["ask"], node.endpoints["control"]) as client:
        before = client.streams()[0].frames.received
        run(SNIPPETS[1], node)
        # A camera that never waits may lose frames of a burst, but not the first.
        until(lambda: client.streams()[0].frames.received > before)


def test_every_command_it_names_is_there():
    named = set(re.findall(r"^ +onlooker (\w+)", README, re.MULTILINE)) | set(re.findall(r"`onlooker (\w+)", README))
    assert len(named) > 5
    assert named <= set(COMMANDS)
