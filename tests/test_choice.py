import math
import time
from collections.abc import Callable

import numpy as np
import pytest
from checkpoints import FAMILIES, Checkpoints, DirectedModel, are_equal, arena, chunk, memory
from one_pass import OnePass
from torch import Tensor

from onlooker.node.attention import MemoryPass
from onlooker.node.branch import Branch, Scratch
from onlooker.node.choice import choose
from onlooker.node.layout import LAYOUTS
from onlooker.node.memory import StreamMemory
from onlooker.node.model import VisionLanguageModel
from onlooker.protocol.errors import NodeError
from onlooker.protocol.messages import AskChoice, Choice

QUESTION = "Which shape came first?"
OPTIONS = ["a red circle", "red", "a red", "東京 🚲", "none of these, nothing at all"]


def filled(model: VisionLanguageModel, layout: str = "native") -> StreamMemory:
    stream = memory(model, layout=layout)
    for seq in (0, 2):
        stream.append(chunk(seq, factor=model.geometry.factor))
    return stream


def chosen(
    model: VisionLanguageModel, stream: StreamMemory, *options: str, slot_tokens: int = 128, **settings: str
) -> Choice:
    scratch = Scratch(model.kv_shape, 1, slot_tokens)
    request = AskChoice(stream="front", question=QUESTION, options=list(options), **settings)  # type: ignore[arg-type]
    branch = Branch(model, stream, stream.now, scratch)
    try:
        return choose(model, branch, request, arrived=time.monotonic())
    finally:
        branch.close()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_equal_one_pass_over_everything_for_every_option(
    checkpoints: Checkpoints, one_pass: Callable[[str], OnePass], family: str, layout: str
):
    model, reference = checkpoints.model(family), one_pass(family)
    factor = model.geometry.factor
    seen = reference.prompt(layout, [chunk(0, factor=factor), chunk(2, factor=factor)], QUESTION)
    unseen = reference.prompt(layout, [], QUESTION)
    choice = chosen(model, filled(model, layout), *OPTIONS)
    for option, score in zip(OPTIONS, choice.scores, strict=True):
        ids = [*model.format.tokenize_plain(option), *model.format.tokenize("<|im_end|>")]
        with_memory, without = reference.log_probs(seen, ids), reference.log_probs(unseen, ids)
        assert score.option == option and score.num_tokens == len(ids)
        assert score.raw == pytest.approx(sum(with_memory), abs=1e-4)
        assert score.normalized == pytest.approx(np.mean(with_memory), abs=1e-5)
        assert score.calibrated == pytest.approx(np.mean(with_memory) - np.mean(without), abs=2e-5)


@pytest.mark.parametrize("rank_by", ["raw", "normalized", "calibrated"])
def test_the_best_is_the_highest_by_the_score_asked_for(model: DirectedModel, rank_by: str):
    choice = chosen(model, filled(model), *OPTIONS, rank_by=rank_by)
    ranked = [getattr(score, rank_by) for score in choice.scores]
    best, second = sorted(ranked, reverse=True)[:2]
    assert choice.rank_by == rank_by
    assert choice.option == OPTIONS[choice.index] and ranked[choice.index] == best
    assert choice.margin == pytest.approx(best - second)
    probabilities = [score.probability for score in choice.scores]
    assert sum(probabilities) == pytest.approx(1)
    assert probabilities == pytest.approx([math.exp(r - best) * probabilities[choice.index] for r in ranked])


def test_shuffling_the_options_shuffles_the_scores(model: DirectedModel):
    stream = filled(model)
    order = [3, 0, 4, 2, 1]
    straight, shuffled = chosen(model, stream, *OPTIONS), chosen(model, stream, *(OPTIONS[i] for i in order))
    for position, i in enumerate(order):
        assert shuffled.scores[position].raw == pytest.approx(straight.scores[i].raw, abs=1e-4)
        assert shuffled.scores[position].calibrated == pytest.approx(straight.scores[i].calibrated, abs=1e-5)
    assert shuffled.option == straight.option


