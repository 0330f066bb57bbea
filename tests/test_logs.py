"""A line an entry, with its facts."""

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import pytest

from onlooker.node.logs import configure, take_over

logger = logging.getLogger("onlooker.node.server")


@contextmanager
def written(level: str, line_format: Literal["text", "json"]) -> Iterator[io.StringIO]:
    root, package = logging.getLogger(), logging.getLogger("onlooker")
    levels = root.level, package.level
    text = io.StringIO()
    handler = configure(level, line_format, text)
    yield text
    root.removeHandler(handler)
    root.setLevel(levels[0])
    package.setLevel(levels[1])
    logging.captureWarnings(False)


def test_people_read_facts_as_key_and_value():
    with written("info", "text") as text:
        logger.info("ready", extra={"facts": {"node": "gate", "model": "two words", "stream": None, "n": 0}})
    assert text.getvalue().partition(" ")[2] == 'info server: ready node=gate model="two words" n=0\n'


def test_programs_read_json():
    with written("info", "json") as text:
        logger.warning("a\nb %d", 1, extra={"facts": {"node": "gate"}})
    entry = json.loads(text.getvalue())
    assert {key: entry[key] for key in ("level", "logger", "message", "node")} == {
        "level": "warning",
        "logger": "onlooker.node.server",
        "message": "a\nb 1",
        "node": "gate",
    }
    assert text.getvalue().count("\n") == 1


@pytest.mark.parametrize("line_format", ["text", "json"])
def test_a_defect_is_logged_with_its_traceback(line_format: Literal["text", "json"]):
    with written("info", line_format) as text:
        try:
            raise ZeroDivisionError("why")
        except ZeroDivisionError:
            logger.exception("it failed")
    assert "Traceback" in text.getvalue() and "ZeroDivisionError: why" in text.getvalue()


def test_other_libraries_are_heard_from_warnings_on():
    with written("debug", "text") as text:
        logger.debug("ours")
        logging.getLogger("somebody").info("theirs")
        logging.getLogger("somebody").warning("their warning")
    assert "ours" in text.getvalue() and "their warning" in text.getvalue()
    assert "theirs" not in text.getvalue()


def test_a_library_with_a_log_of_its_own_is_heard_once_and_by_its_whole_name():
    own = io.StringIO()
    library = logging.getLogger("somebody.hub")
    library.addHandler(logging.StreamHandler(own))
    library.propagate = False
    with written("info", "text") as text:
        take_over("somebody.hub")
        logging.getLogger("somebody.hub.http").warning("retrying")
    assert own.getvalue() == ""
    assert text.getvalue().partition(" ")[2] == "warning somebody.hub.http: retrying\n"
