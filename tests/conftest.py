"""Fixtures shared by the tests of the engine's modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from checkpoints import Checkpoints


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    from checkpoints import Checkpoints  # here, so that tests of the light side import no torch

    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))
