"""The memory of one stream: an arena on the device, the ledger of what is in it, and the layout between them."""

import logging
import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from msgspec import UNSET, UnsetType

from ..protocol.forecast import fit, tokens_of
from ..protocol.messages import CacheInfo, Footprint, MemoryLimit, or_unset
from ..protocol.quantity import bytes_text
from .arena import Arena, Extent, Turn
from .chunk import Chunk, ChunkRefused, Encoded
from .forecast import footprint_of, size_of
from .layout import LAYOUTS, LayoutState, Patches, Rebase, Span
from .ledger import ChunkRecord, Ledger, Snapshot
from .model import Between, Encoding, Part, VisionLanguageModel
from .options import StreamOptions
from .passes import Prefill
from .reading import Reading
from .shown import Shown
from .storage import Storage
from .token_drop import TokenDrop
from .upload import Upload

logger = logging.getLogger(__name__)

_FREED_SHARE = 16  # of its rows a memory frees at a time: they move seldom, and the reserve mostly holds twice as much
_FREED_POSITIONS_SHARE = 4  # and of its positions a 4th at least: in bfloat16, many rotations cost accuracy

_LEAST_CHUNKS = 4  # that a memory of which a share may be used has room for


class Plan(NamedTuple):
    """What a chunk takes of a memory as it is now."""

    chunk: Chunk
    size: tuple[int, int]  # width and height as the model sees them
    patches: Patches
    span: Span  # its tokens; they stand elsewhere once others are forgotten
    layout: LayoutState  # after it
    must_forget: bool  # others, to make room
    must_wait: bool  # it would be written to rows that somebody reads
    is_alone: bool  # not encoded together with chunks of other memories

    def goes_with(self, other: "Plan") -> bool:
        """Whether it can be encoded now, together with the chunk of another memory."""
        grids = {(each.height, each.width, each.num_tokens) for each in (self.patches, other.patches)}
        return len(grids) == 1 and not (self.must_wait or self.is_alone or other.is_alone)


