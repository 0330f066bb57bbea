import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from onlooker.node.chunk import Chunk, Picture, Unchanged
from onlooker.node.layout import LayoutState
from onlooker.node.ledger import Ledger, Snapshot

PIXELS = np.zeros((2, 2, 3), np.uint8)


def chunk(first_seq: int = 0, num: int = 2, num_padded: int = 0, first_ns: int = 0) -> Chunk:
    """Frames half a second apart; their published times are 1000 ns later than the stream's."""
    pictures = [
        Picture(PIXELS, first_seq + i, first_ns + i * 500_000_000 + 1000, "capture", first_ns + i * 500_000_000)
        for i in range(num - num_padded)
    ]
    return Chunk((*pictures, *pictures[-1:] * num_padded), num_padded)


def test_a_new_ledger_holds_nothing():
    now = Ledger().now
    assert (now.num_tokens, now.num_frames, now.seconds, now.newest_ns) == (0, 0, None, None)
    assert now.layout.is_empty


def test_a_record_says_where_a_chunk_lies_and_what_was_in_it():
    ledger = Ledger()
    ledger.append(chunk(5, num=4), 70, LayoutState(80))
    ledger.append(chunk(9, num=4, num_padded=1, first_ns=2_000_000_000), 50, LayoutState(130))
    first, second = ledger.records
    assert (first.first_token, first.num_tokens, first.first_seq, first.last_seq) == (0, 70, 5, 8)
    assert (second.first_token, second.num_tokens, second.first_seq, second.last_seq) == (70, 50, 9, 11)
    assert (second.num_frames, second.num_padded) == (3, 1)
    assert (second.first_ns, second.last_ns) == (2_000_001_000, 3_000_001_000)
    assert ledger.num_newest_tokens == 50


def test_the_present_sums_up_the_records():
    ledger = Ledger()
    ledger.append(chunk(5, num=4), 70, LayoutState(80))
    ledger.append(chunk(9, num=4, num_padded=1, first_ns=2_000_000_000), 50, LayoutState(130))
    now = ledger.now
    assert (now.num_tokens, now.num_chunks, now.num_frames, now.num_padded) == (120, 2, 7, 1)
    assert (now.oldest_ns, now.newest_ns, now.newest_seq) == (1000, 3_000_001_000, 11)
    assert now.layout == LayoutState(130)
    assert now.seconds == 3.0


def test_one_image_is_zero_seconds_of_memory():
    ledger = Ledger()
    ledger.append(chunk(num=1), 9, LayoutState(9, is_empty=False))
    assert ledger.now.seconds == 0.0


def test_a_snapshot_is_not_changed_by_what_comes_later():
    ledger = Ledger()
    ledger.append(chunk(), 10, LayoutState(10))
    snapshot = ledger.now
    ledger.append(chunk(2), 10, LayoutState(20))
    ledger.reset()
    assert snapshot.num_tokens == 10 and snapshot.newest_seq == 1


def test_frames_that_looked_like_the_newest_extend_what_was_seen_until_the_next_chunk():
    ledger = Ledger()
    ledger.append(chunk(), 10, LayoutState(10))
    assert ledger.now.seen_until_ns is None
    ledger.note_unchanged(Unchanged(500_000_000, until_ns=9_000))
    ledger.mark("still")
    ledger.append(chunk(2, first_ns=1_000_000_000), 10, LayoutState(20))
    assert ledger.now.seen_until_ns is None
    ledger.rollback("still")
    assert ledger.now.seen_until_ns == 9_000


def test_what_looked_like_a_chunk_on_its_way_counts_once_it_is_there():
    ledger = Ledger()
    ledger.append(chunk(), 10, LayoutState(10))
    ledger.note_unchanged(Unchanged(1_500_000_000, until_ns=9_000))
    assert ledger.now.seen_until_ns is None
    ledger.append(chunk(2, first_ns=1_000_000_000), 10, LayoutState(20))
    assert ledger.now.seen_until_ns == 9_000


