import logging

import pytest

from onlooker.node.graphs import Recorded


class Letters:
    """Two at most are recorded as capitals."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self._recorded: Recorded[str] = Recorded("letters", max_kept=2)

    def get(self, keys: str) -> str:
        """What comes of letters one after the other; a dot where nothing is recorded."""
        return "".join(self._recorded.get(key, lambda key=key: self._make(key)) or "." for key in keys)

    def _make(self, key: str) -> str:
        self.made.append(key)
        return key.upper()


def test_a_key_is_recorded_once_and_few_are_kept():
    letters = Letters()
    assert letters.get("abab") == "ABAB"
    assert letters.made == ["a", "b"]


def test_keys_that_come_by_turns_do_not_drive_each_other_out():
    letters = Letters()
    assert letters.get(20 * "abc") == 20 * "AB."
    assert letters.made == ["a", "b"]


def test_a_key_that_comes_more_often_than_those_that_come_by_turns_takes_a_place():
    letters = Letters()
    assert letters.get("ab" + 3 * "ccacb") == "AB..AC." + 2 * "CCAC."
    assert letters.made == ["a", "b", "c"]


def test_a_key_that_comes_again_and_again_takes_the_place_of_the_one_used_the_longest_ago():
    letters = Letters()
    assert letters.get("abacacac") == "ABA.A.AC"
    assert letters.get("acbb") == "AC.."
    assert letters.get("b") == "B" and letters.get("c") == "C"
    assert letters.made == ["a", "b", "c", "b"]


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
