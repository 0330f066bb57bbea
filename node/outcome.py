"""How work that was given to another thread ends, whether or not its caller is still there."""

from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


def succeed(future: Future[T], result: T) -> None:
    """Hand over a result, unless the caller has cancelled."""
    if future.set_running_or_notify_cancel():
        future.set_result(result)


def fail(future: Future[Any], error: Exception) -> None:
    if future.set_running_or_notify_cancel():
        future.set_exception(error)
