"""The verbs of a video memory, the same for a node far away and for an engine in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from .messages import (
    Answer,
    CacheInfo,
    Choice,
    Mark,
    Marks,
    PartialAnswer,
    StreamAdded,
    StreamName,
    StreamSpec,
    StreamStats,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RankBy = Literal["raw", "normalized", "calibrated"]


class VideoMemory(Protocol):
    """Streams that are watched, remembered and asked about.

    `NodeClient` is one over the wire and `onlooker.node.local.LocalNode` one in this process: code that asks
    does not know where the answer is computed. Every verb raises `NodeError` with the codes of PROTOCOL.md;
    `timeout_s` above 0 bounds a call, None takes the memory's own default, anything else is a ValueError.

    `**ignored` takes arguments that no longer mean anything, such as `manual_time`: programs written for
    earlier backends go on working.
    """

    def add_stream(self, spec: StreamSpec) -> StreamAdded:
        """Start to remember a stream; returns what its memory will hold, if the node says so."""
        ...

    def remove_stream(self, stream: StreamName) -> None:
        """Forget a stream altogether."""
        ...

    def stream_names(self) -> list[StreamName]: ...

    def streams(self) -> list[StreamStats]: ...

    def process_frame(
        self, stream: StreamName, pixels: NDArray[np.uint8], *, ts: int | None = None, **ignored: Any
    ) -> int:
        """Give one picture to a stream, and return its sequence number.

        `pixels` is RGB, uint8, (height, width, 3); `ts` its capture time in ns since the Unix epoch, by
        default now. It is in the memory once its chunk is full and encoded: `wait_encoded` waits for that.
        """
        ...

    def process_chunk(
        self,
        stream: StreamName,
        frames: Sequence[NDArray[np.uint8]],
        *,
        ts: Sequence[int] | None = None,
        **ignored: Any,
    ) -> int:
        """Give pictures, oldest first, with one time each, and return the last one's sequence number."""
        ...

    def end_stream(self, stream: StreamName) -> None:
        """Say that no more pictures follow for now: a chunk that is not full is padded and encoded."""
        ...

    def wait_encoded(self, stream: StreamName, seq: int, timeout_s: float | None = None) -> bool:
        """Wait until the memory holds the picture `seq`, or one given after it.

        False when that picture was dropped, or when the time is up: a picture whose chunk is not full stays
        outside the memory until more pictures come or `end_stream` is called.
        """
        ...

    def ask(
        self,
        stream: StreamName,
        question: str,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        as_of: str | None = None,
        timeout_s: float | None = None,
        **ignored: Any,
    ) -> Answer:
        """Answer from what a stream has shown so far, or had at the mark `as_of`, leaving no trace."""
        ...

    def ask_stream(
        self,
        stream: StreamName,
        question: str,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        as_of: str | None = None,
        timeout_s: float | None = None,
        **ignored: Any,
    ) -> Iterator[PartialAnswer | Answer]:
        """As `ask`, but the text comes while it grows; the last item is the whole answer.

        Closing the iterator early cancels the question.
        """
        ...

    def ask_choice(
        self,
        stream: StreamName,
        question: str,
        options: Sequence[str],
        *,
        rank_by: RankBy = "normalized",
        as_of: str | None = None,
        timeout_s: float | None = None,
        **ignored: Any,
    ) -> Choice:
        """Score options by their likelihood, leaving no trace."""
        ...

    def cache_info(self, stream: StreamName) -> CacheInfo: ...

    def reset(self, stream: StreamName) -> CacheInfo:
        """Forget everything a stream has shown, marks too."""
        ...

    def mark(self, stream: StreamName, name: str) -> Mark:
        """Name the memory as it is now; an existing mark of that name moves here."""
        ...

    def rollback(self, stream: StreamName, name: str) -> CacheInfo:
        """Forget everything after a mark."""
        ...

    def delete_mark(self, stream: StreamName, name: str) -> Marks: ...

    def marks(self, stream: StreamName) -> Marks: ...

    def close(self) -> None: ...
