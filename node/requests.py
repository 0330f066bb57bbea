"""A request on its way through the node: its envelope, its endpoint, and the reply that duplicates of it get."""

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec

from ..protocol.errors import DecodeError
from ..protocol.messages import Request

MAX_ENVELOPE_FRAMES = 8
MAX_ENVELOPE_FRAME_BYTES = 256
MAX_STORED_REPLIES = 256
STORED_REPLY_S = 60.0

Envelope = tuple[bytes, ...]
Key = tuple[str, str]  # session and id: together they name a request
T = TypeVar("T", bound=msgspec.Struct)
Steps = Generator[Future[Any], Any, T]


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request as its endpoint sees it; times are `time.monotonic()` seconds."""

    data: T
    arrived: float
    deadline: float
    on_delta: Callable[[str], None] | None  # sends a piece of the answer; any thread may call it


@dataclass(frozen=True, slots=True)
class Endpoint(Generic[T]):
    """What a socket does for one name of the protocol.

    `answer` returns the reply's data, or steps towards it; it may raise NodeError. Steps count against the
    limits, have a deadline, and are remembered for duplicates. `is_cancellable` says whether the future that
    the steps wait for is cancelled at the deadline; work that must not stop half-way goes on without it.
    """

    kind: type[T]
    answer: Callable[[Call[T]], msgspec.Struct | Steps[Any]]
    is_cancellable: bool = False


@dataclass(frozen=True, slots=True)
class Limits:
    """How many requests a socket has open at once; one more is answered BUSY."""

    max_open: int
    max_per_client: int
    default_deadline_s: float
    retry_after_ms: Callable[[], int]


@dataclass(frozen=True, slots=True)
class StoredReply:
    """The last word on a request, for those who ask again."""

    digest: bytes
    reply: bytes
    until: float


class StoredReplies:
    """The newest final replies, each for a while."""

    def __init__(self, max_replies: int = MAX_STORED_REPLIES, keep_s: float = STORED_REPLY_S) -> None:
        self._max_replies = max_replies
        self._keep_s = keep_s
        self._replies: OrderedDict[Key, StoredReply] = OrderedDict()

    def __len__(self) -> int:
        return len(self._replies)

    def put(self, key: Key, digest: bytes, reply: bytes) -> None:
        self._replies.pop(key, None)
        self._replies[key] = StoredReply(digest, reply, time.monotonic() + self._keep_s)
        if len(self._replies) > self._max_replies:
            self._replies.popitem(last=False)

    def get(self, key: Key) -> StoredReply | None:
        now = time.monotonic()
        while self._replies and next(iter(self._replies.values())).until <= now:
            self._replies.popitem(last=False)
        return self._replies.get(key)


def split_envelope(parts: list[bytes]) -> tuple[Envelope, list[bytes]]:
    """Split a message that a ROUTER received into what a reply must begin with, and the body.

    A REQ socket sends an empty frame before the body, and REQ_CORRELATE an id before that; all of it must
    come back. A DEALER may leave the empty frame out. What is longer than any socket makes is no envelope.
    """
    head = parts[1 : MAX_ENVELOPE_FRAMES + 1]
    if b"" not in head:
        return tuple(parts[:1]), parts[1:]
    end = head.index(b"") + 2
    if any(len(frame) > MAX_ENVELOPE_FRAME_BYTES for frame in parts[:end]):
        return tuple(parts[:1]), parts[1:]
    return tuple(parts[:end]), parts[end:]


def readable_id(error: DecodeError) -> str:
    """The id of a request that could not be decoded, or nothing."""
    found = error.details.get("id")
    return found if isinstance(found, str) else ""


def request_key(request: Request) -> Key:
    return request.session, request.id


def request_digest(request: Request) -> bytes:
    """Tell apart requests that carry the same id by mistake."""
    return hashlib.blake2b(b"%b\0%b" % (request.endpoint.encode(), bytes(request.data)), digest_size=16).digest()
