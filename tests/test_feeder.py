import threading
from collections.abc import Callable, Iterator

import cv2
import numpy as np
import pytest
from deadline import until
from fakes import FakeEngine

from onlooker.node.feeder import Feeder, num_decoders_for
from onlooker.node.options import StreamOptions
from onlooker.node.picture_decoder import decode_picture
from onlooker.node.stream_intake import MAX_DECODING_BYTES, Batch, StreamIntake
from onlooker.protocol.codec import Buffer, ReceivedFrame
from onlooker.protocol.messages import FrameHeader

JPEG = cv2.imencode(".jpg", np.zeros((8, 16, 3), np.uint8))[1].tobytes()


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    with FakeEngine() as engine:
        yield engine


@pytest.fixture
def feeder(engine: FakeEngine) -> Iterator[Feeder]:
    feeder = Feeder(engine)
    feeder.start()
    yield feeder
    feeder.close()


def open_stream(engine: FakeEngine, feeder: Feeder, **options) -> StreamIntake:
    stream = StreamOptions(**{"name": "front", "chunk_frames": 2} | options)
    engine.add_stream(stream).result(1)
    intake = StreamIntake(stream)
    feeder.add(intake)
    return intake


def send(feeder: Feeder, intake: StreamIntake, *seqs: int, payload: bytes = JPEG, eos: bool = False, **fields) -> None:
    for seq in seqs:
        header = FrameHeader(
            session="s", stream=intake.name, ts=seq * 40_000_000, enc="" if eos else "jpeg", eos=eos, **fields
        )
        intake.receive(ReceivedFrame(header, seq, payload))
        feeder.wake()


def test_frames_become_memory_in_order(engine: FakeEngine, feeder: Feeder):
    front = open_stream(engine, feeder)
    send(feeder, front, *range(10))
    until(lambda: front.counters().encoded == 10)
    assert [picture.seq for picture in engine.pictures("front")] == list(range(10))
    assert engine.pictures("front")[0].size == (16, 8)


def test_a_slow_engine_makes_the_ring_drop_the_oldest_and_never_more_than_two_chunks_wait(
    engine: FakeEngine, feeder: Feeder
):
    front = open_stream(engine, feeder, ring_frames=4)
    engine.hold()
    send(feeder, front, *range(4))
    until(lambda: engine.num_waiting == 2)
    send(feeder, front, *range(4, 20))
    assert front.counters().dropped == {"ring_full": 12}
    engine.let_go()
    until(lambda: front.counters().pending == 0)
    assert [picture.seq for picture in engine.pictures("front")] == [0, 1, 2, 3, 16, 17, 18, 19]


def test_a_full_engine_counts_what_it_refuses_and_goes_on_when_there_is_room(engine: FakeEngine, feeder: Feeder):
    front = open_stream(engine, feeder)
    engine.capacity_tokens = 16
    send(feeder, front, *range(8))
    until(lambda: front.counters().dropped == {"memory_full": 4})
    send(feeder, front, *range(8, 60))
    until(lambda: front.counters().dropped == {"memory_full": 56})
    engine.reset("front").result(1)
    send(feeder, front, 60, 61)
    until(lambda: front.counters().encoded == 6)


def test_broken_pictures_are_dropped_and_the_others_come_through(engine: FakeEngine, feeder: Feeder):
    front = open_stream(engine, feeder)
    send(feeder, front, 0, 1)
    send(feeder, front, 2, payload=JPEG[:-40])
    send(feeder, front, 3, w=17)
    send(feeder, front, 4, 5)
    until(lambda: front.counters().encoded == 4)
    assert front.counters().dropped == {"decode_error": 1, "bad_size": 1}


