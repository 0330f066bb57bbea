import os
import signal
from pathlib import Path

import pytest

from onlooker.tools.node_process import NodeProcess

STAND_IN = """
import json, signal, sys
signal.signal(signal.SIGINT, lambda number, frame: sys.exit(1))
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
print(json.dumps({"endpoints": {}}), flush=True)
while True:
    signal.pause()
"""


def test_the_ctrl_c_of_a_terminal_leaves_the_node_to_the_one_who_started_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    node = NodeProcess([], tmp_path / "node.log", "stand_in")
    try:
        os.kill(node.pid, signal.SIGINT)  # a process that takes both has this one first
        node.end()
        assert node.status == 0
    finally:
        node.kill()
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
