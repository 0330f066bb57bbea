"""The asker's side: a client of a node, with the same verbs as a memory in this process."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import msgspec
import zmq
from msgspec import UNSET

from .camera import FramePublisher
from .codec import encode, reply_data
from .connection import ConnectionPool
from .curve import load_credentials
from .endpoints import ENDPOINTS
from .errors import AuthError, ClosedError, ErrorCode, NodeError, NoReplyError, OnlookerError
from .interface import RankBy
from .messages import (
    Answer,
    Ask,
    AskChoice,
    CacheInfo,
    CancelRef,
    Choice,
    Empty,
    Hello,
    Mark,
    MarkRef,
    Marks,
    Message,
    NodeStats,
    PartialAnswer,
    Pong,
    Reply,
    Request,
    StreamAdded,
    StreamName,
    StreamRef,
    StreamSpec,
    StreamStats,
    or_unset,
)
from .sockets import ASK_ENDPOINT, CONTROL_ENDPOINT, FRAMES_ENDPOINT

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

_CANCEL_TIMEOUT_S = 1.0
_FIRST_POLL_S = 0.005
_MAX_POLL_S = 0.1


class NodeClient:
    """Asks a node, watches it, steers it, and gives it pictures. Safe from any thread; requests run in parallel.

    Every request raises `NodeError` if the node says no, `NoReplyError` if nothing came within `timeout_s`
    (above 0; None takes the client's own), `AuthError` if the keys do not fit, and `ClosedError` after `close`.
    A connection that breaks is made anew and the request sent again within its time: the node does it once.

    `server_key` is the node's public key file and `client_key` one's own secret key file. Raises OSError or
    ValueError for unusable ones.
    """

    def __init__(
        self,
        ask: str = ASK_ENDPOINT,
        control: str = CONTROL_ENDPOINT,
        *,
        frames: str = FRAMES_ENDPOINT,
        timeout_s: float = 30.0,
        server_key: str | Path | None = None,
        client_key: str | Path | None = None,
        context: zmq.Context | None = None,
    ) -> None:
        """Connect lazily: a node that is not there yet is an error of the first request, not of this."""
        credentials = load_credentials(server_key, client_key)
        self.session = str(uuid.uuid4())
        self._timeout_s = _checked_seconds(timeout_s)
        self._frames = frames
        self._keys = (server_key, client_key)
        self._owns_context = context is None
        self._context = zmq.Context() if context is None else context
        self._pools = {
            "ask": ConnectionPool(self._context, ask, credentials),
            "control": ConnectionPool(self._context, control, credentials),
        }
        self._feeds: dict[StreamName, _Feed] = {}
        self._feeds_lock = threading.Lock()
        self._is_open = True

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
        request_id: str | None = None,
        **ignored: Any,
    ) -> Answer:
        """Answer from what a stream has shown so far, or had at the mark `as_of`, leaving no trace.

        A `request_id` of one's own makes the question known to `cancel`.
        """
        data = Ask(
            stream=stream,
            question=question,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=or_unset(seed),
            stop=list(stop),
            as_of=or_unset(as_of),
        )
        return self._call("ask", data, timeout_s, request_id)

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
        request_id: str | None = None,
        **ignored: Any,
    ) -> Iterator[PartialAnswer | Answer]:
        """As `ask`, but the text comes while it grows; the last item is the whole answer.

        The question is asked, and its time begins, when the first item is taken. Closing the iterator early
        cancels it. Pieces may be missing after a lost connection, but never from the whole answer.
        """
        data = Ask(
            stream=stream,
            question=question,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=or_unset(seed),
            stop=list(stop),
            as_of=or_unset(as_of),
        )
        request = self._request("ask", data, request_id, stream_reply=True)
        return self._pieces(request, self._seconds(timeout_s))

    def _pieces(self, request: Request, timeout_s: float) -> Iterator[PartialAnswer | Answer]:
        with closing(self._replies("ask", request, timeout_s)) as replies:
            try:
                final = yield from _new_pieces(replies)
            except (GeneratorExit, KeyboardInterrupt):
                self._abandon(request)
                raise
        yield reply_data(final, Answer)

    def _abandon(self, request: Request) -> None:
        try:
            self.cancel(request.id, timeout_s=_CANCEL_TIMEOUT_S)
        except OnlookerError as error:
            # The one who asked is gone, and the question ends by itself at its deadline.
            logger.warning("question %s could not be cancelled: %s", request.id, error)

    def ask_choice(
        self,
        stream: StreamName,
        question: str,
        options: Sequence[str],
        *,
        rank_by: RankBy = "normalized",
        as_of: str | None = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
        **ignored: Any,
    ) -> Choice:
        """Score options by their likelihood, leaving no trace."""
        data = AskChoice(
            stream=stream, question=question, options=list(options), rank_by=rank_by, as_of=or_unset(as_of)
        )
        return self._call("ask_choice", data, timeout_s, request_id)

    def cancel(self, request_id: str, session: str | None = None, *, timeout_s: float | None = None) -> None:
        """End a question with CANCELLED: this client's, or that of the client with `session`."""
        self._call("cancel", CancelRef(id=request_id, session=session or self.session), timeout_s)

    def cache_info(self, stream: StreamName) -> CacheInfo:
        return self._call("cache_info", StreamRef(stream=stream))

    def reset(self, stream: StreamName) -> CacheInfo:
        """Forget everything a stream has shown, marks too."""
        return self._call("reset", StreamRef(stream=stream))

    def mark(self, stream: StreamName, name: str) -> Mark:
        """Name the memory as it is now; an existing mark of that name moves here."""
        return self._call("mark", MarkRef(stream=stream, name=name))

    def rollback(self, stream: StreamName, name: str) -> CacheInfo:
        """Forget everything after a mark."""
        return self._call("rollback", MarkRef(stream=stream, name=name))

    def delete_mark(self, stream: StreamName, name: str) -> Marks:
        return self._call("mark_delete", MarkRef(stream=stream, name=name))

    def marks(self, stream: StreamName) -> Marks:
        return self._call("marks", StreamRef(stream=stream))

    def hello(self) -> Hello:
        return self._call("hello")

    def status(self) -> NodeStats:
        return self._call("status")

    def streams(self) -> list[StreamStats]:
        return self._call("streams").streams

    def stream_names(self) -> list[StreamName]:
        return [stats.stream for stats in self.streams()]

    def add_stream(self, spec: StreamSpec) -> StreamAdded:
        """Start to remember a stream; returns what its memory will hold, if the node says so."""
        return self._call("stream_add", spec)

    def remove_stream(self, stream: StreamName) -> None:
        """Forget a stream altogether."""
        self._call("stream_remove", StreamRef(stream=stream))

    def pause_stream(self, stream: StreamName) -> None:
        """Drop the frames of a stream, as `paused`, until it is resumed."""
        self._call("stream_pause", StreamRef(stream=stream))

    def resume_stream(self, stream: StreamName) -> None:
        self._call("stream_resume", StreamRef(stream=stream))

    def ping(self, *, timeout_s: float | None = None) -> Pong:
        return self._call("ping", timeout_s=timeout_s)

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """Wait until the node can answer questions. Raises NoReplyError, or NOT_READY if it is only alive."""
        seconds = self._seconds(timeout_s)
        deadline = time.monotonic() + seconds
        try:
            while not self.ping(timeout_s=max(_MAX_POLL_S, deadline - time.monotonic())).ready:
                if time.monotonic() >= deadline:
                    raise NodeError(ErrorCode.NOT_READY, "the node is alive but still not ready")
                time.sleep(_MAX_POLL_S)
        except NoReplyError as error:
            # Not what was left for the last ping: the caller waited for all of it.
            raise NoReplyError(error.endpoint, seconds) from error

    def process_frame(
        self, stream: StreamName, pixels: NDArray[np.uint8], *, ts: int | None = None, **ignored: Any
    ) -> int:
        """Give one picture to a stream, and return its sequence number.

        `pixels` is RGB, uint8, (height, width, 3); `ts` its capture time in ns since the Unix epoch. Without
        one the picture gets the present time. Waits while the node is not there or lags behind.
        """
        return self._feed(stream).publish(pixels, ts)

    def process_chunk(
        self,
        stream: StreamName,
        frames: Sequence[NDArray[np.uint8]],
        *,
        ts: Sequence[int] | None = None,
        **ignored: Any,
    ) -> int:
        """Give pictures, oldest first, with one time each, and return the last one's sequence number.

        How many pictures are encoded together is the stream's own setting, `chunk_frames`.
        """
        times = [None] * len(frames) if ts is None else list(ts)
        if not frames or len(times) != len(frames):
            raise ValueError(f"a chunk needs pictures and one time each, got {len(frames)} and {len(times)}")
        feed = self._feed(stream)
        return [feed.publish(pixels, at) for pixels, at in zip(frames, times, strict=True)][-1]

    def end_stream(self, stream: StreamName) -> None:
        """Say that no more pictures follow for now: a chunk that is not full is padded and encoded."""
        with self._feeds_lock:
            feed = self._feeds.get(stream)
        if feed is not None:
            feed.end()

    def wait_encoded(self, stream: StreamName, seq: int, timeout_s: float | None = None) -> bool:
        """Wait until the memory holds the picture `seq` of this client, or one given after it.

        False when the picture was dropped, or when the time is up: a picture whose chunk is not full stays
        outside the memory until more pictures come or `end_stream` is called.
        """
        deadline = time.monotonic() + self._seconds(timeout_s)
        feed = self._existing_feed(stream)
        pause_s, was_dropped = _FIRST_POLL_S, False
        while (left_s := deadline - time.monotonic()) > 0:
            fate = feed.fate_of(seq, self._stats_of(stream))
            # Counters and memory are not read in one instant: a drop counts if it is there twice.
            if fate or (fate is False and was_dropped):
                return fate
            was_dropped = fate is False
            time.sleep(min(pause_s, left_s))
            pause_s = min(_MAX_POLL_S, 2 * pause_s)
        return False

    def _stats_of(self, stream: StreamName) -> StreamStats:
        for stats in self.streams():
            if stats.stream == stream:
                return stats
        raise NodeError(ErrorCode.UNKNOWN_STREAM, f"there is no stream {stream}")

    def _existing_feed(self, stream: StreamName) -> _Feed:
        with self._feeds_lock:
            if stream not in self._feeds:
                raise ValueError(f"this client has given no pictures to {stream}")
            return self._feeds[stream]

    def _feed(self, stream: StreamName) -> _Feed:
        with self._feeds_lock:
            if not self._is_open:
                raise ClosedError("the client is closed")
            feed = self._feeds.get(stream)
            if feed is None or feed.has_ended:
                feed = self._feeds[stream] = self._open_feed(stream)
            return feed

    def _open_feed(self, stream: StreamName) -> _Feed:
        server_key, client_key = self._keys
        publisher = FramePublisher(
            stream,
            connect=self._frames,
            server_key=server_key,
            client_key=client_key,
            context=self._context,
            lossless=True,
            send_timeout_s=self._timeout_s,
        )
        return _Feed(publisher, self._timeout_s)

    def _call(
        self,
        name: str,
        data: Message | None = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
    ) -> Any:
        request = self._request(name, data or Empty(), request_id)
        *_, final = self._replies(name, request, self._seconds(timeout_s))
        return reply_data(final, ENDPOINTS[name].reply)

    def _request(self, name: str, data: Message, request_id: str | None, *, stream_reply: bool = False) -> Request:
        return Request(
            id=request_id or str(uuid.uuid4()),
            session=self.session,
            endpoint=name,
            stream_reply=stream_reply,
            data=msgspec.Raw(encode(data)),
        )

    def _replies(self, name: str, request: Request, timeout_s: float) -> Generator[Reply]:
        # Where both sockets have an endpoint, control answers it while questions are waiting.
        with self._pools[ENDPOINTS[name].sockets[-1]].connection() as connection:
            yield from connection.replies(request, timeout_s)

    def _seconds(self, timeout_s: float | None) -> float:
        return self._timeout_s if timeout_s is None else _checked_seconds(timeout_s)

    def close(self) -> None:
        """Close. Pictures that were given, or are being given, are still sent; open requests end with ClosedError.

        With a context that was given to the client, open requests go on to their own end.
        """
        with self._feeds_lock:
            self._is_open = False
            feeds, self._feeds = self._feeds, {}
        for feed in feeds.values():
            feed.close()
        for pool in self._pools.values():
            pool.close()
        if self._owns_context:
            self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Feed:
    """The pictures a client gives to one stream, in one session. Safe from any thread."""

    def __init__(self, publisher: FramePublisher, timeout_s: float) -> None:
        self._publisher = publisher
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._first_ts: int | None = None
        self.has_ended = False

    def publish(self, pixels: NDArray[np.uint8], ts: int | None) -> int:
        at = time.time_ns() if ts is None else int(ts)
        with self._lock:
            self._wait_for_node()
            seq = self._publisher.publish_image(pixels, ts=at, ts_kind="publish" if ts is None else "capture")
            self._first_ts = at if self._first_ts is None else self._first_ts
            return seq

    def _wait_for_node(self) -> None:
        try:
            if self._publisher.wait_for_subscriber(self._timeout_s):
                return
        except AuthError:
            # ZeroMQ does not try again: another feed must, in case the node has learned the key.
            self.has_ended = True
            self._publisher.close()
            raise
        raise NoReplyError(self._publisher.endpoint, self._timeout_s)

    def end(self) -> None:
        with self._lock:
            if self.has_ended:
                return
            self.has_ended = True
            try:
                self._publisher.end()
            finally:
                self._publisher.close()

    def fate_of(self, seq: int, stats: StreamStats) -> bool | None:
        """Whether the memory holds a picture, False if it never will, None while that is open."""
        frames, cache = stats.frames, stats.cache
        if frames.last_session not in (UNSET, self._publisher.session) or self._first_ts is None:
            return None
        # Numbers alone may be those of an earlier session; the memory's times only grow.
        is_ours = cache.newest_ns is not UNSET and cache.newest_ns >= self._first_ts
        if is_ours and cache.newest_seq is not UNSET and cache.newest_seq >= seq:
            return True
        is_through = frames.last_seq is not UNSET and frames.last_seq >= seq and frames.pending == 0
        return False if is_through else None

    def close(self) -> None:
        """End the session, so that the next publisher of the stream need not wait for this one's silence."""
        try:
            self.end()
        except OnlookerError as error:
            logger.warning("%s could not be ended: %s", self._publisher.stream, error)


def _new_pieces(replies: Iterator[Reply]) -> Generator[PartialAnswer, None, Reply]:
    """Yield the pieces of an answer, none of them twice, and return the final reply."""
    next_n, final = 0, None
    for reply in replies:
        if reply.status != "partial":
            final = reply
            continue
        piece = reply_data(reply, PartialAnswer)
        if piece.n >= next_n:  # after a lost connection the node may start over
            next_n = piece.n + 1
            yield piece
    assert final is not None  # the connection ends with one, or with an exception
    return final


def _checked_seconds(timeout_s: float) -> float:
    if not timeout_s > 0:
        raise ValueError(f"timeout_s must be above 0, got {timeout_s}")
    return min(float(timeout_s), 86_400.0)
