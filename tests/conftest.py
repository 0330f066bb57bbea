"""Fixtures shared by the tests of the engine's modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from checkpoints import Checkpoints, DirectedModel
    from one_pass import OnePass

    from onlooker.node.engine import Engine


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    from checkpoints import Checkpoints  # here, so that tests of the light side import no torch

    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def one_pass(checkpoints: Checkpoints) -> Callable[[str], OnePass]:
    """Each family's checkpoint in transformers' hands, loaded once."""
    from one_pass import OnePass

    return cache(lambda family: OnePass(checkpoints, family))


@pytest.fixture
def model(checkpoints: Checkpoints) -> DirectedModel:
    from checkpoints import DirectedModel

    return DirectedModel(checkpoints.model("qwen2_5_vl"))


@pytest.fixture
def engine(model: DirectedModel) -> Iterator[Engine]:
    """With a stream "front"."""
    from engines import running_engine

    with running_engine(model) as engine:
        yield engine
