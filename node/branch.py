"""A question's own view: a stream's memory up to some length, and a little private K/V after it.

Nothing of a branch is ever written to the memory, so dropping it restores everything: there is nothing to
restore. Branches draw their private rows from a scratch that is reserved once.
"""

import numpy as np
import torch
from torch import Tensor

from ..protocol.errors import ErrorCode, NodeError
from ..protocol.messages import Provenance, or_unset
from .arena import Arena, Extent, KVShape
from .layout import Span
from .ledger import Snapshot
from .memory import StreamMemory
from .model import VisionLanguageModel
from .passes import Prefill
from .split_kv import Row
from .steps import Steps, captured_steps
from .time_ranges import time_ranges

LOGITS_AT_ONCE = 256  # rows over the whole vocabulary, in float32: 156 MB at 152 thousand tokens


class Scratch:
    """Private rows for a fixed number of branches, `slot_tokens` each."""

    def __init__(self, shape: KVShape, num_slots: int, slot_tokens: int) -> None:
        self.num_slots = num_slots
        self.slot_tokens = slot_tokens
        self.steps: Steps | None = None  # captured over this scratch, where the device has CUDA graphs
        self._arena = Arena(shape, num_slots * slot_tokens)
        self._free = list(range(num_slots))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def resident_bytes(self) -> int:
        return self._arena.resident_bytes

    @property
    def arena(self) -> Arena:
        return self._arena

    def capture_steps(self, model: VisionLanguageModel) -> bool:
        """Record the steps of this scratch as CUDA graphs; False where it can't be. All slots must be free."""
        assert self.num_free == self.num_slots, "the rows of an answer would be written to"
        self.steps = captured_steps(model, self._arena, self.num_slots)
        return self.steps is not None

    def launch_steps(self) -> None:
        """Have steps run kernel by kernel."""
        self.steps = None

    def take(self) -> Extent:
        """The rows of a free slot; there must be one."""
        start = self._free.pop() * self.slot_tokens
        return self._arena.extent(start, start + self.slot_tokens)

    def give_back(self, slot: Extent) -> None:
        self._free.append(slot.start // self.slot_tokens)


class Branch:
    """Reads a snapshot of a memory; holds a scratch slot until it is closed."""

    def __init__(self, model: VisionLanguageModel, memory: StreamMemory, snapshot: Snapshot, scratch: Scratch) -> None:
        self.memory = memory
        self.reading = memory.read(snapshot)
        self.next_position = snapshot.layout.next_position
        self.num_own = 0
        self._model = model
        self._scratch = scratch
        self._slot = scratch.take()  # last: nothing after it can fail and keep the slot

    def close(self) -> None:
        """Give the slot back, and let go of the memory's rows."""
        self._scratch.give_back(self._slot)
        self.memory.end_reading(self.reading)

    @property
    def snapshot(self) -> Snapshot:
        """What is left of the one that it began with."""
        return self.reading.snapshot

    @property
    def reads(self) -> list[Extent]:
        """All rows of the memory that it sees."""
        return self.reading.extents

    def prefill(self, span: Span) -> Tensor:
        """Append a span to the branch; returns the logits (vocabulary,) of the token after it.

        Raises NodeError TOO_LARGE if the slot has no room for it.
        """
        self.require_room(len(span))
        logits = self._step_of(span)
        if logits is None:
            start = self._slot.start + self.num_own
            memory = Prefill([*self.reads, self.own], (self._slot.arena, start))
            logits = self._model.logits(self._model.read(span, memory)[-1])
        self.num_own += len(span)
        self.next_position = span.next_position
        return logits

    def _step_of(self, span: Span) -> Tensor | None:
        """Prefill a span as one captured step; None if there is none for it."""
        steps = self._scratch.steps
        if steps is None or span.visual.any() or self.reading.aside:
            return None
        positions = span.positions[0].tolist()  # text has one position on all axes
        memory, own = self.reading.extent, self.own
        rows = [
            Row(token, position, memory, own._replace(stop=own.stop + number + 1))
            for number, (token, position) in enumerate(zip(span.ids.tolist(), positions, strict=True))
        ]
        return steps.question(rows)

    def prefill_unseen(self, span: Span) -> Tensor:
        """Start the branch over with a span that sees nothing of the memory; returns logits like `prefill`."""
        self.reading.snapshot, self.reading.aside, self.num_own = Snapshot(), (), 0
        return self.prefill(span)

    def continuations(self, ids: np.ndarray, targets: np.ndarray) -> Tensor:
        """Log-probabilities (batch, n) of `targets` after each token of alternative continuations.

        ids and targets (batch, n), padded on the right. All see the branch as it is; none is written.
        """
        positions = self.next_position + np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        memory = Prefill([*self.reads, self.own])
        hidden = self._model.read_batch(ids, np.ascontiguousarray(positions), memory)
        wanted = torch.from_numpy(np.ascontiguousarray(targets)).to(hidden.device)
        scores = [
            self._log_probs(some, these)
            for some, these in zip(
                hidden.flatten(0, 1).split(LOGITS_AT_ONCE), wanted.flatten().split(LOGITS_AT_ONCE), strict=True
            )
        ]
        return torch.cat(scores).view(ids.shape)

    def _log_probs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Of one target (n,) after each hidden state (n, hidden)."""
        logits = self._model.logits(hidden)
        return logits.gather(-1, targets.to(logits.device)[:, None])[:, 0] - logits.logsumexp(-1)

    def step(self, token: int) -> Row:
        """Take one more row for a token that the next decode step reads, and say where it stands."""
        position = self.next_position
        self.num_own += 1
        self.next_position += 1
        return Row(token, position, self.reading.extent, self.own, self.reading.aside)

    @property
    def steps(self) -> Steps | None:
        """The captured steps of the scratch."""
        return self._scratch.steps

    @property
    def slot_tokens(self) -> int:
        """How many tokens the slot holds in all."""
        return self._scratch.slot_tokens

    @property
    def own(self) -> Extent:
        """The rows of the slot in use."""
        return self._slot.arena.extent(self._slot.start, self._slot.start + self.num_own)

    def require_room(self, num_tokens: int) -> None:
        """Raise NodeError TOO_LARGE unless the slot holds that many more tokens."""
        room = self._scratch.slot_tokens - self.num_own
        if num_tokens > room:
            raise NodeError(
                ErrorCode.TOO_LARGE,
                f"the question and its answer need {num_tokens} tokens, there is room for {room}",
                details={"num_tokens": num_tokens, "max_tokens": room},
            )

    def provenance(self, snapshot: Snapshot) -> Provenance:
        """What was known at a snapshot, and the proof that it is as it was when this branch began."""
        after = self.memory.fingerprint(self.reading)
        assert snapshot.oldest_ns is not None and snapshot.newest_ns is not None
        assert snapshot.newest_seq is not None
        return Provenance(
            num_tokens=snapshot.num_tokens,
            num_frames=snapshot.num_frames,
            from_ns=snapshot.oldest_ns,
            until_ns=snapshot.newest_ns,
            seconds=or_unset(snapshot.seconds),
            until_seq=snapshot.newest_seq,
            seen_until_ns=or_unset(snapshot.seen_until_ns),
            ts_kind=snapshot.ts_kind,
            whole_from_ns=or_unset(snapshot.whole_from_ns),
            num_forgotten_chunks=snapshot.forgotten.num_chunks,
            num_forgotten_frames=snapshot.forgotten.num_frames,
            seconds_forgotten=snapshot.forgotten.elapsed_ns / 1e9,
            ranges=time_ranges(self.reading.records, snapshot),
            fingerprint_before=self.reading.fingerprint,
            fingerprint_after=after,
            unchanged=after == self.reading.fingerprint,
        )
