from hypothesis import given
from hypothesis import strategies as st

from onlooker.node.sequence import SequenceWindow


def place(*seqs: int) -> tuple[list[str], SequenceWindow]:
    window = SequenceWindow()
    return [window.place(seq) for seq in seqs], window


def test_numbers_in_order_leave_no_gap():
    assert place(7, 8, 9)[0] == ["next"] * 3
    assert place(7, 8, 9)[1].num_missing == 0


def test_a_gap_is_counted_in_numbers():
    assert place(0, 5, 7)[1].num_missing == 5


def test_the_same_again_is_a_duplicate_and_a_late_one_is_out_of_order():
    placed, window = place(1, 2, 4, 2, 3, 3)
    assert placed == ["next", "next", "next", "duplicate", "out_of_order", "duplicate"]
    assert window.num_missing == 0


def test_what_is_older_than_the_first_was_never_missed():
    placed, window = place(5, 3)
    assert placed == ["next", "out_of_order"]
    assert window.num_missing == 0


def test_a_leap_through_all_numbers_costs_no_memory():
    placed, window = place(0, 2**64 - 1, 2**63)
    assert placed == ["next", "next", "out_of_order"]
    assert window.num_missing == 2**64 - 2


@given(st.lists(st.integers(0, 40), min_size=1, max_size=80))
def test_it_agrees_with_a_set_of_all_that_came(seqs: list[int]):
    placed, window = place(*seqs)
    came: set[int] = set()
    for seq, verdict in zip(seqs, placed, strict=True):
        expected = "duplicate" if seq in came else "next" if all(seq > other for other in came) else "out_of_order"
        assert verdict == expected
        came.add(seq)
    assert window.num_missing == len(set(range(seqs[0], max(came) + 1)) - came)
