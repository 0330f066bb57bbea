"""Before the first frame: what is faster is used where it computes the same, and nothing is left behind."""

from collections.abc import Sequence

import pytest
from checkpoints import Checkpoints, DirectedModel
from torch import Tensor

from onlooker.node.branch import Scratch
from onlooker.node.rehearsal import Rehearsal, warm_up
from onlooker.node.split_kv import Row
from onlooker.node.steps import QUESTION_SIZES, Steps

SLOT = 256


class WrongSteps(Steps):
    """Wrong where the largest step is taken."""

    def decode(self, rows: Sequence[Row]) -> Tensor | None:
        logits = super().decode(rows)
        assert logits is not None
        return logits.roll(1, -1) if len(rows) == 3 else logits


class WrongQuestions(Steps):
    """Wrong where the largest step is taken."""

    def question(self, rows: Sequence[Row]) -> Tensor | None:
        logits = super().question(rows)
        return logits if logits is None or len(rows) <= QUESTION_SIZES[0] else logits.roll(1, -1)


class FailingSteps(Steps):
    def decode(self, rows: Sequence[Row]) -> Tensor | None:
        raise RuntimeError("an illegal instruction")


@pytest.mark.parametrize(
    ("kind", "said"),
    [(Steps, ""), (WrongSteps, "are off by"), (WrongQuestions, "are off by"), (FailingSteps, "an illegal instruction")],
)
def test_steps_that_compute_something_else_are_given_up_before_the_start(
    checkpoints: Checkpoints, kind: type[Steps], said: str, caplog: pytest.LogCaptureFixture
):
    model = checkpoints.model("qwen2_5_vl")
    scratch = Scratch(model.kv_shape, 3, SLOT)
    rehearsal = Rehearsal(model, scratch)
    scratch.steps = kind(model, scratch.arena, 3)
    rehearsal.adopt("captured steps", lambda: True, scratch.launch_steps)
    assert (scratch.steps is not None) == (kind is Steps)
    assert ("they are not used" in caplog.text) == bool(said)
    assert said in caplog.text


def test_what_cannot_be_had_is_not_rehearsed(checkpoints: Checkpoints):
    model = DirectedModel(checkpoints.model("qwen2_5_vl"))
    rehearsal = Rehearsal(model, Scratch(model.kv_shape, 1, SLOT))
    model.num_reads = 0
    rehearsal.adopt("captured chunks", model.record_chunks, model.launch_chunks)
    assert model.num_reads == 0


def test_warming_up_leaves_nothing_behind(checkpoints: Checkpoints):
    model = checkpoints.model("qwen2_5_vl")
    scratch = Scratch(model.kv_shape, 2, SLOT)
    warm_up(model, scratch, "auto")
    assert scratch.num_free == 2 and scratch.steps is None and model.pieces is None