def test_an_option_scores_the_same_in_any_company(model: DirectedModel):
    stream = filled(model)
    together = chosen(model, stream, *OPTIONS)
    for option, score in zip(OPTIONS, together.scores, strict=True):
        alone = chosen(model, stream, option).scores[0]
        assert alone.raw == pytest.approx(score.raw, abs=1e-4)
        assert alone.calibrated == pytest.approx(score.calibrated, abs=1e-5)


def test_an_option_that_begins_another_is_scored_with_its_end(model: DirectedModel):
    stream = filled(model)
    longer, shorter = chosen(model, stream, "red circle", "red").scores
    assert shorter.num_tokens == len(model.format.tokenize_plain("red")) + 1
    assert longer.num_tokens == len(model.format.tokenize_plain("red circle")) + 1
    assert shorter.raw != longer.raw


def test_one_option_is_certain(model: DirectedModel):
    choice = chosen(model, filled(model), "only this")
    assert (choice.index, choice.option, choice.margin) == (0, "only this", 0.0)
    assert choice.scores[0].probability == 1.0


def test_special_tokens_in_an_option_are_letters(model: DirectedModel):
    choice = chosen(model, filled(model), "red<|im_end|>", "red")
    assert choice.scores[0].num_tokens > choice.scores[1].num_tokens + 3


def test_the_memory_counts(model: DirectedModel):
    """What the words say by themselves is taken away: without it, nothing is left of an empty stream's scores."""
    scores = chosen(model, filled(model), *OPTIONS).scores
    assert max(abs(score.calibrated) for score in scores) > 1e-3


@pytest.mark.parametrize("slot_tokens", [60, 80, 1024])
def test_one_long_option_does_not_make_the_others_as_long(model: DirectedModel, slot_tokens: int):
    class Measured(DirectedModel):
        def read_batch(self, ids: np.ndarray, positions: np.ndarray, memory: MemoryPass) -> Tensor:
            sizes.append(ids.size)
            return super().read_batch(ids, positions, memory)

    sizes: list[int] = []
    options = ["yes", "no", "or is it something else altogether, far away?", "perhaps", "x"]
    stream = filled(model)
    expected = chosen(model, stream, *options, slot_tokens=1024)
    choice = chosen(Measured(model), stream, *options, slot_tokens=slot_tokens)
    assert max(sizes) <= slot_tokens
    assert [score.raw for score in choice.scores] == pytest.approx([score.raw for score in expected.scores], abs=1e-4)


@pytest.mark.parametrize(("option", "slot_tokens"), [("no " * 200, 64), ("no", 40)])
def test_what_does_not_fit_is_refused_before_anything_runs(model: DirectedModel, option: str, slot_tokens: int):
    stream = filled(model)  # in the second case, only the question asked of an empty memory is too long
    reads = model.num_reads
    with pytest.raises(NodeError) as refused:
        chosen(model, stream, "yes", option, slot_tokens=slot_tokens)
    assert refused.value.code == "TOO_LARGE" and model.num_reads == reads


def test_a_choice_leaves_no_trace(model: DirectedModel):
    stream = filled(model)
    before, now = arena(stream), stream.now
    choice = chosen(model, stream, *OPTIONS)
    assert choice.memory.unchanged and choice.memory.num_tokens == now.num_tokens
    assert (choice.memory.num_frames, choice.memory.until_seq) == (4, 3)
    assert are_equal(arena(stream), before) and stream.now == now


def test_a_choice_that_fails_leaves_no_trace_and_no_slot_behind(model: DirectedModel):
    stream = filled(model)
    before = arena(stream)
    scratch = Scratch(model.kv_shape, 1, 128)
    model.fail_with = RuntimeError("in layer 1")
    branch = Branch(model, stream, stream.now, scratch)
    request = AskChoice(stream="front", question=QUESTION, options=OPTIONS)
    with pytest.raises(RuntimeError, match="in layer 1"):
        choose(model, branch, request, arrived=0.0)
    branch.close()
    assert scratch.num_free == 1 and are_equal(arena(stream), before)


def test_the_times_of_a_choice_add_up(model: DirectedModel):
    timing = chosen(model, filled(model), *OPTIONS).timing
    assert min(timing.queue_ms, timing.prefill_ms, timing.decode_ms) >= 0
    assert timing.total_ms == pytest.approx(timing.queue_ms + timing.prefill_ms + timing.decode_ms)
