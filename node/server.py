"""A ROUTER that answers requests by a table of endpoints, and never waits for any of them.

One thread owns the socket and everything in here. An endpoint answers at once, or is a generator that yields
the futures it waits for; whoever completes a future wakes the thread through its outbox.

A request is named by its session and id. A duplicate of one that still runs gets the same reply when it
comes; a duplicate of one that is done gets the stored reply. So a client may resend what it fears lost.
"""

import logging
import threading
import time
import uuid
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypedDict

import zmq

from ..protocol.codec import decode_request, error_reply, ok_reply, partial_reply, request_data
from ..protocol.errors import DecodeError, ErrorCode, NodeError
from ..protocol.messages import UNSET, PartialAnswer, Request
from .outbox import Outbox
from .requests import (
    Call,
    Endpoint,
    Envelope,
    Key,
    Limits,
    Steps,
    StoredReplies,
    StoredReply,
    readable_id,
    request_digest,
    request_key,
    split_envelope,
)
from .security import RefusedPeers
from .tally import Tally

logger = logging.getLogger(__name__)

MAX_ADDRESSES = 4
CLOSE_LINGER_MS = 200  # for replies that are on their way

_RECEIVE_BURST = 64
_MAX_POLL_S = 60.0

_LATE = NodeError(ErrorCode.DEADLINE_EXCEEDED, "the deadline passed before the work was done")
_CANCELLED = NodeError(ErrorCode.CANCELLED, "the request was cancelled")
_STOPPING = NodeError(ErrorCode.NOT_READY, "the node is stopping")


class _Signature(TypedDict):
    """What every reply says of the node."""

    node: str
    session: str


@dataclass(slots=True, eq=False)
class _Job:
    """A request whose steps are not done yet."""

    request: Request
    digest: bytes
    deadline: float
    addresses: list[Envelope]
    is_cancellable: bool
    steps: Steps[Any] = field(init=False)  # set when it is admitted
    awaited: Future[Any] | None = None
    num_partials: int = 0
    is_answered: bool = False

    @property
    def key(self) -> Key:
        return request_key(self.request)

    def is_of_client(self, other: "_Job") -> bool:
        """Whether both are of one session, which a client chooses, or came by one connection."""
        return self.request.session == other.request.session or self.addresses[0][:1] == other.addresses[0][:1]


