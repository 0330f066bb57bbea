import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from checkpoints import FAMILIES, Checkpoints, DirectedModel, are_equal, arena, chunk, memory
from one_pass import OnePass

from onlooker.node.answer import GrowingAnswer, decode, end_tokens
from onlooker.node.branch import Branch, Scratch
from onlooker.node.chunk import Chunk
from onlooker.node.layout import LAYOUTS
from onlooker.node.memory import StreamMemory
from onlooker.node.model import VisionLanguageModel
from onlooker.protocol.errors import NodeError
from onlooker.protocol.messages import Answer, Ask

QUESTION = "What do you see now? What did you see first?"


def chunks(model: VisionLanguageModel) -> list[Chunk]:
    factor = model.geometry.factor
    return [chunk(0, 4, factor=factor), chunk(4, 2, factor=factor), chunk(6, 2, grid=(3, 2), factor=factor)]


def filled(model: VisionLanguageModel, layout: str = "native") -> StreamMemory:
    stream = memory(model, layout=layout)
    for each in chunks(model):
        stream.append(each)
    return stream


def ask(**settings: object) -> Ask:
    return Ask(**({"stream": "front", "question": QUESTION, "max_new_tokens": 10} | settings))  # type: ignore[arg-type]


class Table:
    """Answers about streams, decoded together."""

    def __init__(self, model: VisionLanguageModel, num_slots: int = 4, slot_tokens: int = 128) -> None:
        self.model = model
        self.scratch = Scratch(model.kv_shape, num_slots, slot_tokens)
        self.answers: list[GrowingAnswer] = []
        self.deltas: list[list[str]] = []

    def ask(self, stream: StreamMemory, request: Ask) -> GrowingAnswer:
        branch = Branch(self.model, stream, stream.now, self.scratch)
        deltas: list[str] = []
        answer = GrowingAnswer(self.model, branch, request, arrived=time.monotonic(), on_delta=deltas.append)
        self.answers.append(answer)
        self.deltas.append(deltas)
        answer.start()
        return answer

    def step(self) -> None:
        running = [answer for answer in self.answers if answer.finish is None]
        for answer, row in zip(running, decode(self.model, running), strict=True):
            answer.accept(row)

    def run(self) -> list[Answer]:
        while any(answer.finish is None for answer in self.answers):
            self.step()
        return [answer.result() for answer in self.answers]


def answered(model: VisionLanguageModel, stream: StreamMemory, request: Ask) -> Answer:
    table = Table(model)
    table.ask(stream, request)
    return table.run()[0]


