"""Answers from the memory are transformers' own."""

import pytest
from checkpoints import FAMILIES, Checkpoints

from onlooker.node import native_answers as module
from onlooker.node.native_answers import compare_answers, draw_shapes, native_answers, stream_answers
from onlooker.node.reference import Film

GRID = (4, 4)


def film(checkpoints: Checkpoints, family: str, layout: str = "native", chunk_frames: int = 4) -> Film:
    return Film(draw_shapes(checkpoints.model(family), 8, seed=1), GRID, layout, chunk_frames)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("layout", "chunk_frames"), [("native", 4), ("turns", 2), ("native", 1)])
def test_every_family_answers_from_memory_as_transformers_does(
    checkpoints: Checkpoints, family: str, layout: str, chunk_frames: int
):
    shown, questions = film(checkpoints, family, layout, chunk_frames), ["What is it?", "What was the first shape?"]
    answers = stream_answers(checkpoints.model(family), shown, questions)
    assert answers == native_answers(checkpoints.model(family), shown, questions)
    assert all(answers)


def test_every_layout_and_chunk_size_is_compared(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "LENGTHS", (24,))
    monkeypatch.setattr(module, "QUESTIONS", ("What is it?",))
    compared = list(compare_answers(checkpoints.model("qwen2_vl")))
    assert len({each.case for each in compared}) == 10
    assert all(each.num_same == each.num == 1 for each in compared)