def test_what_looked_like_a_chunk_that_was_forgotten_says_nothing_of_what_is_left():
    ledger = Ledger()
    for i in range(2):
        ledger.append(chunk(2 * i, first_ns=i * 1_000_000_000), 10, LayoutState(10))
    ledger.note_unchanged(Unchanged(1_500_000_000, until_ns=9_000))
    ledger.mark("here")
    ledger.append(chunk(4, first_ns=2_000_000_000), 10, LayoutState(10))
    ledger.forget([0, 2])
    assert ledger.marks["here"].seen_until_ns is None


def test_dropped_tokens_are_counted_beside_those_that_are_there():
    ledger = Ledger()
    ledger.append(chunk(), 10, LayoutState(30), num_dropped=20)
    ledger.append(chunk(2, first_ns=1_000_000_000), 5, LayoutState(60), num_dropped=25)
    assert (ledger.now.num_tokens, ledger.now.num_dropped, ledger.num_newest_tokens) == (15, 45, 30)
    ledger.forget([1])
    assert (ledger.now.num_tokens, ledger.now.num_dropped) == (5, 45)


@pytest.mark.parametrize("verb", ["rollback", "delete_mark"])
def test_an_unknown_mark_is_an_error_and_changes_nothing(verb: str):
    ledger = Ledger()
    ledger.append(chunk(), 10, LayoutState(10))
    ledger.mark("here")
    with pytest.raises(KeyError):
        getattr(ledger, verb)("there")
    assert ledger.now.num_tokens == 10 and list(ledger.marks) == ["here"]


names = st.sampled_from(["a", "b", "c"])


class LedgerAgreesWithItsRecords(RuleBasedStateMachine):
    """A ledger beside a plain model of it: a list of chunks, and for each mark the list as it was."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.chunks: list[tuple[Chunk, int, LayoutState]] = []
        self.marks: dict[str, tuple[list, Snapshot]] = {}
        self.seq = 0

    @rule(num=st.sampled_from([1, 2, 4]), padded=st.booleans(), tokens=st.integers(1, 100))
    def append(self, num: int, padded: bool, tokens: int) -> None:
        new = chunk(self.seq, num, int(padded and num > 1), self.seq * 500_000_000)
        layout = LayoutState(self.ledger.now.layout.next_position + tokens, is_empty=False)
        self.ledger.append(new, tokens, layout)
        self.chunks.append((new, tokens, layout))
        self.seq += num

    @rule(name=names)
    def mark(self, name: str) -> None:
        self.marks[name] = (list(self.chunks), self.ledger.mark(name))

    @precondition(lambda self: self.marks)
    @rule(name=names)
    def delete_mark(self, name: str) -> None:
        if name in self.marks:
            self.ledger.delete_mark(name)
            del self.marks[name]

    @precondition(lambda self: self.marks)
    @rule(name=names)
    def rollback(self, name: str) -> None:
        if name in self.marks:
            self.ledger.rollback(name)
            self.chunks = list(self.marks[name][0])
            self.marks = {n: m for n, m in self.marks.items() if len(m[0]) <= len(self.chunks)}

    @rule()
    def reset(self) -> None:
        self.ledger.reset()
        self.chunks, self.marks = [], {}

    @invariant()
    def records_and_snapshot_agree(self) -> None:
        now, records = self.ledger.now, self.ledger.records
        assert now.num_chunks == len(records) == len(self.chunks)
        assert now.num_tokens == sum(record.num_tokens for record in records)
        assert now.num_frames == sum(record.num_frames for record in records)
        assert now.num_padded == sum(record.num_padded for record in records)
        assert [r.first_token for r in records] == list(np.cumsum([0, *(r.num_tokens for r in records)])[:-1])
        assert [r.first_seq for r in records] == [c.pictures[0].seq for c, _, _ in self.chunks]
        assert now.layout == (self.chunks[-1][2] if self.chunks else LayoutState())
        assert now.newest_seq == (records[-1].last_seq if records else None)
        assert now.oldest_ns == (records[0].first_ns if records else None)
        assert now.newest_ns == (records[-1].last_ns if records else None)

    @invariant()
    def marks_are_as_they_were_made(self) -> None:
        assert self.ledger.marks == {name: snapshot for name, (_, snapshot) in self.marks.items()}


TestLedgerAgreesWithItsRecords = LedgerAgreesWithItsRecords.TestCase
TestLedgerAgreesWithItsRecords.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
