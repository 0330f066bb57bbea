"""What a stream's memory holds, chunk by chunk: token ranges, times, sequence numbers. No tensors here."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ..protocol.messages import TimeKind
from .chunk import Chunk, Unchanged
from .layout import LayoutState, Reach, Rebase

_NOWHERE = Reach()

_NUM_RECENT = 32  # chunks whose pace is the present one


class Pace(NamedTuple):
    """What comes into a memory in a second of stream time."""

    num_chunks: float
    num_tokens: float


@dataclass(frozen=True, slots=True)
class ChunkRecord:
    """Where one chunk lies in the memory, and what was in it."""

    number: int  # how many chunks came before it, forgotten ones too
    first_token: int
    num_tokens: int
    num_frames: int
    num_padded: int
    first_seq: int
    last_seq: int
    first_ns: int  # capture times, as published
    last_ns: int
    ts_kind: TimeKind
    first_stream_ns: int
    last_stream_ns: int
    elapsed_ns: int  # stream time that it brought: since the last frame of the chunk before it
    reach: Reach
    num_dropped: int = 0  # of its tokens, not among `num_tokens`


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What a memory held once and has forgotten since, to make room."""

    num_chunks: int = 0
    num_frames: int = 0
    elapsed_ns: int = 0
    from_ns: int | None = None  # time of the oldest of these frames, as published
    until_ns: int | None = None  # and of the newest

    def plus(self, records: Sequence[ChunkRecord]) -> "Forgotten":
        from_ns = [] if self.from_ns is None else [self.from_ns]
        until_ns = [] if self.until_ns is None else [self.until_ns]
        return Forgotten(
            self.num_chunks + len(records),
            self.num_frames + sum(record.num_frames for record in records),
            self.elapsed_ns + sum(record.elapsed_ns for record in records),
            min([*from_ns, *(record.first_ns for record in records)], default=None),
            max([*until_ns, *(record.last_ns for record in records)], default=None),
        )


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A point of a stream's memory. Nothing below `num_tokens` changes, so a few values are a snapshot.

    Forgetting moves what is left of it, and the ledger's own snapshots with it: one that is held elsewhere is
    void then.
    """

    num_tokens: int = 0
    num_anchor: int = 0  # of these, the opening of the prompt: it belongs to no chunk and is never forgotten
    num_chunks: int = 0
    num_frames: int = 0
    num_padded: int = 0
    num_dropped: int = 0  # tokens that chunks would have had, forgotten ones too
    layout: LayoutState = field(default_factory=LayoutState)
    oldest_ns: int | None = None
    newest_ns: int | None = None
    newest_seq: int | None = None
    seen_until_ns: int | None = None  # until when frames came that looked like the newest one; None: none did
    ts_kind: TimeKind = "capture"
    oldest_stream_ns: int = 0
    newest_stream_ns: int = 0
    whole_from_ns: int | None = None  # nothing was forgotten since; None if the newest chunk was
    forgotten: Forgotten = Forgotten()
    began_stream_ns: int = 0  # time of the first frame of the prompt, forgotten or not
    until_stream_ns: int = 0  # and of the last

    @property
    def seconds(self) -> float | None:
        """Stream time between the oldest and the newest frame; None before the first."""
        if self.num_frames == 0:
            return None
        return (self.newest_stream_ns - self.oldest_stream_ns) / 1e9

    @property
    def num_seen(self) -> int:
        """Chunks up to here, forgotten ones too."""
        return self.num_chunks + self.forgotten.num_chunks


class Ledger:
    """The records of one stream, its marks, and where it stands now."""

    def __init__(self) -> None:
        self.now = Snapshot()
        self._records: list[ChunkRecord] = []
        self._marks: dict[str, Snapshot] = {}
        self._unchanged: Unchanged | None = None  # the last that was noted, perhaps of a chunk on its way

    @property
    def records(self) -> tuple[ChunkRecord, ...]:
        return tuple(self._records)

    @property
    def num_newest_tokens(self) -> int:
        """Tokens of the newest chunk, dropped ones too; 0 if there is none."""
        return self._records[-1].num_tokens + self._records[-1].num_dropped if self._records else 0

    @property
    def pace(self) -> Pace | None:
        """Of the newest chunks; None if that cannot be told."""
        recent = self._records[-_NUM_RECENT:]
        seconds = sum(record.elapsed_ns for record in recent) / 1e9
        return Pace(len(recent) / seconds, sum(r.num_tokens for r in recent) / seconds) if seconds else None

    @property
    def marks(self) -> dict[str, Snapshot]:
        return dict(self._marks)

    def append(
        self,
        chunk: Chunk,
        num_tokens: int,
        layout: LayoutState,
        num_anchor: int = 0,
        reach: Reach = _NOWHERE,
        num_dropped: int = 0,
    ) -> None:
        """Note a chunk whose K and V are all written.

        Of the `num_tokens` that the first one of a prompt adds, the first `num_anchor` belong to no chunk; `reach` is
        of the others. The chunk would have had `num_dropped` more.
        """
        first, last = chunk.pictures[0], chunk.pictures[-1]
        now = self.now
        assert num_anchor == 0 or now.num_tokens == 0, "only the first chunk brings an anchor"
        self._records.append(
            ChunkRecord(
                number=now.num_seen,
                first_token=now.num_tokens + num_anchor,
                num_tokens=num_tokens - num_anchor,
                num_frames=chunk.num_frames,
                num_padded=chunk.num_padded,
                first_seq=first.seq,
                last_seq=last.seq,
                first_ns=first.ts,
                last_ns=last.ts,
                ts_kind=last.ts_kind,
                first_stream_ns=first.stream_ns,
                last_stream_ns=last.stream_ns,
                num_dropped=num_dropped,
                elapsed_ns=last.stream_ns - (now.until_stream_ns if now.num_seen else first.stream_ns),
                reach=reach,
            )
        )
        is_first = now.num_frames == 0
        self.now = replace(
            now,
            num_tokens=now.num_tokens + num_tokens,
            num_anchor=now.num_anchor + num_anchor,
            num_chunks=now.num_chunks + 1,
            num_frames=now.num_frames + chunk.num_frames,
            num_padded=now.num_padded + chunk.num_padded,
            num_dropped=now.num_dropped + num_dropped,
            layout=layout,
            oldest_ns=first.ts if is_first else now.oldest_ns,
            newest_ns=last.ts,
            newest_seq=last.seq,
            seen_until_ns=None,
            ts_kind=last.ts_kind,
            oldest_stream_ns=first.stream_ns if is_first else now.oldest_stream_ns,
            newest_stream_ns=last.stream_ns,
            whole_from_ns=first.ts if now.whole_from_ns is None else now.whole_from_ns,
            began_stream_ns=first.stream_ns if now.layout.is_empty else now.began_stream_ns,
            until_stream_ns=last.stream_ns,
        )
        self._take_unchanged()

    def note_unchanged(self, unchanged: Unchanged) -> None:
        """Note until when frames came that looked like one that is the newest here, or soon will be."""
        self._unchanged = unchanged
        self._take_unchanged()

    def _take_unchanged(self) -> None:
        now, unchanged = self.now, self._unchanged
        if unchanged is not None and now.newest_ns is not None and unchanged.stream_ns == now.newest_stream_ns:
            self.now = replace(now, seen_until_ns=unchanged.until_ns)

    def forget(self, keep: Sequence[int], held: Sequence[Snapshot] = ()) -> list[Snapshot]:
        """Note that the records at the places `keep`, ascending, are all that is left, moved down to follow the anchor.

        Marks are of what is left of them. Returns what is left of snapshots that are `held` elsewhere.
        """
        before, first_token = self._records, self.now.num_anchor
        after: list[ChunkRecord] = []
        for place in keep:
            after.append(replace(before[place], first_token=first_token))
            first_token += before[place].num_tokens
        left = [_left_of(snapshot, before, after, keep) for snapshot in held]
        self.now = _left_of(self.now, before, after, keep)
        self._marks = {name: _left_of(mark, before, after, keep) for name, mark in self._marks.items()}
        self._records = after
        return left

    def rebase(self, rebase: Rebase, rebased: Callable[[LayoutState, Rebase], LayoutState]) -> None:
        """Note that all positions after the anchor have moved; `rebased` moves a layout's state."""
        self._records = [replace(record, reach=rebase.reach(record.reach)) for record in self._records]
        self.now = replace(self.now, layout=rebased(self.now.layout, rebase))
        self._marks = {name: replace(mark, layout=rebased(mark.layout, rebase)) for name, mark in self._marks.items()}

    def start_over(self) -> None:
        """Note that everything is forgotten to make room, marks too, and that the prompt begins anew."""
        now = self.now
        self.now = Snapshot(forgotten=now.forgotten.plus(self._records), until_stream_ns=now.until_stream_ns)
        self._records = []
        self._marks = {}

    def come_back(
        self, was: Snapshot, before: Sequence[ChunkRecord], again: Sequence[ChunkRecord], layout: LayoutState
    ) -> None:
        """Note, after it started over, that the newest chunks are there again: `again`, as they lie now.

        It `was` at a snapshot of the records `before`; of these, only the others are forgotten.
        """
        keep = range(len(before) - len(again), len(before))
        left = _left_of(was, before, again, keep)
        self.now = replace(left, layout=layout, began_stream_ns=again[0].first_stream_ns)
        self._records = list(again)

    def mark(self, name: str) -> Snapshot:
        """Name the present; an existing mark of that name moves here."""
        self._marks[name] = self.now
        return self.now

    def delete_mark(self, name: str) -> None:
        """Raises KeyError for an unknown mark."""
        del self._marks[name]

    def rollback(self, name: str) -> None:
        """Forget what came after a mark, later marks too. Raises KeyError for an unknown mark."""
        self.now = self._marks[name]
        del self._records[self.now.num_chunks :]
        self._marks = {n: s for n, s in self._marks.items() if s.num_seen <= self.now.num_seen}

    def reset(self) -> None:
        """Forget everything, marks too."""
        self.now = Snapshot()
        self._records.clear()
        self._marks.clear()
        self._unchanged = None


