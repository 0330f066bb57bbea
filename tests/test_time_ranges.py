"""An answer says which time it knows, and how well."""

from dataclasses import replace
from itertools import pairwise

import pytest
from checkpoints import Checkpoints, chunk, memory
from hypothesis import given, settings
from hypothesis import strategies as st

from onlooker.node.branch import Branch, Scratch
from onlooker.node.ledger import ChunkRecord, Forgotten, Snapshot
from onlooker.node.memory import StreamMemory
from onlooker.node.time_ranges import MAX_RANGES, time_ranges
from onlooker.protocol.messages import TimeRange

FIRST_NS = 1000


def record(number: int, num_dropped: int = 0) -> ChunkRecord:
    """Two frames: the one at ten times its number, and the one 5 ns later."""
    at = FIRST_NS + 10 * number
    times = {"first_ns": at, "last_ns": at + 5, "first_stream_ns": at, "last_stream_ns": at + 5}
    return ChunkRecord(  # type: ignore[call-arg]
        number=number,
        first_token=0,
        num_tokens=6,
        num_frames=2,
        num_padded=0,
        first_seq=0,
        last_seq=1,
        ts_kind="capture",
        elapsed_ns=10,
        reach=None,  # type: ignore[arg-type]
        num_dropped=num_dropped,
        **times,
    )


def known(numbers: list[int], num_seen: int, dropped: tuple[int, ...] = ()) -> list[TimeRange]:
    held = [record(number, int(number in dropped)) for number in numbers]
    gone = [record(number) for number in range(num_seen) if number not in numbers]
    snapshot = Snapshot(num_chunks=len(held), forgotten=Forgotten().plus(gone))
    assert snapshot.num_seen == num_seen
    return time_ranges(held, snapshot)


def told(ranges: list[TimeRange]) -> list[tuple[str, int, int]]:
    """How well which time is known, in tens after the first."""
    return [(r.known, (r.from_ns - FIRST_NS) // 10, (r.until_ns - FIRST_NS) // 10) for r in ranges]


def test_a_memory_that_forgot_nothing_is_whole():
    assert told(known([0, 1, 2], 3)) == [("whole", 0, 2)]


def test_what_a_window_no_longer_holds_is_forgotten():
    assert told(known([4, 5, 6], 7)) == [("forgotten", 0, 4), ("whole", 4, 6)]


def test_what_is_kept_here_and_there_is_thinned_as_densely_as_it_is():
    ranges = known([0, 8, 16, 20, 24, 26, 28, 29, 30], 31)
    assert told(ranges) == [
        ("whole", 0, 0),
        ("thinned", 0, 16),
        ("thinned", 16, 24),
        ("thinned", 24, 28),
        ("whole", 28, 30),
    ]
    assert [r.num_frames for r in ranges] == [2, 4, 4, 2, 6]


def test_a_hole_is_forgotten_and_not_thinned():
    assert told(known([0, 1, 10, 11], 12)) == [("whole", 0, 1), ("forgotten", 1, 10), ("whole", 10, 11)]


def test_frames_without_the_tokens_that_said_nothing_new_are_told_apart():
    assert told(known([0, 1, 2, 3], 4, dropped=(1, 2))) == [("whole", 0, 0), ("dropped", 1, 2), ("whole", 3, 3)]


def test_ranges_that_are_merged_for_their_number_are_not_thinned_where_every_chunk_is_there():
    ranges = known(list(range(60)), 60, dropped=tuple(range(0, 60, 2)))
    assert len(ranges) == MAX_RANGES and told(ranges[:2]) == [("dropped", 0, 44), ("whole", 45, 45)]


def test_a_mark_of_which_the_newest_part_is_gone_ends_with_what_is_forgotten():
    assert told(known([0, 1], 5)) == [("whole", 0, 1), ("forgotten", 1, 4)]


@settings(max_examples=100, deadline=None)
@given(
    held=st.sets(st.integers(0, 150), min_size=1, max_size=80),
    beyond=st.integers(1, 5),
    dropped=st.sets(st.integers(0, 150)),
)
def test_every_chunk_is_told_of_truly(held: set[int], beyond: int, dropped: set[int]):
    num_seen = max(held) + beyond
    ranges = known(sorted(held), num_seen, tuple(dropped))
    assert len(ranges) <= MAX_RANGES
    assert all(older.until_ns <= newer.from_ns for older, newer in pairwise(ranges))
    assert sum(r.num_frames for r in ranges) == 2 * len(held)
    assert (ranges[0].from_ns, ranges[-1].until_ns) == (FIRST_NS, FIRST_NS + 10 * (num_seen - 1) + 5)
    for number in range(num_seen):
        middle = FIRST_NS + 10 * number + 2
        told_as = {r.known for r in ranges if r.from_ns <= middle <= r.until_ns}
        if number not in held:
            assert told_as <= {"forgotten", "thinned"} and told_as
        else:
            assert told_as <= {"dropped", "thinned"} | (set() if number in dropped else {"whole"}) and told_as


@pytest.mark.parametrize("retention", ["window", "thin", "reset"])
def test_an_answer_tells_what_its_memory_knew_when_it_was_asked(checkpoints: Checkpoints, retention: str):
    model = checkpoints.model("qwen2_5_vl")
    small = replace(
        memory(model, 300).options,
        retention=retention,  # type: ignore[arg-type]
    )
    stream = StreamMemory(model, small)
    for i in range(90):
        stream.append(chunk(2 * i))
    branch = Branch(model, stream, stream.now, Scratch(model.kv_shape, 1, 16))
    asked = stream.now
    while retention != "reset" and stream.now.forgotten == asked.forgotten:
        stream.append(chunk(2 * stream.now.num_seen))
    ranges = branch.provenance(asked).ranges
    assert (ranges[0].from_ns, ranges[-1].until_ns) == (7, asked.newest_ns)
    assert sum(r.num_frames for r in ranges) == asked.num_frames
    assert [r.from_ns for r in ranges if r.known == "whole"][-1] == asked.whole_from_ns
    assert ("forgotten" in {r.known for r in ranges}) == (retention != "thin")
    assert ("thinned" in {r.known for r in ranges}) == (retention == "thin")
