from timelines import at, told

from onlooker.tools.timeline import MAX_SPANS, thinned


def test_each_span_holds_what_was_added_since_the_record_before() -> None:
    timeline = told(at(1, 4, 4), at(2, 8, 8, ring_full=3), at(3, 8, 8, ring_full=3, sampled_out=2))
    assert [(span.encoded, span.lost, span.skipped) for span in timeline.spans] == [(4, 0, 0), (4, 3, 0), (0, 0, 2)]
    assert [(span.start_s, span.end_s) for span in timeline.spans] == [(1, 1), (1, 2), (2, 3)]


def test_a_record_that_adds_nothing_makes_no_span() -> None:
    assert len(told(at(1, 4, 4), at(2, 4, 4), at(3, 4, 4)).spans) == 1


def test_what_came_in_last_is_forgotten_first_at_a_rollback() -> None:
    timeline = told(at(1, 4, 4), at(2, 8, 8), at(3, 8, 6))
    assert [span.remembered for span in timeline.spans] == [4, 2]


def test_what_came_in_first_is_forgotten_where_the_beginning_of_the_memory_moves() -> None:
    timeline = told(at(1, 4, 4, oldest_ns=0), at(2, 8, 6, oldest_ns=2))
    assert [span.remembered for span in timeline.spans] == [2, 4]


def test_after_a_reset_only_what_came_since_is_remembered() -> None:
    timeline = told(at(1, 4, 4), at(2, 8, 0), at(3, 10, 2, oldest_ns=9))
    assert [span.remembered for span in timeline.spans] == [0, 0, 2]


def test_counters_that_fall_are_those_of_a_node_that_remembers_nothing() -> None:
    timeline = told(at(1, 40, 40), at(2, 4, 4))
    assert [(span.encoded, span.remembered) for span in timeline.spans] == [(40, 0), (4, 4)]


def test_a_long_timeline_grows_coarser_and_loses_no_frame() -> None:
    timeline = told(*(at(second, second, second, sampled_out=2 * second) for second in range(1, 2001)))
    assert len(timeline.spans) <= MAX_SPANS
    assert timeline.num_remembered == 2000
    assert sum(span.skipped for span in timeline.spans) == 4000
    assert (timeline.spans[-1].end_s, timeline.spans[-1].encoded) == (2000, 1)


def test_what_came_before_the_first_record_stays_apart() -> None:
    timeline = told(*(at(second, 500 + second, 500 + second) for second in range(1, 2001)))
    assert [span.encoded for span in timeline.spans if span.is_earlier] == [501]


def test_the_rate_of_kept_frames_is_that_of_the_last_seconds() -> None:
    timeline = told(*(at(second, 2 * second, 2 * second) for second in range(1, 20)), at(20, 38, 38), at(21, 38, 38))
    assert timeline.fps_kept == 2 / 3
    assert told(at(1, 4, 4)).fps_kept is None


def test_thinned_lists_keep_the_newest() -> None:
    assert thinned([1, 2, 3], 3) == [1, 2, 3]
    assert thinned([1, 2, 3, 4], 3) == [2, 4]
    assert thinned([1, 2, 3, 4, 5], 3) == [1, 3, 5]
