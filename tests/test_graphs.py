import logging

import pytest

from onlooker.node.graphs import Recorded


def test_a_key_is_recorded_once_and_few_are_kept():
    made: list[str] = []
    recorded: Recorded[str] = Recorded("things", max_kept=2)

    def get(key: str) -> str | None:
        return recorded.get(key, lambda: made.append(key) or key.upper())  # type: ignore[func-returns-value]

    assert [get(key) for key in ("a", "b", "a", "c", "a", "b")] == ["A", "B", "A", "C", "A", "B"]
    assert made == ["a", "b", "c", "b"], "b was used the longest ago when c came"


def test_what_cannot_be_recorded_is_in_the_log_and_not_tried_again(caplog: pytest.LogCaptureFixture):
    tries: list[int] = []
    recorded: Recorded[int] = Recorded("things", max_kept=2)

    def fail() -> int:
        tries.append(1)
        raise RuntimeError("no such kernel")

    with caplog.at_level(logging.WARNING):
        assert [recorded.get("a", fail), recorded.get("a", fail)] == [None, None]
    assert len(tries) == 1
    assert "no such kernel" in caplog.text and "things a" in caplog.text
