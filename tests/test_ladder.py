"""Steps down and up, by values and times alone."""

from dataclasses import replace

import pytest

from onlooker.node.ladder import Bounds, Ladder, Seen
from onlooker.node.options import StreamOptions
from onlooker.protocol.messages import RetentionName

BOUNDS = Bounds(max_lag_ms=1000.0, min_free_bytes=100, settle_s=5.0, recover_s=60.0, recover_load=0.5)
OPTIONS = StreamOptions("front", fps=4.0)
WELL = Seen(num_encoded=0, num_ring_full=0, num_out_of_memory=0, lag_ms=10.0, load=0.1, free_bytes=None)
ALL = ["frame_rate", "gate", "drop", "encode_size"]


def late(num_encoded: int) -> Seen:
    return replace(WELL, lag_ms=1500.0, num_encoded=num_encoded)


def gone_down(ladder: Ladder, now: float = 0.0) -> list[str]:
    """The rungs of all steps down, one every 5 s, while chunks are late."""
    ladder.look(now, WELL)
    steps = [ladder.look(now + 5 * i, late(i)) for i in range(1, 11)]
    return [step.rung for step in steps if step]


def test_while_all_is_well_nothing_is_given_up():
    ladder = Ladder(OPTIONS, BOUNDS)
    assert [ladder.look(float(now), WELL) for now in range(0, 300, 10)] == [None] * 30


def test_rungs_are_gone_down_in_order_and_no_further_than_the_last():
    ladder = Ladder(OPTIONS, BOUNDS)
    assert gone_down(ladder) == ladder.taken == ALL


def test_each_step_leaves_the_one_before_time_to_work():
    ladder = Ladder(OPTIONS, BOUNDS)
    ladder.look(0.0, WELL)
    steps = [ladder.look(1.0 + now, late(now + 1)) for now in range(12)]
    assert [i for i, step in enumerate(steps) if step] == [0, 5, 10]


def test_what_is_given_up_is_what_the_rungs_say():
    ladder = Ladder(OPTIONS, BOUNDS)
    gone_down(ladder)
    step = ladder.relieve(100.0)
    assert step == []  # there is nothing left
    lowest = ladder._efforts[-1]
    assert (lowest.fps, lowest.gate, lowest.drop, lowest.encode_scale) == (2.0, 10.0, 0.9, 0.5)
    assert lowest == replace(OPTIONS, fps=2.0, gate=10.0, drop=0.9, encode_scale=0.5)


def test_the_last_frames_are_shown_whole_on_every_rung():
    ladder = Ladder(replace(OPTIONS, last_frames=8), BOUNDS)
    assert gone_down(ladder) == ["frame_rate", "gate", "encode_size"]


def test_without_a_rate_every_other_frame_is_kept():
    ladder = Ladder(StreamOptions("front", stride=3), BOUNDS)
    ladder.look(0.0, WELL)
    step = ladder.look(1.0, late(1))
    assert step and step.options.stride == 6 and step.options.fps is None


def test_what_a_stream_does_from_the_start_is_no_step():
    ladder = Ladder(replace(OPTIONS, gate=3.0, drop=0.95), BOUNDS)
    assert gone_down(ladder) == ["frame_rate", "encode_size"]
    assert ladder._efforts[-1].gate == 3.0


def test_a_step_up_needs_a_while_without_shortage_and_begins_with_the_last_rung():
    ladder = Ladder(OPTIONS, BOUNDS)
    gone_down(ladder)
    steps = [(now, step) for now in range(100, 400, 10) if (step := ladder.look(float(now), WELL))]
    assert [(now, step.rung, step.is_down) for now, step in steps] == [
        (160, "encode_size", False),
        (230, "drop", False),  # it is seen to be well anew
        (300, "gate", False),
        (370, "frame_rate", False),
    ]
    assert steps[-1][1].options == OPTIONS and ladder.taken == []


