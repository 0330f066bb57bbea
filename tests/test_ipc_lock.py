"""An ipc endpoint belongs to one process at a time."""

import stat
from pathlib import Path

import pytest

from onlooker.node.ipc_lock import EndpointTaken, IpcLock


def test_a_second_lock_is_refused_until_the_first_is_gone(tmp_path: Path):
    endpoint = f"ipc://{tmp_path}/run/node-ask.sock"
    lock = IpcLock(endpoint)
    with pytest.raises(EndpointTaken, match="another process listens at ipc://"):
        IpcLock(endpoint)
    lock.close()
    IpcLock(endpoint).close()


def test_the_folder_is_made_for_its_owner_alone(tmp_path: Path):
    IpcLock(f"ipc://{tmp_path}/deep/run/ask").close()
    assert stat.S_IMODE((tmp_path / "deep" / "run").stat().st_mode) == 0o700


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        IpcLock(f"ipc://{tmp_path}/file/ask")