def test_an_answer_ends_as_the_checkpoint_says(model: DirectedModel):
    tokenizer = model.tokenizer
    ends = {tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")}
    assert end_tokens(model) == ends


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_greedy_answer_equals_one_pass_over_everything_for_every_token(
    checkpoints: Checkpoints, one_pass: Callable[[str], OnePass], family: str, layout: str
):
    model, reference = checkpoints.model(family), one_pass(family)
    prompt = reference.prompt(layout, chunks(model), QUESTION)
    expected = reference.greedy(prompt, 10, ends=list(end_tokens(model)))
    answer = answered(model, filled(model, layout), ask())
    assert answer.text == model.tokenizer.decode(expected, skip_special_tokens=True)
    assert answer.num_answer_tokens == len(expected)
    assert answer.finish == ("length" if len(expected) == 10 else "stop")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_of_every_step_equal_one_pass_to_1e5(
    checkpoints: Checkpoints, one_pass: Callable[[str], OnePass], family: str
):
    model, reference = checkpoints.model(family), one_pass(family)
    prompt = reference.prompt("native", chunks(model), QUESTION)
    stream, ids = filled(model), []
    table = Table(model)
    answer = table.ask(stream, ask())
    for _ in range(5):
        ids.append(answer.newest_token)
        logits = decode(model, [answer])[0]
        assert (logits - reference.logits(prompt, ids)[-1]).abs().max() <= 1e-5
        answer.accept(logits)


def ending_at(model: VisionLanguageModel, token: int) -> DirectedModel:
    class Ending(DirectedModel):
        @property
        def generation_config(self) -> SimpleNamespace:
            return SimpleNamespace(eos_token_id=token)

    return Ending(model)


SAMPLED = {"temperature": 3.0, "seed": 1}  # the likeliest tokens repeat each other


def sampled_tokens(model: VisionLanguageModel, num: int = 8) -> list[int]:
    table = Table(model)
    answer = table.ask(filled(model), ask(max_new_tokens=num, **SAMPLED))
    ids = [answer.newest_token]
    while answer.finish is None:
        table.step()
        ids.append(answer.newest_token)
    return ids


def test_an_end_token_stops_the_answer_and_is_no_part_of_it(model: DirectedModel):
    ids = sampled_tokens(model)
    stop = next(i for i in range(2, len(ids)) if ids[i] not in ids[:i])
    answer = answered(ending_at(model, ids[stop]), filled(model), ask(**SAMPLED))
    assert (answer.finish, answer.num_answer_tokens) == ("stop", stop)
    assert answer.text == model.tokenizer.decode(ids[:stop], skip_special_tokens=True)


def test_an_answer_that_ends_at_once_is_empty_and_says_so(model: DirectedModel):
    answer = answered(ending_at(model, sampled_tokens(model)[0]), filled(model), ask(**SAMPLED))
    assert (answer.text, answer.finish, answer.num_answer_tokens) == ("", "stop", 0)


@pytest.mark.parametrize("num", [1, 2, 7])
def test_max_new_tokens_is_the_length_of_the_answer(model: DirectedModel, num: int):
    answer = answered(model, filled(model), ask(max_new_tokens=num))
    assert (answer.finish, answer.num_answer_tokens) == ("length", num)


def test_the_answer_ends_before_a_stop_string(model: DirectedModel):
    stream = filled(model)
    text = answered(model, stream, ask(max_new_tokens=20)).text
    stop = text[4:7]
    answer = answered(model, stream, ask(max_new_tokens=20, stop=[stop]))
    assert answer.finish == "stop" and answer.text == text[: text.index(stop)]


def test_the_deltas_are_the_text(model: DirectedModel):
    table = Table(model)
    table.ask(filled(model), ask(max_new_tokens=20))
    text = table.run()[0].text
    assert "".join(table.deltas[0]) == text
    assert len(table.deltas[0]) > 3 and "" not in table.deltas[0]


def test_a_seed_gives_the_same_answer_alone_and_in_company(model: DirectedModel):
    stream = filled(model)
    sampled = ask(temperature=1.5, top_p=0.9, seed=3)
    alone = answered(model, stream, sampled).text
    table = Table(model)
    table.ask(stream, ask(temperature=1.5, seed=8))
    table.ask(stream, sampled)
    table.ask(stream, ask())
    assert table.run()[1].text == alone
    assert answered(model, stream, ask(temperature=1.5, top_p=0.9, seed=4)).text != alone


def test_answers_that_come_and_go_equal_each_by_itself(model: DirectedModel):
    """Different streams, lengths, questions and ends; one begins while others run, a chunk comes in between."""
    first, second = filled(model), memory(model)
    second.append(chunk(90))
    questions = ["Is it red?", QUESTION, "left or right, top or bottom?", "And now?"]
    lengths = [12, 3, 9, 6]
    alone = [
        answered(model, stream, ask(question=question, max_new_tokens=num)).text
        for stream, question, num in zip([first, second, first], questions[:3], lengths[:3], strict=True)
    ]
    table = Table(model)
    for stream, question, num in zip([first, second, first], questions[:3], lengths[:3], strict=True):
        table.ask(stream, ask(question=question, max_new_tokens=num))
    table.step()
    first.append(chunk(50, grid=(3, 2)))
    table.step()
    table.ask(first, ask(question=questions[3], max_new_tokens=lengths[3]))
    texts = [answer.text for answer in table.run()]
    assert texts[:3] == alone
    assert texts[3] == answered(model, first, ask(question=questions[3], max_new_tokens=lengths[3])).text


# No trace


def test_nothing_is_written_to_the_memory_however_an_answer_ends(model: DirectedModel):
    stream = filled(model)
    before, now = arena(stream), stream.now
    answered(model, stream, ask())
    assert are_equal(arena(stream), before)

    table = Table(model)
    table.ask(stream, ask())
    table.step()  # and then it is dropped half-way
    assert are_equal(arena(stream), before)

    model.fail_with = RuntimeError("in layer 1")
    with pytest.raises(RuntimeError, match="in layer 1"):
        table.step()
    with pytest.raises(RuntimeError, match="in layer 1"):
        table.ask(stream, ask())
    assert are_equal(arena(stream), before) and stream.now == now


def test_a_failed_step_can_be_taken_again_by_others(model: DirectedModel):
    stream = filled(model)
    expected = answered(model, stream, ask()).text
    table = Table(model)
    broken = table.ask(stream, ask())
    model.fail_with = RuntimeError("in layer 1")
    with pytest.raises(RuntimeError):
        table.step()
    model.fail_with = None
    broken.branch.close()
    table.answers.clear()
    table.ask(stream, ask())
    assert table.run()[0].text == expected


def test_an_answer_that_may_not_fit_is_refused_before_it_begins(model: DirectedModel):
    stream = filled(model)
    num_question = len(stream.layout.question(stream.now.layout, QUESTION))
    reads = model.num_reads
    table = Table(model, num_slots=1, slot_tokens=num_question + 9)
    with pytest.raises(NodeError) as refused:
        table.ask(stream, ask(max_new_tokens=10))
    assert refused.value.code == "TOO_LARGE" and model.num_reads == reads


def test_an_answer_fills_its_slot_and_not_a_row_more(model: DirectedModel):
    stream = filled(model)
    num_question = len(stream.layout.question(stream.now.layout, QUESTION))
    table = Table(model, num_slots=2, slot_tokens=num_question + 10)
    neighbour = table.scratch.take()
    before = [t.clone() for layer in range(3) for t in neighbour.rows(layer)]
    if neighbour.start == 0:  # take the lower slot, whose end borders on the neighbour's
        own = table.scratch.take()
        table.scratch.give_back(neighbour)
        neighbour, before = own, [t.clone() for layer in range(3) for t in own.rows(layer)]
    table.ask(stream, ask(max_new_tokens=10))
    assert table.run()[0].num_answer_tokens == 10
    assert table.answers[0].branch.own.stop <= neighbour.start
    after = [t for layer in range(3) for t in neighbour.rows(layer)]
    assert are_equal([t.view(torch.int32) for t in after], [t.view(torch.int32) for t in before])


# What it says of itself


def test_an_answer_knows_what_it_has_seen(model: DirectedModel):
    stream = filled(model)
    table = Table(model)
    table.ask(stream, ask())
    now = stream.now
    stream.append(chunk(40, grid=(3, 2)))
    result = table.run()[0]
    assert result.memory.unchanged
    assert (result.memory.num_tokens, result.memory.num_frames) == (now.num_tokens, 8)
    assert (result.memory.until_seq, result.memory.until_ns) == (7, 3_500_000_007)
    assert result.num_prompt_tokens == len(stream.layout.question(now.layout, QUESTION))


def test_the_times_of_an_answer_add_up(model: DirectedModel):
    timing = answered(model, filled(model), ask()).timing
    parts = (timing.queue_ms, timing.prefill_ms, timing.decode_ms)
    assert min(parts) >= 0 and timing.prefill_ms > 0
    assert timing.first_token_ms == pytest.approx(timing.queue_ms + timing.prefill_ms)
    assert timing.total_ms == pytest.approx(sum(parts))


def test_the_notice_of_a_model_comes_with_every_answer(model: DirectedModel):
    model.notice = "It is noise."
    assert answered(model, filled(model), ask()).notice == "It is noise."