def test_a_new_picture_size_is_a_new_chunk(engine: FakeEngine, feeder: Feeder):
    front = open_stream(engine, feeder, chunk_frames=4)
    wide = cv2.imencode(".png", np.zeros((8, 32, 3), np.uint8))[1].tobytes()
    send(feeder, front, 0, 1, 2)
    for seq in (3, 4):
        header = FrameHeader(session="s", stream="front", ts=seq * 40_000_000, enc="png")
        front.receive(ReceivedFrame(header, seq, wide))
    send(feeder, front, 5, eos=True)
    until(lambda: front.counters().encoded == 5)
    assert [(chunk.size, chunk.num_frames) for chunk in engine.chunks("front")] == [((16, 8), 3), ((32, 8), 2)]


@pytest.mark.parametrize("error", [RuntimeError("the device is lost"), ValueError("bad")])
def test_an_engine_that_fails_costs_the_chunk_alone(engine: FakeEngine, feeder: Feeder, error, caplog):
    front = open_stream(engine, feeder)
    engine.fail_encode = error
    send(feeder, front, 0, 1)
    until(lambda: front.counters().dropped == {"encode_error": 2})
    engine.fail_encode = None
    send(feeder, front, 2, 3)
    until(lambda: front.counters().encoded == 2)
    assert str(error) in caplog.text


def test_a_stream_with_a_gate_keeps_a_still_picture_once_and_tells_the_engine(engine: FakeEngine, feeder: Feeder):
    front = open_stream(engine, feeder, gate=10.0)
    send(feeder, front, *range(6))
    until(lambda: front.counters().dropped == {"gated": 4} and "front" in engine.unchanged)
    until(lambda: engine.unchanged["front"].until_ns == 5 * 40_000_000)
    assert [picture.seq for picture in engine.pictures("front")] == [0, 1]


def test_an_engine_that_raises_at_once_is_counted_too(engine: FakeEngine, feeder: Feeder, caplog):
    front = open_stream(engine, feeder)
    engine.on_encode = lambda stream: 1 / 0
    send(feeder, front, 0, 1, 2, 3)
    until(lambda: front.counters().dropped == {"encode_error": 4})
    assert "ZeroDivisionError" in caplog.text


def test_when_frames_are_rationed_all_streams_get_their_share(engine: FakeEngine):
    feeder = Feeder(engine, num_decoders=1)  # 8 frames a turn
    intakes = [open_stream(engine, feeder, name=name, chunk_frames=8) for name in ("one", "two", "three")]
    encoded: list[str] = []
    engine.on_encode = encoded.append
    for intake in intakes:
        send(feeder, intake, *range(64))
    feeder.start()
    until(lambda: len(encoded) == 24)
    feeder.close()
    assert {frozenset(encoded[n : n + 3]) for n in range(0, 6, 3)} == {frozenset(["one", "two", "three"])}


@pytest.mark.parametrize(("num_cores", "num_decoders"), [(1, 3), (2, 3), (8, 4), (16, 8), (256, 12)])
def test_half_of_the_cores_decode_within_bounds(num_cores: int, num_decoders: int):
    assert num_decoders_for(num_cores) == num_decoders


class HeldDecoder:
    """Decodes, but the pictures of one stream only once it is told to."""

    def __init__(self, held: str) -> None:
        self.held = held
        self.may_go_on = threading.Event()
        self.num_held = 0

    def __call__(self, header: FrameHeader, payload: Buffer) -> np.ndarray:
        if header.stream == self.held:
            self.num_held += 1
            assert self.may_go_on.wait(10)
        return decode_picture(header, payload)


@pytest.fixture
def held() -> Iterator[HeldDecoder]:
    decoder = HeldDecoder("slow")
    yield decoder
    decoder.may_go_on.set()


