"""Streams take together what they may, and not a byte more."""

from contextlib import suppress
from pathlib import Path

import pytest

from onlooker.node.allotment import Allotment, default_memory_bytes
from onlooker.node.options import StreamOptions
from onlooker.protocol.errors import NodeError
from onlooker.protocol.messages import RetentionName


def stream(
    name: str, memory_bytes: int = 10, min_memory_bytes: int | None = None, retention: RetentionName = "window"
) -> StreamOptions:
    return StreamOptions(name=name, memory_bytes=memory_bytes, min_memory_bytes=min_memory_bytes, retention=retention)


def test_a_stream_beyond_their_number_is_refused_until_one_is_gone():
    allotment = Allotment(max_streams=1, max_memory_bytes=None)
    allotment.take(stream("a", 1 << 62))
    with pytest.raises(NodeError, match="there are 1 streams") as caught:
        allotment.take(stream("b"))
    assert (caught.value.code, caught.value.details) == ("TOO_LARGE", {"max_streams": 1})
    allotment.give_back("a")
    allotment.take(stream("b"))


def test_a_stream_beyond_their_memory_is_refused_with_the_figures():
    allotment = Allotment(max_streams=9, max_memory_bytes=25)
    allotment.take(stream("a"))
    with pytest.raises(NodeError, match=r"needs 16 B .* 15 B are left beside the 10 B of") as caught:
        allotment.take(stream("b", 16))
    assert caught.value.code == "OUT_OF_MEMORY"
    figures = {"needed_bytes": 16, "left_bytes": 15, "taken_bytes": 10, "promised_bytes": 0, "max_memory_bytes": 25}
    assert caught.value.details == figures
    assert allotment.take(stream("b", 15)) == 15


def test_a_stream_that_asks_for_more_than_is_left_gets_that_but_never_less_than_its_least():
    allotment = Allotment(max_streams=9, max_memory_bytes=25)
    assert allotment.take(stream("a", 30, 5)) == 25
    allotment.keep("a", 18)  # the device had no more
    with pytest.raises(NodeError) as caught:
        allotment.take(stream("b", 30, 8))
    assert (caught.value.code, caught.value.details["left_bytes"]) == ("OUT_OF_MEMORY", 7)
    assert allotment.take(stream("b", 30, 7)) == 7


def test_what_is_promised_to_a_stream_is_there_when_it_comes():
    allotment = Allotment(max_streams=9, max_memory_bytes=25, promised={"a": 5, "b": 8})
    assert allotment.take(stream("a", 30, 5)) == 17
    with pytest.raises(NodeError) as caught:
        allotment.take(stream("c", 1))
    assert caught.value.details["promised_bytes"] == 8
    assert allotment.take(stream("b", 30, 8)) == 8
    allotment.give_back("b")
    assert allotment.take(stream("c", 8)) == 8  # a stream that was removed is promised nothing


def test_for_the_least_of_another_stream_those_cede_most_that_have_most_beyond_their_own():
    allotment = Allotment(max_streams=4, max_memory_bytes=60)
    for options in (stream("a", 20, 8), stream("b", 30, 5), stream("c", 10, 5)):
        allotment.take(options)
    assert allotment.ceded(stream("d", 90, 31)) == {"b": 5, "a": 14}
    assert allotment.ceded(stream("d", 90, 3)) == {"b": 27}
    assert allotment.ceded(stream("d", 90, 42)) == {"b": 5, "a": 8, "c": 5}
    assert allotment.ceded(stream("d", 90, 43)) == {}  # it cannot be had: nobody cedes anything
    assert allotment.ceded(stream("a", 90, 3)) == {}  # there is one already
    allotment.keep("b", 27)
    assert allotment.take(stream("d", 90, 3)) == 3
    assert allotment.ceded(stream("e", 90, 3)) == {}  # there are as many as there may be


def test_what_is_never_forgotten_is_not_ceded():
    allotment = Allotment(max_streams=4, max_memory_bytes=60)
    for options in (stream("a", 40, 8, "stop"), stream("b", 20, 12)):
        allotment.take(options)
    assert allotment.ceded(stream("c", 90, 8)) == {"b": 12}
    assert allotment.ceded(stream("c", 90, 9)) == {}
    allotment.keep("a", 30)
    assert allotment.regained() == {}  # it could never be had back
    assert Allotment(max_streams=4, max_memory_bytes=None).ceded(stream("c", 90, 9)) == {}


def test_what_was_ceded_or_never_had_is_taken_up_when_there_is_room():
    allotment = Allotment(max_streams=9, max_memory_bytes=50, promised={"p": 5})
    for options in (stream("a", 20, 8), stream("b", 30, 5), stream("c", 10, 1)):
        with suppress(NodeError):
            allotment.take(options)
    assert allotment.regained() == {}
    allotment.keep("a", 10)
    allotment.take(stream("c", 10, 10))
    assert allotment.regained() == {}
    allotment.give_back("c")
    assert allotment.regained() == {"a": 20}
    allotment.keep("a", 20)
    allotment.take(stream("p", 5))
    allotment.give_back("p")
    assert allotment.regained() == {"b": 30}


def test_what_never_fits_is_too_large():
    with pytest.raises(NodeError) as caught:
        Allotment(max_streams=9, max_memory_bytes=25).take(stream("a", 26))
    assert caught.value.code == "TOO_LARGE"


def test_a_name_is_taken_once():
    allotment = Allotment(max_streams=9, max_memory_bytes=None)
    allotment.take(stream("a"))
    with pytest.raises(NodeError) as caught:
        allotment.take(stream("a"))
    assert caught.value.code == "STREAM_EXISTS"


def test_on_the_cpu_half_of_what_is_available_may_be_taken(tmp_path: Path):
    facts = tmp_path / "meminfo"
    facts.write_text("MemTotal:  9000 kB\nMemAvailable:   3000 kB\n")
    assert default_memory_bytes("cpu", facts) == 1500 * 1024
    assert default_memory_bytes("cuda:0", facts) is None
    assert default_memory_bytes("cpu", tmp_path / "nowhere") is None