@pytest.mark.parametrize(
    "seen",
    [replace(WELL, load=0.6), replace(WELL, free_bytes=150)],
    ids=["no time for twice as much", "hardly memory enough"],
)
def test_there_is_no_step_up_where_there_is_just_enough(seen: Seen):
    ladder = Ladder(OPTIONS, BOUNDS)
    gone_down(ladder)
    assert not any(ladder.look(float(now), seen) for now in range(100, 1000, 10))
    assert ladder.taken == ALL


def test_the_while_begins_anew_with_each_shortage():
    ladder = Ladder(OPTIONS, BOUNDS)
    ladder.look(0.0, WELL)
    ladder.look(1.0, late(1))
    assert ladder.look(50.0, replace(WELL, num_encoded=2)) is None
    assert ladder.look(60.0, late(3)) is not None
    assert ladder.look(115.0, replace(WELL, num_encoded=4)) is None
    assert ladder.look(174.0, replace(WELL, num_encoded=5)) is None
    assert ladder.look(175.0, replace(WELL, num_encoded=5)) is not None


@pytest.mark.parametrize(
    ("seen", "reason"),
    [
        (replace(WELL, num_ring_full=1), "ring_full"),
        (replace(WELL, free_bytes=99), "device_memory"),
        (replace(WELL, num_out_of_memory=1), "out_of_memory"),
        (late(1), "lag"),
    ],
)
def test_the_reason_is_told(seen: Seen, reason: str):
    ladder = Ladder(OPTIONS, BOUNDS)
    ladder.look(0.0, WELL)
    step = ladder.look(1.0, seen)
    assert step and (step.is_down, step.rung, step.reason) == (True, "frame_rate", reason)


def test_what_was_lost_before_the_first_look_is_over():
    assert Ladder(OPTIONS, BOUNDS).look(0.0, replace(WELL, num_ring_full=9, num_out_of_memory=9)) is None


def test_an_old_lag_of_a_stream_that_stands_still_is_no_reason():
    ladder = Ladder(OPTIONS, BOUNDS)
    assert [ladder.look(float(now), late(7)) for now in range(10)] == [None] * 10


def test_a_camera_whose_clock_is_slow_is_not_late():
    ladder = Ladder(OPTIONS, BOUNDS)
    assert [ladder.look(float(now), late(now)) for now in range(10)] == [None] * 10
    assert ladder.look(10.0, replace(late(11), lag_ms=2600.0)) is not None


@pytest.mark.parametrize(("retention", "saving"), [("stop", []), ("window", ["thin", "newest"])])
def test_nothing_is_given_up_for_device_memory_that_saves_none(retention: RetentionName, saving: list[str]):
    ladder = Ladder(replace(OPTIONS, retention=retention), BOUNDS)
    short = replace(WELL, free_bytes=99)
    steps = [ladder.look(10.0 * now, short) for now in range(20)]
    assert [step.rung for step in steps if step] == [*ALL, *saving]  # smaller chunks, then less storage


def test_a_rung_that_saves_no_memory_is_no_answer_to_want_of_it():
    ladder = Ladder(replace(OPTIONS, retention="stop"), BOUNDS)
    assert gone_down(ladder) == ALL
    assert ladder.look(300.0, replace(WELL, free_bytes=99)) is None


@pytest.mark.parametrize("retention", ["window", "thin"])
def test_a_memory_that_forgets_by_and_by_is_thinned_and_then_holds_the_newest_alone(retention: RetentionName):
    ladder = Ladder(replace(OPTIONS, retention=retention), BOUNDS)
    assert gone_down(ladder) == [*ALL, "thin", "newest"]
    shares = [(effort.retention, effort.memory_share) for effort in ladder._efforts]
    assert shares[-3:] == [(retention, 1.0), ("thin", 0.5), ("window", 0.125)]


def test_out_of_memory_goes_down_at_once_to_where_a_chunk_takes_less():
    ladder = Ladder(OPTIONS, BOUNDS)
    steps = ladder.relieve(0.0)
    assert [(step.rung, step.reason) for step in steps] == [(rung, "out_of_memory") for rung in ALL]
    assert steps[-1].options.encode_scale == 0.5 and ladder.taken == ALL