def test_a_slow_picture_holds_up_its_own_stream_alone(engine: FakeEngine, held: HeldDecoder):
    feeder = Feeder(engine, decode=held)
    feeder.start()
    slow, front = (open_stream(engine, feeder, name=name, chunk_frames=4) for name in ("slow", "front"))
    send(feeder, slow, *range(12))
    until(lambda: held.num_held == 2)  # one decoder is left to the others
    send(feeder, front, *range(40))
    until(lambda: front.counters().encoded == 40)
    counters = slow.counters()
    assert (counters.pending, counters.encoded, counters.dropped) == (12, 0, {})
    held.may_go_on.set()
    until(lambda: slow.counters().encoded == 12)
    assert [picture.seq for picture in engine.pictures("slow")] == list(range(12))
    assert [picture.seq for picture in engine.pictures("front")] == list(range(40))
    feeder.close()


class CountingIntake(StreamIntake):
    """Counts how often it was asked for frames."""

    num_asked = 0

    def take(self, max_frames: int, is_full: Callable[[], bool], max_bytes: int = MAX_DECODING_BYTES) -> Batch | None:
        self.num_asked += 1
        return super().take(max_frames, is_full, max_bytes)


def test_pictures_being_decoded_are_bounded_in_bytes(engine: FakeEngine, held: HeldDecoder):
    num_bytes = 8 * 16 * 3
    feeder = Feeder(engine, decode=held, max_decoding_bytes=2 * num_bytes)
    slow, front = (open_stream(engine, feeder, name=name, chunk_frames=8) for name in ("slow", "front"))
    send(feeder, slow, *range(8))
    feeder.start()
    until(lambda: held.num_held == 2)
    send(feeder, front, *range(8))
    last = CountingIntake(StreamOptions("last"))
    feeder.add(last)
    until(lambda: last.num_asked)  # the feeder has been at the front stream before
    assert (slow.counters().kept, front.counters().kept) == (2, 0)
    held.may_go_on.set()
    until(lambda: front.counters().encoded == slow.counters().encoded == 8)
    feeder.close()


def test_closing_does_not_wait_for_a_slow_picture(engine: FakeEngine, held: HeldDecoder):
    feeder = Feeder(engine, decode=held)
    feeder.start()
    slow = open_stream(engine, feeder, name="slow")
    send(feeder, slow, 0, 1)
    until(lambda: held.num_held == 2)
    feeder.close()
    assert held.num_held == 2


class BrokenIntake(StreamIntake):
    """Fails whenever it is asked for frames."""

    def take(self, max_frames: int, is_full: Callable[[], bool], max_bytes: int = MAX_DECODING_BYTES) -> Batch | None:
        raise ZeroDivisionError("a defect")


def test_a_stream_that_fails_costs_the_others_nothing(engine: FakeEngine, caplog):
    feeder = Feeder(engine)
    one = open_stream(engine, feeder, name="one")
    feeder.add(BrokenIntake(StreamOptions("broken")))
    two = open_stream(engine, feeder, name="two")
    for intake in (one, two):
        send(feeder, intake, *range(10))
    feeder.start()
    until(lambda: one.counters().encoded == two.counters().encoded == 10)
    assert "stream broken: a turn of the feeder failed" in caplog.text
    feeder.close()


def test_frames_that_no_thread_can_be_had_for_are_accounted_for(engine: FakeEngine, caplog):
    feeder = Feeder(engine)
    feeder._decoders.shutdown()
    feeder.start()
    front = open_stream(engine, feeder)
    send(feeder, front, 0, 1, 2)
    until(lambda: front.counters().dropped == {"decode_error": 3})
    assert "frames cannot be decoded" in caplog.text
    feeder.close()


def test_closing_does_not_wait_for_the_engine(engine: FakeEngine):
    feeder = Feeder(engine)
    feeder.start()
    front = open_stream(engine, feeder)
    engine.hold()
    send(feeder, front, *range(20))
    until(lambda: engine.num_waiting == 2)
    feeder.close()
    assert engine.num_waiting == 2
    engine.let_go()


def test_a_feeder_that_was_never_started_can_be_closed(engine: FakeEngine):
    Feeder(engine).close()
