"""What can go wrong on the wire, as codes that a program can act on.

OnlookerError
├── NodeError              the node answered with an error; `code`, `retryable`, `details`
├── NoReplyError           no answer in time; the node may be down, or busy past the deadline
├── AuthError              the CURVE handshake failed: wrong server key, unlisted client key, or none
├── DecodeError            bytes that are no valid message; `code` says how a node answers them
└── ClosedError            the client was used after `close()`
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any


class ErrorCode(StrEnum):
    """Error codes of protocol version 1."""

    BAD_REQUEST = "BAD_REQUEST"
    UNSUPPORTED_VERSION = "UNSUPPORTED_VERSION"
    UNKNOWN_ENDPOINT = "UNKNOWN_ENDPOINT"
    UNAUTHORIZED = "UNAUTHORIZED"
    UNKNOWN_STREAM = "UNKNOWN_STREAM"
    STREAM_EXISTS = "STREAM_EXISTS"
    UNKNOWN_MARK = "UNKNOWN_MARK"
    NO_FRAMES = "NO_FRAMES"
    BUSY = "BUSY"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    CANCELLED = "CANCELLED"
    TOO_LARGE = "TOO_LARGE"
    NOT_READY = "NOT_READY"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    INTERNAL = "INTERNAL"

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed later, unchanged."""
        return self in _RETRYABLE


_RETRYABLE = frozenset({ErrorCode.NO_FRAMES, ErrorCode.BUSY, ErrorCode.NOT_READY, ErrorCode.OUT_OF_MEMORY})


class DropReason(StrEnum):
    """Why a frame did not get into a memory, in the order of its way; keys of `FrameCounters.dropped`."""

    MALFORMED = "malformed"
    UNSUPPORTED_VERSION = "unsupported_version"
    UNSUPPORTED_ENCODING = "unsupported_encoding"
    BAD_SIZE = "bad_size"
    UNKNOWN_STREAM = "unknown_stream"
    SECOND_PUBLISHER = "second_publisher"
    AFTER_EOS = "after_eos"
    DUPLICATE = "duplicate"
    OUT_OF_ORDER = "out_of_order"
    PAUSED = "paused"
    RING_FULL = "ring_full"
    TIME_BACKWARDS = "time_backwards"
    SAMPLED_OUT = "sampled_out"
    DECODE_ERROR = "decode_error"
    TOO_LARGE = "too_large"
    GATED = "gated"
    MEMORY_FULL = "memory_full"
    OUT_OF_MEMORY = "out_of_memory"
    ENCODE_ERROR = "encode_error"
    RESET = "reset"
    REMOVED = "removed"


class OnlookerError(Exception):
    """Base of everything this package raises on purpose."""


class NodeError(OnlookerError):
    """The node refused or failed a request, and says why."""

    def __init__(
        self,
        code: ErrorCode | str,
        message: str,
        *,
        details: Mapping[str, Any] | None = None,
        retry_after_ms: int | None = None,
        retryable: bool | None = None,
    ) -> None:
        self.code = str(code)
        self.message = message
        self.details = dict(details or {})
        self.retry_after_ms = retry_after_ms
        known = self.code in ErrorCode.__members__
        # A code from a newer node is not in our table: then the node's own word counts.
        self.retryable = retryable if retryable is not None else known and ErrorCode(self.code).retryable
        super().__init__(f"{self.code}: {message}")


class NoReplyError(OnlookerError):
    """No reply came within the time the caller allowed."""

    def __init__(self, endpoint: str, timeout_s: float) -> None:
        self.endpoint = endpoint
        self.timeout_s = timeout_s
        super().__init__(f"no reply from {endpoint} within {timeout_s:.3g} s")


class AuthError(OnlookerError):
    """The CURVE handshake with the node failed."""

    def __init__(self, endpoint: str, reason: str) -> None:
        self.endpoint = endpoint
        self.reason = reason
        super().__init__(f"{endpoint} refused the connection: {reason}")


class DecodeError(OnlookerError):
    """Bytes that are not a valid message of this protocol."""

    def __init__(self, message: str, code: ErrorCode = ErrorCode.BAD_REQUEST, **details: Any) -> None:
        self.code = code
        self.details = details
        super().__init__(message)


class ClosedError(OnlookerError):
    """The client or publisher was used after it was closed."""
