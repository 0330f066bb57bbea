"""What the server asks of an engine. `engine.Engine` is the real one; tests bring their own.

Every method may be called from any thread and returns at once; none touches the device on the caller's
thread. Work is handed to the engine thread and comes back through a `Future`. A future may be cancelled by
the caller at any time, also while its work runs; the engine then drops the work at its next step.
"""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from ..protocol.messages import (
    Answer,
    Ask,
    AskChoice,
    CacheInfo,
    Choice,
    Forecast,
    Mark,
    Marks,
    QuestionCounters,
    Vram,
)
from .chunk import Chunk, Encoded, Unchanged
from .options import StreamOptions


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is loaded, and its limits."""

    name: str
    model_type: str
    dtype: str
    device: str
    max_new_tokens: int
    max_question_chars: int
    max_options: int
    notice: str | None = None  # said with every answer, e.g. that the weights are untrained


Relieve = Callable[[str], StreamOptions | None]


class EngineProtocol(Protocol):
    """A memory per stream, and answers from it.

    `relieve` is called on the engine thread with a stream whose chunk the device has no memory for: with the options
    that it returns, the chunk is tried once more. None, as at first, is no more of it.
    """

    relieve: Relieve

    @property
    def model(self) -> ModelInfo: ...

    @property
    def is_ready(self) -> bool: ...

    @property
    def progress_age_ms(self) -> float:
        """Milliseconds since the engine thread last came round its loop, or to the next layer of a chunk."""
        ...

    def add_stream(self, options: StreamOptions) -> Future[Forecast]:
        """Reserve a memory, of less than it asks for where the device has less, and say what it will hold.

        Fails with NodeError STREAM_EXISTS, OUT_OF_MEMORY, TOO_LARGE (not one chunk fits) or BAD_REQUEST.
        """
        ...

    def foretell(self, options: StreamOptions) -> Future[Forecast]:
        """Say what a stream would hold with all the memory it asks for. Fails with NodeError TOO_LARGE."""
        ...

    def remove_stream(self, stream: str) -> Future[None]:
        """Free a memory; its running questions end with CANCELLED. Fails with UNKNOWN_STREAM."""
        ...

    def adjust(self, stream: str, options: StreamOptions) -> Future[None]:
        """Encode and keep later chunks as other options say: `drop`, `encode_scale`, `retention` and `memory_share`.

        Fails with NodeError UNKNOWN_STREAM.
        """
        ...

    def resize(self, stream: str, memory_bytes: int) -> Future[Forecast]:
        """Go on with a memory of other bytes, and forget at once what they do not hold; running questions go on.

        Fails with NodeError UNKNOWN_STREAM, TOO_LARGE (not one chunk fits), or OUT_OF_MEMORY: the device has too
        little, or they do not hold what the stream never forgets. Then nothing has changed.
        """
        ...

    def encode(self, stream: str, chunk: Chunk) -> Future[Encoded]:
        """Append a chunk to a stream's memory. Chunks of one stream are encoded in the order given.

        Fails with `ChunkRefused`, whose reason is `memory_full`, `out_of_memory`, `reset` (taken back by a
        reset that came after it), `removed`, or `encode_error`; the memory is then as if it had never come, less what
        was forgotten for it.
        """
        ...

    def note_unchanged(self, stream: str, unchanged: Unchanged) -> None:
        """Note how long a stream has looked like the newest frame of its memory, or of a chunk on its way there.

        Means nothing once the memory goes on, or for a stream that is gone.
        """
        ...

    def ask(
        self,
        request: Ask,
        *,
        arrived: float,
        deadline: float | None = None,
        on_delta: Callable[[str], None] | None = None,
    ) -> Future[Answer]:
        """Answer a question. `arrived` and `deadline` are `time.monotonic()` seconds.

        `on_delta` is called on the engine thread with each new piece of text and must return at once.
        Fails with NodeError: UNKNOWN_STREAM, NO_FRAMES, UNKNOWN_MARK, TOO_LARGE, BAD_REQUEST, BUSY,
        DEADLINE_EXCEEDED, CANCELLED (by a reset or removal), OUT_OF_MEMORY, INTERNAL.
        """
        ...

    def ask_choice(self, request: AskChoice, *, arrived: float, deadline: float | None = None) -> Future[Choice]:
        """Score options against each other. Fails as `ask` does."""
        ...

    def reset(self, stream: str) -> Future[CacheInfo]:
        """Forget everything a stream has seen, marks too. Its running questions end with CANCELLED."""
        ...

    def mark(self, stream: str, name: str) -> Future[Mark]:
        """Name the memory as it is now; an existing mark of that name moves here."""
        ...

    def rollback(self, stream: str, name: str) -> Future[CacheInfo]:
        """Forget everything after a mark; questions that read beyond it end with CANCELLED."""
        ...

    def delete_mark(self, stream: str, name: str) -> Future[Marks]: ...

    def marks(self, stream: str) -> Future[Marks]: ...

    def cache_info(self, stream: str) -> CacheInfo:
        """The stream's memory as of the engine's last step. Raises NodeError UNKNOWN_STREAM."""
        ...

    def streams(self) -> list[str]: ...

    def vram(self) -> Vram:
        """Device memory as the engine thread measured it last: a second ago, or before the chunk that it is in."""
        ...

    def question_counters(self) -> QuestionCounters: ...