class StreamMemory:
    """Grows by whole chunks. What lies below a length never changes until the memory is cut back or forgets.

    A chunk is written to rows that nobody reads yet and counts only once all layers have it: whatever fails
    on the way leaves the memory as it was, less what was forgotten for it. Forgetting moves the chunks that stay
    down to those before them: their keys and values keep their bits and their positions. What is being read goes
    aside, to rows reserved for it; a chunk waits only if these do not suffice, or if keys must rotate. What is
    forgotten, and when, follows from the chunks alone, whoever reads. A memory of the last frames starts over instead,
    and what stays is encoded again.
    """

    def __init__(self, model: VisionLanguageModel, options: StreamOptions) -> None:
        """Reserve the arena. Raises ValueError if the budget holds no token, MemoryError if it can't be had."""
        capacity = options.memory_bytes // model.kv_shape.bytes_per_token
        if capacity < 1:
            raise ValueError(
                f"memory_bytes {options.memory_bytes} is under {model.kv_shape.bytes_per_token}, one token"
            )
        self.options = options
        self.layout = LAYOUTS[options.layout](model.format)
        self.ledger = Ledger()
        self._retention = options.policy
        self._drop = _token_drop(options)
        self._shown: list[Shown] = []  # what is held, if that is the last frames
        self._full: MemoryLimit | None = None  # what there is no more of
        self._footprint: Footprint | None = None  # of chunks of the present size
        self._footprint_size: tuple[int, int] | None = None
        self._num_forgotten_frames = 0  # not told yet with a chunk
        self.model = model
        self._storage = Storage(model.kv_shape, capacity)
        self._use(capacity)

    def adjust(self, options: StreamOptions) -> None:
        """Go on with another drop, encode size, retention and share of the memory, from the next chunk on.

        Of a share, some chunks like the newest fit in any case; the storage of the rest is given back at once, and
        reserved again for a larger one. Where other storage can't be had, it goes on in what it has.
        """
        if options.drop != self.options.drop:
            self._drop = _token_drop(options)
        self.options = replace(options, memory_bytes=self.options.memory_bytes)
        self._retention = options.policy
        capacity = self._capacity_of(self.options.memory_bytes)
        try:
            self._renew(capacity)
        except (MemoryError, ValueError) as error:
            logger.warning("stream %s: %s; it goes on in the storage that it has", options.name, error)
        self._use(capacity)

    def resize(self, memory_bytes: int) -> None:
        """Go on in other storage, with what it holds of this; who reads goes on reading the old one, which goes then.

        Raises MemoryError if it can't be had, ValueError if it is too small for what is not to be forgotten.
        """
        capacity = self._capacity_of(memory_bytes)
        self._renew(capacity)
        self.options = replace(self.options, memory_bytes=memory_bytes)
        self._use(capacity)

    def _capacity_of(self, memory_bytes: int) -> int:
        """How many tokens to have storage for, of so many bytes."""
        whole = memory_bytes // self.model.kv_shape.bytes_per_token
        share = int(whole * self.options.memory_share)
        least = self.now.num_anchor + _LEAST_CHUNKS * self.ledger.num_newest_tokens
        return share if self._retention.max_tokens(share) >= least else min(whole, 2 * least)

    def _use(self, capacity: int) -> None:
        """Fill the storage so far, and no further than there is."""
        self._capacity = min(capacity, self._arena.capacity)
        self._max_tokens = self._retention.max_tokens(self._capacity)

    def _renew(self, capacity: int) -> None:
        """Move to storage for so many tokens; what does not fit is forgotten. Raises as `resize`."""
        if capacity == self._arena.capacity:
            return
        records, num_before = self.ledger.records, self.now.num_frames
        max_tokens, keep = self._retention.max_tokens(capacity), list(range(len(records)))
        footprint, fps = self._footprint, self.options.fps
        if footprint is not None and fit(footprint, max_tokens, fps).num_chunks < self._num_last_chunks:
            raise ValueError(f"the last {self.options.last_frames} frames do not fit into {capacity} tokens")
        if self.now.num_tokens > max_tokens:
            keep = self._retention.keep(records, max(0, max_tokens - self.now.num_anchor))
        starts_over = self._retention.starts_over and len(keep) < len(records)
        rows = np.arange(0) if starts_over else _rows([records[place] for place in keep], self.now.num_anchor)
        if len(rows) > max_tokens:
            raise ValueError(f"of the {len(rows)} tokens of the memory {max_tokens} fit into {capacity}")
        self._storage.renew(capacity, rows)
        if starts_over:
            self.ledger.start_over()
        else:
            self.ledger.forget(keep)
        self._retain_kept()
        self._num_forgotten_frames += num_before - self.now.num_frames
        self._full = None

    def release(self) -> None:
        """Give the storage back; the memory is of no use any more.

        Not left to the last reference: the traceback of a question that failed may hold one, in a cycle.
        """
        self._shown.clear()
        self._drop = None
        self._storage.release()

    @property
    def now(self) -> Snapshot:
        return self.ledger.now

    @property
    def _arena(self) -> Arena:
        return self._storage.arena

    def extent(self, snapshot: Snapshot) -> Extent:
        """The rows that hold a snapshot."""
        return self._arena.extent(0, snapshot.num_tokens)

    # Reading

    def read(self, snapshot: Snapshot) -> Reading:
        """Keep the rows of a snapshot until `end_reading`."""
        return self._storage.read(snapshot, self.ledger.records)

    def end_reading(self, reading: Reading) -> None:
        self._storage.end_reading(reading)

    @property
    def is_read(self) -> bool:
        return self._storage.is_read

    def fingerprint(self, reading: Reading) -> str:
        """A digest over its sampled rows as they are now; see `Arena.fingerprint`."""
        return reading.arena.fingerprint(reading.sampled)

    # Growing

    def append(
        self,
        chunk: Chunk,
        upload: Upload | None = None,
        between: Between | None = None,
        plan: Plan | None = None,
    ) -> Encoded:
        """Encode a chunk into the memory, which may forget others for it, or raise ChunkRefused.

        There must be room for all of its tokens, also for those that turn out to say nothing new.

        `upload` has its pictures, if they are on their way to the device. `between` is called between two layers;
        what is forgotten is forgotten by then, and nothing of the chunk counts yet. `plan` is what to do for it, if
        that is known already.
        """
        try:
            addition = Addition(self, plan or self.plan(chunk), upload)
        except ChunkRefused as refused:
            self._note_full(refused)
            raise
        return append_together([addition], between)[0]

    def plan(self, chunk: Chunk) -> Plan:
        """What `append` will do for a chunk; it holds until the memory changes, or somebody begins to read it.

        Raises ChunkRefused if the memory cannot hold it.
        """
        size = self._encode_size(chunk)
        if self.options.last_frames and size != self._footprint_size:
            self._check_last_frames(size)
        patches, now = _patches(chunk, self.model.geometry.grid(size)), self.now
        span, layout = self._span(patches, now)
        must_forget = len(span) > self._room or span.next_position > self.model.max_positions
        must_forget |= 0 < self.options.last_frames < now.num_frames + chunk.num_frames
        if must_forget and self._retention.starts_over:
            span, layout = self._span(patches, Snapshot())
        must_wait, is_alone = self._must_wait(span, must_forget), self.options.last_frames > 0
        return Plan(chunk, size, patches, span, layout, must_forget, must_wait, is_alone)

    def place(self, plan: Plan, upload: Upload | None, between: Between | None) -> "_Placed":
        """Make room for a chunk, and say what is to be encoded of it; see `append`."""
        chunk, size, patches, span, layout, must_forget, *_ = plan
        again_ms = 0.0
        if must_forget:
            again_ms = self._make_room(span, self._last_shown(patches, chunk.num_frames), between)
            span, layout = self._extend(self.now, patches)  # which stands elsewhere now
        now, drop = self.now, self._drop
        assert now.num_tokens + len(span) <= self._storage.top, "rows would be written that somebody reads"
        grid = (patches.height, patches.width)
        part = Part(
            [picture.pixels for picture in chunk.pictures] if upload is None else upload.pixels(),
            span,
            Prefill([self._arena.extent(0, now.num_tokens)], (self._arena, now.num_tokens), n_varies=drop is not None),
            None if drop is None else partial(drop.sift, grid=grid, number=now.num_seen),
        )
        return _Placed(chunk, size, patches, layout, part, again_ms)

    def count(self, placed: "_Placed", encoding: Encoding) -> Encoded:
        """Note that all layers have a chunk that was placed."""
        chunk, size, patches, layout, (_, span, *_), again_ms = placed
        num_anchor = self.layout.num_anchor(patches) if self.now.layout.is_empty else 0
        num_dropped = 0 if self._drop is None else self._drop.commit()
        num_tokens = len(span) - num_dropped
        self.ledger.append(chunk, num_tokens, layout, num_anchor, span.reach(num_anchor), num_dropped)
        if self.options.last_frames:
            self._shown.append(Shown(patches, encoding.vision, chunk.num_frames))
        self._full = None
        if size != self._footprint_size:
            self._footprint, self._footprint_size = footprint_of(self.model, self.options, size), size
        num_forgotten, self._num_forgotten_frames = self._num_forgotten_frames, 0
        times = encoding.times
        stages = (times.preprocess_ms, times.vision_ms, times.prefill_ms + again_ms)
        return Encoded(num_tokens, size, *stages, num_forgotten, num_dropped)

    def _extend(self, now: Snapshot, patches: Patches) -> tuple[Span, LayoutState]:
        """The tokens of a chunk after a snapshot, and the layout then."""
        if self.options.last_frames:  # the clock of a prompt starts with it
            patches = patches.since(patches.times_ns[0][0] if now.layout.is_empty else now.began_stream_ns)
        return self.layout.extend(now.layout, patches)

    def _span(self, patches: Patches, now: Snapshot) -> tuple[Span, LayoutState]:
        """`_extend`, checked. Raises ChunkRefused if they can never have room."""
        # Before anything of that size is made: a tiny picture may be asked for at an enormous size.
        self._check_room(patches.num_tokens)
        span, layout = self._extend(now, patches)
        self._check_room(len(span))
        self._check_positions(span, now.layout)
        return span, layout

    def info(self) -> CacheInfo:
        """The memory in figures, measured on its tensors."""
        now, model = self.now, self.model
        return CacheInfo(
            num_tokens=now.num_tokens,
            capacity_tokens=self._max_tokens,
            logical_bytes=self._arena.logical_bytes(now.num_tokens),
            resident_bytes=self._arena.resident_bytes + sum(shown.num_bytes for shown in self._shown),
            bytes_per_token=model.kv_shape.bytes_per_token,
            num_chunks=now.num_chunks,
            num_frames=now.num_frames,
            num_padded_frames=now.num_padded,
            positions_used=now.layout.next_position,
            positions_left=max(0, model.max_positions - now.layout.next_position),
            seconds=or_unset(now.seconds),
            oldest_ns=or_unset(now.oldest_ns),
            newest_ns=or_unset(now.newest_ns),
            newest_seq=or_unset(now.newest_seq),
            seen_until_ns=or_unset(now.seen_until_ns),
            seconds_until_full=self._seconds_until_full(),
            seconds_of_memory=self._seconds_of_memory(),
            full=self._full is not None,
            limit=or_unset(self._full),
            whole_from_ns=or_unset(now.whole_from_ns),
            num_forgotten_chunks=now.forgotten.num_chunks,
            num_forgotten_frames=now.forgotten.num_frames,
            seconds_forgotten=now.forgotten.elapsed_ns / 1e9,
            num_dropped_tokens=now.num_dropped,
        )

    def _seconds_until_full(self) -> float | UnsetType:
        """At the present pace; unknown of a memory that forgets bit by bit, which is never full."""
        if self.options.last_frames or (self._retention.forgets and not self._retention.starts_over):
            return UNSET
        return self._seconds_for(self._room, self.now.layout.next_position)

    def _seconds_of_memory(self) -> float | UnsetType:
        """How much of the stream is there without a gap once it is full, at the present pace."""
        if self.options.last_frames:
            pace = self.ledger.pace
            return UNSET if pace is None else self._num_last_chunks / pace.num_chunks
        num_tokens = self._max_tokens - self.now.num_anchor
        return self._seconds_for(num_tokens * self._retention.whole_share, 0)

    def _seconds_for(self, num_tokens: float, position: int) -> float | UnsetType:
        """How long it takes, at the present pace, to fill so many rows, or to use the positions from one on."""
        pace, footprint = self.ledger.pace, self._footprint
        if pace is None or footprint is None:
            return UNSET
        per_second = footprint.positions_per_second + footprint.positions_per_chunk * pace.num_chunks
        num_positions = max(0, self.model.max_positions - position)
        by_positions = num_positions / per_second if per_second else math.inf
        return min(num_tokens / pace.num_tokens, by_positions)

    # Forgetting

    def _must_wait(self, span: Span, must_forget: bool) -> bool:
        """Whether a chunk of these tokens would be written to rows that somebody reads, which it must not."""
        if not (self.is_read and self._retention.forgets):
            return False
        num_gone = 0
        if must_forget:
            if self._retention.starts_over or span.next_position > self.model.max_positions:
                return True
            records = self.ledger.records
            num_gone = self.now.num_tokens - self.now.num_anchor - sum(records[i].num_tokens for i in self._stay(span))
        # What goes aside is copied to rows that are free, and then the chunk takes the place of it.
        return self.now.num_tokens + max(num_gone, len(span)) > self._storage.top

    def _make_room(self, span: Span, shown: Sequence[Shown], between: Between | None) -> float:
        """Forget for the tokens of a chunk, which the memory can hold, and give positions back if they end.

        Of a memory that starts over, chunks stay that are `shown` again; returns the milliseconds that takes.
        """
        num_before = self.now.num_frames
        try:
            if self._retention.starts_over:
                return self._start_over(shown, between)
            if len(span) > self._room:
                self._keep(self._stay(span))
            if span.next_position > self.model.max_positions:
                self._rebase(span)
            return 0.0
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(self.model, error, "what stays") from error
        finally:
            self._num_forgotten_frames += num_before - self.now.num_frames

    def _start_over(self, shown: Sequence[Shown], between: Between | None) -> float:
        """Begin the prompt anew, with the newest chunks that are `shown` again; returns the milliseconds that takes.

        Until they are all there the memory is empty, and so it stays if one of them fails: then all is forgotten.
        """
        was, before, again_ms = self.now, self.ledger.records, 0.0
        self.ledger.start_over()
        self._retain_kept()
        if not shown:
            return again_ms
        again: list[ChunkRecord] = []
        steps = self._prompt([each.patches for each in shown])
        for record, (patches, vision, _), (span, after) in zip(before[-len(shown) :], shown, steps, strict=True):
            first = after.num_tokens - len(span)
            places = Prefill([self._arena.extent(0, first)], (self._arena, first))
            again_ms += self.model.encode_again(vision, span, places, between)
            num_anchor = 0 if again else self.layout.num_anchor(patches)
            num_tokens, reach = len(span) - num_anchor, span.reach(num_anchor)
            again.append(replace(record, first_token=first + num_anchor, num_tokens=num_tokens, reach=reach))
        self.ledger.come_back(was, before, again, steps[-1][1].layout)
        self._shown = list(shown)
        return again_ms

    def _last_shown(self, patches: Patches, num_frames: int) -> list[Shown]:
        """The newest chunks that go with another one into the last frames, or as many of them as have room."""
        shown = list(self._shown)
        while shown and sum(each.num_frames for each in shown) + num_frames > self.options.last_frames:
            del shown[0]
        while shown and not self._have_room([*(each.patches for each in shown), patches]):
            del shown[0]
        return shown

    def _have_room(self, chunks: Sequence[Patches]) -> bool:
        """Whether a prompt of these chunks alone has the rows and the positions."""
        _, after = self._prompt(chunks)[-1]
        return after.num_tokens <= self._max_tokens and after.layout.next_position <= self.model.max_positions

    def _prompt(self, chunks: Sequence[Patches]) -> list[tuple[Span, Snapshot]]:
        """The tokens of each chunk in a prompt of these alone, and where it stands then."""
        now = Snapshot(began_stream_ns=chunks[0].times_ns[0][0])
        steps: list[tuple[Span, Snapshot]] = []
        for patches in chunks:
            span, layout = self._extend(now, patches)
            now = replace(now, num_tokens=now.num_tokens + len(span), layout=layout)
            steps.append((span, now))
        return steps

    @property
    def _num_last_chunks(self) -> int:
        return self.options.last_frames // self.options.chunk_frames

    def _check_last_frames(self, size: tuple[int, int]) -> None:
        """Raise ChunkRefused if the last frames do not fit at this encode size."""
        options, num_chunks = self.options, self._num_last_chunks
        footprint = footprint_of(self.model, options, size)
        num_fitting, limit = fit(footprint, self._max_tokens, options.fps)
        if num_fitting >= num_chunks:
            return
        num_tokens = tokens_of(footprint, num_chunks)
        message = (
            f"last_frames {options.last_frames} take {num_tokens} tokens of {footprint.bytes_per_token} bytes at"
            f" {size[0]}x{size[1]}, and {num_fitting} of {num_chunks} chunks fit into the"
            f" {bytes_text(options.memory_bytes)} and {footprint.max_positions} positions"
        )
        raise ChunkRefused("memory_full", message, limit)

    def _stay(self, span: Span) -> list[int]:
        """Places of the chunks that stay once there is room for the tokens of another."""
        num_free = max(len(span), self._capacity // _FREED_SHARE)
        return self._retention.keep(self.ledger.records, max(0, self._max_tokens - self.now.num_anchor - num_free))

    def _keep(self, keep: Sequence[int]) -> None:
        """Forget all chunks but those at the places `keep`, ascending; what is read of the others goes aside."""
        records, num_anchor = self.ledger.records, self.now.num_anchor
        kept = _rows([records[place] for place in keep], num_anchor)
        self._storage.keep(kept, partial(self.ledger.forget, keep))
        self._retain_kept()

    def _rebase(self, span: Span) -> None:
        """Move what is kept to the first positions after the anchor, so that a chunk has some again.

        Keys rotate once, by as much for all, and values stay. What lies so far back that too few positions would be
        free is forgotten: of a memory that reaches back to the beginning, the oldest part.
        """
        floor, max_positions = self.now.num_anchor, self.model.max_positions
        num_wanted = max(span.next_position - max_positions, max_positions // _FREED_POSITIONS_SHARE)
        shifts = [record.reach.max_shift(floor) for record in self.ledger.records]
        first = bisect_left(shifts, num_wanted)
        self._keep(range(first, len(shifts)))
        rebase = Rebase((shifts[first:] or [span.reach().max_shift(floor)])[0], floor)
        moves = groupby(self.ledger.records, lambda record: rebase.of(record.reach.base))
        self._arena.rotate([self._turn(shift, records) for shift, records in moves])
        self.ledger.rebase(rebase, self.layout.rebased)
        logger.info("stream %s: positions moved down by %d", self.options.name, rebase.shift)

    def _turn(self, shift: tuple[int, int, int], records: Iterable[ChunkRecord]) -> Turn:
        """What moves records, one after another in the arena, down by some positions."""
        rows = list(records)
        first, last = rows[0], rows[-1]
        time, height, width = shift
        return self.model.turn(first.first_token, last.first_token + last.num_tokens, (-time, -height, -width))

    # Marks

    def mark(self, name: str) -> Snapshot:
        return self.ledger.mark(name)

    def rollback(self, name: str) -> None:
        """Forget what came after a mark. Raises KeyError for an unknown one."""
        self.ledger.rollback(name)
        self._retain_kept()
        self._full = None

    def reset(self) -> None:
        self.ledger.reset()
        self._retain_kept()
        self._full = None

    def _retain_kept(self) -> None:
        """What the memory has lost can stand in for nothing new, nor be shown again."""
        del self._shown[self.now.num_chunks :]
        if self._drop is not None:
            self._drop.retain([record.number for record in self.ledger.records])

    def _encode_size(self, chunk: Chunk) -> tuple[int, int]:
        try:
            return size_of(self.model, self.options, chunk.size)
        except ValueError as error:
            raise ChunkRefused("encode_error", str(error)) from error

    @property
    def _room(self) -> int:
        return self._max_tokens - self.now.num_tokens

    def _check_room(self, num_tokens: int) -> None:
        """Raise ChunkRefused for what has no room, forget what one may."""
        retention, capacity, room = self._retention, self._max_tokens, self._room
        if retention.forgets:
            room = capacity if retention.starts_over else capacity - self.now.num_anchor
        if num_tokens > room:
            # One frame far larger than those before it, or than the whole memory, says nothing about the next.
            limit = "memory" if num_tokens < 2 * self.ledger.num_newest_tokens else None
            raise ChunkRefused("memory_full", f"a chunk of {num_tokens} tokens does not fit, {room} are left", limit)

    def _check_positions(self, span: Span, state: LayoutState) -> None:
        """Raise ChunkRefused for tokens after a state that are past the model's positions, move what one may."""
        retention, next_position, num = self._retention, span.next_position, self.model.max_positions
        if retention.forgets and not state.is_empty:
            next_position -= next_position if retention.starts_over else span.reach().max_shift(self.now.num_anchor)
        if next_position <= num:
            return
        limit = None if retention.forgets else "positions"
        raise ChunkRefused("memory_full", f"position {next_position} is past {num}, the last one of the model", limit)

    def _note_full(self, refused: ChunkRefused) -> None:
        if refused.reason != "memory_full":
            return
        if refused.limit is not None and self._full is None:
            logger.warning("stream %s: the memory is full: %s", self.options.name, refused)
        self._full = refused.limit


class Addition(NamedTuple):
    """A memory, and the plan for a chunk that goes to it."""

    memory: StreamMemory
    plan: Plan
    upload: Upload | None = None


class _Placed(NamedTuple):
    """A chunk that has room, on its way through the model."""

    chunk: Chunk
    size: tuple[int, int]
    patches: Patches
    layout: LayoutState  # after it
    part: Part
    again_ms: float  # that making room took


def append_together(additions: Sequence[Addition], between: Between | None = None) -> list[Encoded]:
    """`StreamMemory.append` to different memories of one model at once, of chunks that are encoded at one size.

    The weights are read once for all. Either all memories have their chunks then, or none has.
    """
    placed = [memory.place(plan, upload, between) for memory, plan, upload in additions]
    first = additions[0].memory
    assert len({each.size for each in placed}) == 1, "chunks of one size are encoded together"
    try:
        encodings = first.model.encode([each.part for each in placed], placed[0].size, between)
    except torch.OutOfMemoryError as error:
        num_tokens = sum(len(each.part.span) for each in placed)
        raise _out_of_memory(first.model, error, f"{num_tokens} tokens") from error
    steps = zip(additions, placed, encodings, strict=True)
    return [addition.memory.count(each, encoding) for addition, each, encoding in steps]


def _token_drop(options: StreamOptions) -> TokenDrop | None:
    """What leaves out tokens; the last frames are whole, whatever chunk they began with."""
    return None if options.drop is None or options.last_frames else TokenDrop(options.drop)


def _out_of_memory(model: VisionLanguageModel, error: torch.OutOfMemoryError, what: str) -> ChunkRefused:
    error.__traceback__ = None  # its frames hold the activations that must go
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    return ChunkRefused("out_of_memory", f"no device memory for {what}: {error}")


def _rows(records: list[ChunkRecord], num_anchor: int) -> np.ndarray:
    """Rows of the anchor and of records."""
    rows = [np.arange(record.first_token, record.first_token + record.num_tokens) for record in records]
    return np.concatenate([np.arange(num_anchor), *rows])


def _patches(chunk: Chunk, grid: tuple[int, int]) -> Patches:
    """A chunk's temporal patches: pairs of pictures, or a single picture by itself."""
    times = [picture.stream_ns for picture in chunk.pictures]
    if len(times) == 1:
        return Patches(*grid, ((times[0], times[0]),), is_image=True)
    return Patches(*grid, tuple(zip(times[::2], times[1::2], strict=True)))
