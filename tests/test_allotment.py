"""Streams take together what they may, and not a byte more."""

from pathlib import Path

import pytest

from onlooker.node.allotment import Allotment, default_memory_bytes
from onlooker.node.options import StreamOptions
from onlooker.protocol.errors import NodeError


def stream(name: str, memory_bytes: int = 10) -> StreamOptions:
    return StreamOptions(name=name, memory_bytes=memory_bytes)


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
    with pytest.raises(NodeError, match="memory_bytes 16 and the 10 of") as caught:
        allotment.take(stream("b", 16))
    assert caught.value.code == "OUT_OF_MEMORY"
    assert caught.value.details == {"max_memory_bytes": 25, "taken_bytes": 10}
    allotment.take(stream("b", 15))


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
