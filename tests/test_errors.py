import pytest

from onlooker.protocol import errors
from onlooker.protocol.errors import (
    AuthError,
    ClosedError,
    DecodeError,
    ErrorCode,
    NodeError,
    NoReplyError,
    OnlookerError,
)


def test_everything_raised_on_purpose_has_one_base() -> None:
    for kind in (NodeError, NoReplyError, AuthError, DecodeError, ClosedError):
        assert issubclass(kind, OnlookerError)
        assert f"── {kind.__name__} " in (errors.__doc__ or "")


@pytest.mark.parametrize("code", list(ErrorCode))
def test_a_known_code_knows_whether_to_retry(code: ErrorCode) -> None:
    error = NodeError(code, "no")
    assert error.retryable is code.retryable
    assert str(error) == f"{code}: no"


def test_the_nodes_own_word_on_retrying_counts() -> None:
    assert NodeError(ErrorCode.BUSY, "no", retryable=False).retryable is False
    assert NodeError("OVERHEATED", "no", retryable=True).retryable is True
    assert NodeError("OVERHEATED", "no").retryable is False


def test_messages_are_made_of_the_values() -> None:
    assert str(NoReplyError("tcp://h:1", 0.5)) == "no reply from tcp://h:1 within 0.5 s"
    assert str(AuthError("tcp://h:1", "the keys do not fit")) == "tcp://h:1 refused the connection: the keys do not fit"
