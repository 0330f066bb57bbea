import gc
import weakref

import pytest
import torch
from checkpoints import FAMILIES, Checkpoints, chunk, memory
from torch import Tensor

from onlooker.node.answer import GrowingAnswer, decode
from onlooker.node.branch import Branch, Scratch
from onlooker.node.layout import LayoutState
from onlooker.node.model import VisionLanguageModel
from onlooker.node.steps import QUESTION_SIZES, Steps, captured_steps
from onlooker.protocol.messages import Ask

SLOT = 256
SHORT, LONG = "What do you see?", "left right " * (QUESTION_SIZES[-1] // 2)


class Table:
    """Four questions about two streams, one of them asked at two lengths."""

    def __init__(self, model: VisionLanguageModel, *, has_steps: bool, max_answers: int = 4) -> None:
        self.model = model
        self.scratch = Scratch(model.kv_shape, 4, SLOT)
        for tensor in (*self.scratch.arena.keys, *self.scratch.arena.values):
            tensor.fill_(float("nan"))
        if has_steps:
            self.scratch.steps = Steps(model, self.scratch.arena, max_answers)
        self.streams = [memory(model), memory(model)]
        self.branches: list[Branch] = []
        for first_seq, stream in ((0, 0), (2, 0), (8, 1), (10, 1)):
            self.streams[stream].append(chunk(first_seq, factor=model.geometry.factor))
            self.branches.append(Branch(model, self.streams[stream], self.streams[stream].now, self.scratch))

    def answers(self) -> list[GrowingAnswer]:
        """All begun, with their first token."""
        requests = [Ask(stream="front", question=SHORT * (1 + i % 2), max_new_tokens=16) for i in range(4)]
        answers = [GrowingAnswer(self.model, b, r, arrived=0.0) for b, r in zip(self.branches, requests, strict=True)]
        for answer in answers:
            answer.start()
        return answers

    def decoded(self, num_steps: int, num_answers: int) -> list[Tensor]:
        """Logits of each step of some answers together, likeliest tokens going in."""
        answers, logits = self.answers()[:num_answers], []
        for _ in range(num_steps):
            logits.append(decode(self.model, answers).clone())
            for answer, row in zip(answers, logits[-1], strict=True):
                answer.accept(row, int(row.argmax()))
        return logits


@pytest.mark.parametrize("num_answers", [1, 2, 3, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_fixed_size_gives_what_a_pass_of_its_own_gives(
    checkpoints: Checkpoints, family: str, num_answers: int
):
    model = checkpoints.model(family)
    mine, other = (Table(model, has_steps=has_steps).decoded(4, num_answers) for has_steps in (True, False))
    for a, b in zip(mine, other, strict=True):
        assert (a - b).abs().max() <= 1e-5


def test_more_answers_than_any_step_has_are_decoded_all_the_same(checkpoints: Checkpoints):
    model = checkpoints.model("qwen2_5_vl")
    mine, other = (Table(model, has_steps=has, max_answers=2).decoded(2, 4) for has in (True, False))
    for a, b in zip(mine, other, strict=True):
        assert (a - b).abs().max() <= 1e-5


@pytest.mark.parametrize("text", [SHORT, SHORT * 5, LONG])
def test_a_question_is_prefilled_the_same_as_a_step_and_without(checkpoints: Checkpoints, text: str):
    model = checkpoints.model("qwen2_5_vl")
    logits, rows = [], []
    for has_steps in (True, False):
        table = Table(model, has_steps=has_steps)
        branch = table.branches[2]
        span = table.streams[1].layout.question(branch.snapshot.layout, text)
        assert (len(span) > QUESTION_SIZES[-1]) == (text == LONG)
        logits.append(branch.prefill(span))
        assert branch.num_own == len(span) and branch.next_position == span.next_position
        rows.append([tensor.clone() for layer in range(3) for tensor in branch.own.rows(layer)])
    assert (logits[0] - logits[1]).abs().max() <= 1e-5
    assert all((a - b).abs().max() <= 1e-5 for a, b in zip(*rows, strict=True))


def test_a_question_by_itself_sees_nothing_of_the_memory(checkpoints: Checkpoints):
    model = checkpoints.model("qwen3_vl")
    logits = []
    for has_steps in (True, False):
        table = Table(model, has_steps=has_steps)
        table.branches[1].prefill(table.streams[0].layout.question(table.branches[1].snapshot.layout, SHORT))
        span = table.streams[0].layout.question(LayoutState(), SHORT)
        logits.append(table.branches[1].prefill_unseen(span))
    assert (logits[0] - logits[1]).abs().max() <= 1e-5


def test_a_step_writes_the_rows_of_its_answers_and_no_other(checkpoints: Checkpoints):
    model = checkpoints.model("qwen2_vl")
    table = Table(model, has_steps=True)
    answers = table.answers()[:3]
    arena = table.scratch.arena
    tensors = [*arena.keys, *arena.values]
    before = [tensor.clone().view(torch.int32) for tensor in tensors]
    decode(model, answers)
    newest = sorted(answer.branch.own.stop - 1 for answer in answers)
    for now, then in zip(tensors, before, strict=True):
        assert (now.view(torch.int32) != then).any(-1).any(-1).nonzero().flatten().tolist() == newest


def test_the_first_logits_of_a_question_outlive_later_steps(checkpoints: Checkpoints):
    model = checkpoints.model("qwen2_vl")
    table = Table(model, has_steps=True)
    spans = [table.streams[0].layout.question(table.branches[i].snapshot.layout, SHORT) for i in (0, 1)]
    first = table.branches[0].prefill(spans[0])
    kept = first.clone()
    table.branches[1].prefill(spans[1])
    assert torch.equal(first, kept)


def test_a_step_holds_on_to_no_memory(checkpoints: Checkpoints):
    table = Table(checkpoints.model("qwen2_vl"), has_steps=True)
    table.decoded(1, 4)
    arena = weakref.ref(table.branches[0].memory.extent(table.branches[0].snapshot).arena)
    table.branches.clear()
    table.streams.clear()
    gc.collect()
    assert arena() is None


def test_without_a_gpu_nothing_is_captured(checkpoints: Checkpoints):
    model = checkpoints.model("qwen2_vl")
    scratch = Scratch(model.kv_shape, 2, SLOT)
    assert captured_steps(model, scratch.arena, 2) is None
    assert not scratch.capture_steps(model) and scratch.steps is None