def _left_of(
    snapshot: Snapshot, before: Sequence[ChunkRecord], after: Sequence[ChunkRecord], keep: Sequence[int]
) -> Snapshot:
    """A snapshot once only the records at the places `keep` are left, which lie as `after` says."""
    left = after[: bisect_left(keep, snapshot.num_chunks)]
    if len(left) == snapshot.num_chunks:
        return snapshot
    kept = set(keep)
    gone = [record for place, record in enumerate(before[: snapshot.num_chunks]) if place not in kept]
    snapshot = replace(
        snapshot,
        num_tokens=snapshot.num_anchor + sum(record.num_tokens for record in left),
        num_chunks=len(left),
        num_frames=sum(record.num_frames for record in left),
        num_padded=sum(record.num_padded for record in left),
        forgotten=snapshot.forgotten.plus(gone),
        whole_from_ns=_whole_from(left, snapshot.num_seen),
    )
    if not left:
        return replace(snapshot, oldest_ns=None, newest_ns=None, newest_seq=None, seen_until_ns=None)
    oldest, newest = left[0], left[-1]
    return replace(
        snapshot,
        oldest_ns=oldest.first_ns,
        newest_ns=newest.last_ns,
        newest_seq=newest.last_seq,
        seen_until_ns=snapshot.seen_until_ns if newest.last_stream_ns == snapshot.newest_stream_ns else None,
        ts_kind=newest.ts_kind,
        oldest_stream_ns=oldest.first_stream_ns,
        newest_stream_ns=newest.last_stream_ns,
    )


def _whole_from(records: Sequence[ChunkRecord], num_seen: int) -> int | None:
    """Time of the oldest frame since which all of `num_seen` chunks are there; None if the newest is not."""
    whole_from_ns = None
    for record in reversed(records):
        num_seen -= 1
        if record.number != num_seen:
            break
        whole_from_ns = record.first_ns
    return whole_from_ns
