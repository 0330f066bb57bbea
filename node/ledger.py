"""What a stream's memory holds, chunk by chunk: token ranges, times, sequence numbers. No tensors here."""

from dataclasses import dataclass, field, replace

from ..protocol.messages import TimeKind
from .chunk import Chunk
from .layout import LayoutState


@dataclass(frozen=True, slots=True)
class ChunkRecord:
    """Where one chunk lies in the memory, and what was in it."""

    first_token: int
    num_tokens: int
    num_frames: int
    num_padded: int
    first_seq: int
    last_seq: int
    first_ns: int  # capture times, as published
    last_ns: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A point of a stream's memory. Everything below `num_tokens` is immutable, so a few values are a snapshot."""

    num_tokens: int = 0
    num_chunks: int = 0
    num_frames: int = 0
    num_padded: int = 0
    layout: LayoutState = field(default_factory=LayoutState)
    oldest_ns: int | None = None
    newest_ns: int | None = None
    newest_seq: int | None = None
    ts_kind: TimeKind = "capture"
    oldest_stream_ns: int = 0
    newest_stream_ns: int = 0

    @property
    def seconds(self) -> float | None:
        """Stream time between the oldest and the newest frame; None before the first."""
        if self.num_frames == 0:
            return None
        return (self.newest_stream_ns - self.oldest_stream_ns) / 1e9


class Ledger:
    """The records of one stream, its marks, and where it stands now."""

    def __init__(self) -> None:
        self.now = Snapshot()
        self._records: list[ChunkRecord] = []
        self._marks: dict[str, Snapshot] = {}

    @property
    def records(self) -> tuple[ChunkRecord, ...]:
        return tuple(self._records)

    @property
    def num_newest_tokens(self) -> int:
        """Tokens of the newest chunk, 0 if there is none."""
        return self._records[-1].num_tokens if self._records else 0

    @property
    def marks(self) -> dict[str, Snapshot]:
        return dict(self._marks)

    def append(self, chunk: Chunk, num_tokens: int, layout: LayoutState) -> None:
        """Note a chunk whose K and V are all written."""
        first, last = chunk.pictures[0], chunk.pictures[-1]
        now = self.now
        self._records.append(
            ChunkRecord(
                first_token=now.num_tokens,
                num_tokens=num_tokens,
                num_frames=chunk.num_frames,
                num_padded=chunk.num_padded,
                first_seq=first.seq,
                last_seq=last.seq,
                first_ns=first.ts,
                last_ns=last.ts,
            )
        )
        is_first = now.num_frames == 0
        self.now = replace(
            now,
            num_tokens=now.num_tokens + num_tokens,
            num_chunks=now.num_chunks + 1,
            num_frames=now.num_frames + chunk.num_frames,
            num_padded=now.num_padded + chunk.num_padded,
            layout=layout,
            oldest_ns=first.ts if is_first else now.oldest_ns,
            newest_ns=last.ts,
            newest_seq=last.seq,
            ts_kind=last.ts_kind,
            oldest_stream_ns=first.stream_ns if is_first else now.oldest_stream_ns,
            newest_stream_ns=last.stream_ns,
        )

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
        self._marks = {n: s for n, s in self._marks.items() if s.num_chunks <= self.now.num_chunks}

    def reset(self) -> None:
        """Forget everything, marks too."""
        self.now = Snapshot()
        self._records.clear()
        self._marks.clear()