class Server:
    """Answers one ROUTER socket on its own thread, from `start` to `close`.

    The socket is bound already and now belongs to the server; `node` and `session` sign its replies.
    `on_internal` is told the endpoint and the error id of each request that failed by a defect of ours.
    """

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        endpoints: Mapping[str, Endpoint[Any]],
        *,
        node: str,
        session: str,
        limits: Limits,
        rejected: Tally,
        refused: RefusedPeers,
        on_internal: Callable[[str, str], None],
        name: str,
    ) -> None:
        self._socket = socket
        self._refused = refused
        self._endpoints = endpoints
        self._signature: _Signature = {"node": node, "session": session}
        self._limits = limits
        self._rejected = rejected
        self._on_internal = on_internal
        self._jobs: dict[Key, _Job] = {}
        self._stored = StoredReplies()
        self._outbox: Outbox[Callable[[], None]] = Outbox()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout_s: float = 1.0) -> None:
        """Answer what is open with NOT_READY and close the socket."""
        if not self._thread.is_alive():
            self._leave()
            return
        self._outbox.put(self._stop)
        self._thread.join(timeout_s)

    def cancel(self, session: str, request_id: str) -> Future[bool]:
        """End a request with CANCELLED; the result says whether it was still open. For any thread."""
        done: Future[bool] = Future()
        self._outbox.put(lambda: done.set_result(self._cancel((session, request_id))))
        return done

    # The thread

    def _run(self) -> None:
        try:
            self._serve_all()
        except zmq.ContextTerminated:
            logger.warning("%s: it was stuck, and ends after the node", self._thread.name)
        finally:
            self._leave()

    def _serve_all(self) -> None:
        poller = zmq.Poller()
        for source in (self._socket, self._refused.socket, self._outbox.fileno()):
            poller.register(source, zmq.POLLIN)
        while not self._is_stopping:
            poller.poll(self._ms_until_due())
            for act in self._outbox.take():
                self._shielded(act)
            self._shielded(self._receive)
            self._shielded(self._expire)
            self._shielded(self._refused.note)

    def _leave(self) -> None:
        if self._socket.closed:
            return
        self._refused.close()
        self._socket.close(linger=CLOSE_LINGER_MS)
        self._outbox.close()

    def _shielded(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception:  # the socket must outlive any defect in the code that serves it
            logger.exception("%s: a step failed", self._thread.name)

    def _ms_until_due(self) -> int:
        due = min((job.deadline for job in self._jobs.values() if not job.is_answered), default=float("inf"))
        return int(1e3 * min(max(0.0, due - time.monotonic()), _MAX_POLL_S)) + 1

    def _receive(self) -> None:
        for _ in range(_RECEIVE_BURST):
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            address, body = split_envelope(parts)
            self._take(address, body)

    def _take(self, address: Envelope, body: list[bytes]) -> None:
        request_id = ""
        try:
            if len(body) != 1:
                raise DecodeError(f"a request has one part after the empty frame, got {len(body)}")
            request = decode_request(body[0])
            request_id = request.id
            self._serve(address, request)
        except DecodeError as error:
            self._refuse(address, readable_id(error) or request_id, error)
        except NodeError as error:
            self._refuse(address, request_id, error)
        except Exception as error:
            self._send(address, self._internal_reply(request_id, "a request", error))

    def _serve(self, address: Envelope, request: Request) -> None:
        endpoint = self._endpoints.get(request.endpoint)
        if endpoint is None:
            known = sorted(self._endpoints)
            message = f"this socket has no endpoint {request.endpoint[:64]!r}"
            raise NodeError(ErrorCode.UNKNOWN_ENDPOINT, message, details={"endpoints": known})
        data = request_data(request, endpoint.kind)
        digest = request_digest(request)
        if self._is_duplicate(address, request, digest):
            return
        arrived = time.monotonic()
        seconds = self._limits.default_deadline_s
        if request.deadline_ms is not UNSET:
            seconds = request.deadline_ms / 1e3
        job = _Job(request, digest, arrived + seconds, [address], endpoint.is_cancellable)
        on_delta = partial(self._pass_delta, job) if request.stream_reply else None
        answer = endpoint.answer(Call(data, arrived, job.deadline, on_delta))
        if isinstance(answer, Generator):
            self._admit(job, answer)
        else:
            self._send(address, ok_reply(request.id, answer, **self._signature))

    def _is_duplicate(self, address: Envelope, request: Request, digest: bytes) -> bool:
        """Give a duplicate what the first one gets."""
        key = request_key(request)
        earlier = self._stored.get(key) or self._jobs.get(key)
        if earlier is None:
            return False
        if earlier.digest != digest:
            raise NodeError(ErrorCode.BAD_REQUEST, "this id was used for another request of the session")
        if isinstance(earlier, StoredReply):
            self._send(address, earlier.reply)
        elif earlier.is_answered:
            raise self._busy("its deadline has passed, and the work still goes on")
        elif address not in earlier.addresses:
            earlier.addresses = [*earlier.addresses, address][-MAX_ADDRESSES:]
        return True

    def _admit(self, job: _Job, steps: Steps[Any]) -> None:
        num_of_client = sum(job.is_of_client(other) for other in self._jobs.values())
        if num_of_client >= self._limits.max_per_client:
            raise self._busy(f"this client has {num_of_client} requests open, the most it may have")
        if len(self._jobs) >= self._limits.max_open:
            raise self._busy(f"{len(self._jobs)} requests are open, the most there may be")
        job.steps = steps
        self._jobs[job.key] = job
        self._advance(job, None)

    def _busy(self, message: str) -> NodeError:
        return NodeError(ErrorCode.BUSY, message, retry_after_ms=self._limits.retry_after_ms())

    def _advance(self, job: _Job, done: Future[Any] | None) -> None:
        """Take the next step of a job, with the result of the future it waited for."""
        if self._jobs.get(job.key) is not job:
            return  # the server is stopping, and has answered it
        try:
            job.awaited = self._step(job.steps, done)
        except StopIteration as end:
            self._end(job, ok_reply(job.request.id, end.value, **self._signature), is_final=True)
        except NodeError as error:
            self._end(job, error_reply(job.request.id, error, **self._signature), is_final=not error.retryable)
        except CancelledError:
            self._end(job, error_reply(job.request.id, _CANCELLED, **self._signature), is_final=True)
        except Exception as error:
            self._end(job, self._internal_reply(job.request.id, job.request.endpoint, error), is_final=True)
        else:
            job.awaited.add_done_callback(lambda future: self._outbox.put(partial(self._advance, job, future)))

    @staticmethod
    def _step(steps: Steps[Any], done: Future[Any] | None) -> Future[Any]:
        if done is None:
            return next(steps)
        if done.cancelled():
            return steps.throw(CancelledError())
        error = done.exception()
        return steps.send(done.result()) if error is None else steps.throw(error)

    def _end(self, job: _Job, reply: bytes, *, is_final: bool) -> None:
        """Answer a job and forget it; a final reply is stored for duplicates."""
        del self._jobs[job.key]
        if job.is_answered and job.is_cancellable:
            return  # its end was only waited for; the reply it got is stored
        self._answer(job, reply)
        if is_final:
            self._stored.put(job.key, job.digest, reply)

    def _answer(self, job: _Job, reply: bytes) -> None:
        if job.is_answered:
            return
        job.is_answered = True
        for address in job.addresses:
            self._send(address, reply)

    def _answer_early(self, job: _Job, error: NodeError) -> None:
        """Answer a job whose work is still under way, and end that work if it may be ended."""
        reply = error_reply(job.request.id, error, **self._signature)
        self._answer(job, reply)
        if job.is_cancellable:
            self._stored.put(job.key, job.digest, reply)
            if job.awaited is not None:
                job.awaited.cancel()

    def _expire(self) -> None:
        now = time.monotonic()
        for job in list(self._jobs.values()):
            if not job.is_answered and now >= job.deadline:
                self._answer_early(job, _LATE)

    def _cancel(self, key: Key) -> bool:
        job = self._jobs.get(key)
        if job is None or job.is_answered or not job.is_cancellable:
            return False
        self._answer_early(job, _CANCELLED)
        return True

    def _stop(self) -> None:
        self._is_stopping = True
        jobs, self._jobs = list(self._jobs.values()), {}
        for job in jobs:
            self._answer(job, error_reply(job.request.id, _STOPPING, **self._signature))
            if job.is_cancellable and job.awaited is not None:
                job.awaited.cancel()
            self._shielded(job.steps.close)

    # Replies

    def _pass_delta(self, job: _Job, delta: str) -> None:
        """Send a piece of an answer. For any thread."""
        self._outbox.put(partial(self._send_partial, job, delta))

    def _send_partial(self, job: _Job, delta: str) -> None:
        if job.is_answered:
            return
        data = PartialAnswer(n=job.num_partials, delta=delta)
        job.num_partials += 1
        reply = partial_reply(job.request.id, data, **self._signature)
        for address in job.addresses:
            self._send(address, reply)

    def _refuse(self, address: Envelope, request_id: str, error: NodeError | DecodeError) -> None:
        self._rejected.add(error.code.lower())
        self._send(address, error_reply(request_id, error, **self._signature))

    def _internal_reply(self, request_id: str, endpoint: str, error: Exception) -> bytes:
        """Log a defect under an id, and make the reply that quotes it."""
        error_id = uuid.uuid4().hex[:12]
        logger.error("%s failed, error_id=%s", endpoint, error_id, exc_info=error)
        self._on_internal(endpoint, error_id)
        failed = NodeError(ErrorCode.INTERNAL, "the node failed; its log says why under this error_id")
        return error_reply(request_id, failed, error_id=error_id, **self._signature)

    def _send(self, address: Envelope, reply: bytes) -> None:
        # A ROUTER drops what is for a client that has gone or does not read.
        self._socket.send_multipart([*address, reply], zmq.NOBLOCK)
