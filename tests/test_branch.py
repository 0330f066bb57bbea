import pytest
import torch
from checkpoints import DirectedModel, are_equal, arena, chunk, memory
from torch import Tensor

from onlooker.node.arena import Extent
from onlooker.node.branch import Branch, Scratch
from onlooker.node.layout import LayoutState, Span
from onlooker.node.memory import StreamMemory
from onlooker.node.passes import Prefill
from onlooker.protocol.errors import NodeError


@pytest.fixture
def stream(model: DirectedModel) -> StreamMemory:
    stream = memory(model)
    stream.append(chunk(0))
    stream.append(chunk(2))
    return stream


def opened(model: DirectedModel, stream: StreamMemory, scratch: Scratch | None = None) -> Branch:
    return Branch(model, stream, stream.now, scratch or Scratch(model.kv_shape, 2, 64))


def question(stream: StreamMemory, text: str = "What?") -> Span:
    return stream.layout.question(stream.now.layout, text)


def bits(slot: Extent) -> list[Tensor]:
    layers = range(slot.arena.shape.num_layers)
    return [t.clone().view(torch.int32) for layer in layers for t in slot.rows(layer)]


def test_slots_are_apart_and_can_be_taken_again(model: DirectedModel):
    scratch = Scratch(model.kv_shape, 3, 10)
    slots = [scratch.take() for _ in range(3)]
    assert scratch.num_free == 0
    assert sorted((slot.start, slot.stop) for slot in slots) == [(0, 10), (10, 20), (20, 30)]
    scratch.give_back(slots[1])
    assert scratch.num_free == 1 and scratch.take() == slots[1]
    assert scratch.resident_bytes == 30 * model.kv_shape.bytes_per_token


def test_closing_gives_the_slot_back(model: DirectedModel, stream: StreamMemory):
    scratch = Scratch(model.kv_shape, 1, 64)
    branch = opened(model, stream, scratch)
    assert scratch.num_free == 0
    branch.close()
    assert scratch.num_free == 1


def test_a_branch_that_cannot_be_opened_holds_no_slot(model: DirectedModel, stream: StreamMemory):
    class Unreadable:
        def read(self, snapshot: object) -> None:
            raise RuntimeError("the device is gone")

    scratch = Scratch(model.kv_shape, 1, 64)
    with pytest.raises(RuntimeError, match="the device is gone"):
        Branch(model, Unreadable(), stream.now, scratch)  # type: ignore[arg-type]
    assert scratch.num_free == 1


def test_prefilling_in_two_pieces_equals_one(model: DirectedModel, stream: StreamMemory):
    whole, pieces = opened(model, stream), opened(model, stream)
    first, second = question(stream), question(stream, "Why?")
    expected = whole.prefill(first), whole.prefill(moved(second, whole.next_position))
    logits = pieces.prefill(first), pieces.prefill(moved(second, pieces.next_position))
    assert torch.equal(expected[1], logits[1])
    assert whole.num_own == len(first) + len(second)


def moved(span: Span, position: int) -> Span:
    """The span as it is when it begins at another position."""
    by = position - int(span.positions.min())
    return Span(span.ids, span.positions + by, span.visual, span.next_position + by)


def test_only_the_branchs_own_rows_are_written(model: DirectedModel, stream: StreamMemory):
    scratch = Scratch(model.kv_shape, 2, 64)
    other = scratch.take()
    before, untouched = arena(stream), bits(other)
    branch = opened(model, stream, scratch)
    span = question(stream)
    branch.prefill(span)
    beyond = branch.own.arena.extent(branch.own.stop, branch.own.start + 64)
    assert are_equal(arena(stream), before) and are_equal(bits(other), untouched)
    after = bits(beyond)
    branch.continuations(*torch.randint(20, 300, (2, 3, 9)).numpy())
    assert are_equal(bits(beyond), after) and are_equal(arena(stream), before)
    assert branch.num_own == len(span)


def test_a_branch_started_over_sees_nothing_of_the_memory(model: DirectedModel, stream: StreamMemory):
    alone = stream.layout.question(LayoutState(), "What?")
    expected = model.logits(model.read(alone, Prefill([])))[-1]
    branch = opened(model, stream)
    branch.prefill(question(stream))
    assert (branch.prefill_unseen(alone) - expected).abs().max() <= 1e-5
    assert branch.next_position == len(alone) and branch.num_own == len(alone)


def test_room_is_exact(model: DirectedModel, stream: StreamMemory):
    span = question(stream)
    opened(model, stream, Scratch(model.kv_shape, 1, len(span))).prefill(span)
    branch = opened(model, stream, Scratch(model.kv_shape, 1, len(span) - 1))
    reads = model.num_reads
    with pytest.raises(NodeError) as refused:
        branch.prefill(span)
    assert refused.value.code == "TOO_LARGE" and not refused.value.retryable
    assert refused.value.details == {"num_tokens": len(span), "max_tokens": len(span) - 1}
    assert model.num_reads == reads


def test_provenance_proves_that_the_memory_is_as_it_was(model: DirectedModel, stream: StreamMemory):
    branch = opened(model, stream)
    branch.prefill(question(stream))
    stream.append(chunk(4))  # what comes above a snapshot is not its business
    proof = branch.provenance(branch.snapshot)
    assert proof.unchanged and proof.fingerprint_before == proof.fingerprint_after != ""
    assert (proof.num_frames, proof.until_seq) == (4, 3)
    assert (proof.from_ns, proof.until_ns, proof.seconds) == (7, 1_500_000_007, 1.5)
    assert proof.num_tokens == branch.snapshot.num_tokens and proof.ts_kind == "media"


def test_provenance_tells_of_a_row_that_was_written_to(model: DirectedModel, stream: StreamMemory):
    branch = opened(model, stream)
    stream.extent(stream.now).arena.keys[0][0] += 1
    proof = branch.provenance(branch.snapshot)
    assert not proof.unchanged and proof.fingerprint_before != proof.fingerprint_after
