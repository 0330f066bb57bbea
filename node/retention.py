"""What stays of a memory that is full. Policies choose among chunks by their order and size alone: no tensors here."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Protocol

_RESERVED_SHARE = 8


class Held(Protocol):
    """What a policy is told of a chunk that is in the memory."""

    @property
    def number(self) -> int:
        """How many chunks came before it, forgotten ones too."""
        ...

    @property
    def num_tokens(self) -> int: ...


class Retention(ABC):
    """Chooses the chunks that stay when room is needed. Holds no state of any stream."""

    forgets: ClassVar[bool] = True
    starts_over: ClassVar[bool] = False  # nothing stays, not even the opening of the prompt
    whole_share: ClassVar[float] = 1.0  # of a full memory: the newest part, of which nothing was forgotten

    def max_tokens(self, capacity: int) -> int:
        """How many of a memory's rows chunks may take; the others are for what is forgotten while somebody reads it."""
        return capacity - (capacity // _RESERVED_SHARE if self.forgets and not self.starts_over else 0)

    @abstractmethod
    def keep(self, chunks: Sequence[Held], max_tokens: int) -> list[int]:
        """Places of the chunks that stay, ascending; together they have at most `max_tokens`.

        `chunks` are all that the memory holds, oldest first. The newest one stays if it fits.
        """


class Stop(Retention):
    """Forgets nothing: a full memory takes no more."""

    forgets = False

    def keep(self, chunks: Sequence[Held], max_tokens: int) -> list[int]:
        return list(range(len(chunks)))


class Reset(Retention):
    """Forgets everything, and starts over at the first position."""

    starts_over = True

    def keep(self, chunks: Sequence[Held], max_tokens: int) -> list[int]:
        return []


class Window(Retention):
    """Keeps the newest chunks."""

    def keep(self, chunks: Sequence[Held], max_tokens: int) -> list[int]:
        return list(range(len(chunks) - _num_newest(chunks, max_tokens), len(chunks)))


class Thin(Retention):
    """Keeps the newest half whole, and of what is older every 2nd, 4th, 8th ... chunk.

    The older part is cut into bands from new to old, each twice as long as the one before it and kept half as
    densely, so that all take the same room. Bands are as long as there is room for; they shrink by and by as the
    stream grows. A chunk that a band keeps is also kept by all newer ones, since those keep the multiples of a
    smaller power of two: what is kept today was never forgotten before. The very first chunk stays the longest.
    """

    whole_share = 0.5

    def keep(self, chunks: Sequence[Held], max_tokens: int) -> list[int]:
        num_newest = max(_num_newest(chunks, int(max_tokens * self.whole_share)), _num_newest(chunks[-1:], max_tokens))
        older, newest = chunks[: len(chunks) - num_newest], chunks[len(chunks) - num_newest :]
        room = max_tokens - _num_tokens(newest)
        end = newest[0].number if newest else 0
        kept = _thinned(older, end, room) if newest else []
        return [*kept, *range(len(older), len(chunks))]


POLICIES: dict[str, Retention] = {"stop": Stop(), "reset": Reset(), "window": Window(), "thin": Thin()}


def _thinned(chunks: Sequence[Held], end: int, max_tokens: int) -> list[int]:
    """Places of the chunks that bands back from the chunk number `end` keep, in the longest bands that fit."""

    def kept_by(length: int) -> list[int]:
        return [i for i, chunk in enumerate(chunks) if _is_kept(chunk.number, end - 1 - chunk.number, length)]

    def fits(length: int) -> bool:
        return sum(chunks[i].num_tokens for i in kept_by(length)) <= max_tokens

    longest = end - chunks[0].number if chunks else 0
    shortest = 1
    while shortest < longest:  # the longest band that fits lies within the two
        middle = (shortest + longest + 1) // 2
        shortest, longest = (middle, longest) if fits(middle) else (shortest, middle - 1)
    kept = kept_by(shortest)
    num_tokens = sum(chunks[i].num_tokens for i in kept)
    while kept and num_tokens > max_tokens:  # not even the shortest bands fit: the oldest go
        num_tokens -= chunks[kept.pop(0)].num_tokens
    return kept


def _is_kept(number: int, age: int, length: int) -> bool:
    """Whether a chunk of an age in chunks is kept, where the newest band keeps `length` chunks of twice as many."""
    level = (age // (2 * length) + 1).bit_length()  # 1, 2, 3 ... for ages below 2, 6, 14 ... lengths
    return number % (1 << level) == 0


def _num_newest(chunks: Sequence[Held], max_tokens: int) -> int:
    """How many of the newest chunks fit."""
    num_tokens = 0
    for num, chunk in enumerate(reversed(chunks)):
        num_tokens += chunk.num_tokens
        if num_tokens > max_tokens:
            return num
    return len(chunks)


def _num_tokens(chunks: Sequence[Held]) -> int:
    return sum(chunk.num_tokens for chunk in chunks)
