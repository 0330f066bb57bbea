"""Every frame is accounted for, whatever order things happen in."""

import threading
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import UNSET, structs

from onlooker.node.chunk import Chunk, ChunkRefused, Encoded, Unchanged
from onlooker.node.frame_gate import thumbnail
from onlooker.node.options import StreamOptions
from onlooker.node.picture_decoder import PictureError
from onlooker.node.stream_intake import Batch, Decoded, StreamIntake
from onlooker.protocol.codec import ReceivedFrame
from onlooker.protocol.messages import CacheInfo, FrameCounters, FrameHeader, StreamStats

MS = 1_000_000
PIXELS = np.zeros((2, 4, 3), np.uint8)
BRIGHT = np.full((2, 4, 3), 200, np.uint8)
ENCODED = Encoded(8, (28, 28), preprocess_ms=1.0, vision_ms=2.0, prefill_ms=3.0)
CACHE = CacheInfo(
    num_tokens=0,
    capacity_tokens=0,
    logical_bytes=0,
    resident_bytes=0,
    bytes_per_token=0,
    num_chunks=0,
    num_frames=0,
    num_padded_frames=0,
    positions_used=0,
)


@dataclass
class Bench:
    """A stream whose every step is taken by hand; time stands still unless it is moved."""

    options: StreamOptions
    max_in_flight: int
    now: float = 0.0
    session: str = "a"
    seq: int = 0
    ts: int = 0
    is_full: bool = False
    in_flight: list[tuple[Chunk, Future[Encoded]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.intake = StreamIntake(self.options, max_in_flight=self.max_in_flight, now=lambda: self.now)

    def send(
        self, num: int = 1, *, eos: bool = False, step_ms: int = 40, payload: bytes = b"x", enc: str = "jpeg", **fields
    ) -> None:
        for _ in range(num):
            enc = "" if eos else enc
            header = FrameHeader(session=self.session, stream="front", ts=self.ts, enc=enc, eos=eos, **fields)
            self.intake.receive(ReceivedFrame(header, self.seq, b"" if eos else payload))
            self.seq += 1
            self.ts += step_ms * MS

    def take(self, max_bytes: int = 1 << 20) -> Batch | None:
        return self.intake.take(99, lambda: self.is_full, max_bytes)

    def give_back(self, batch: Batch | None, result: np.ndarray | PictureError = PIXELS) -> None:
        if batch is not None:
            has_gate = self.options.gate is not None
            view = thumbnail(result) if has_gate and isinstance(result, np.ndarray) else None
            decoded = Decoded(result, 1.0, view)
            self.intake.give_back(batch, [decoded] * len(batch.frames))

    def show(self, *pictures: np.ndarray, step_ms: int = 40) -> None:
        """Send pictures one by one, each decoded before the next comes."""
        for picture in pictures:
            self.send(step_ms=step_ms)
            self.give_back(self.take(), picture)
            self.submit()

    def unchanged(self) -> Unchanged | None:
        """What the engine would be told."""
        told: list[Unchanged] = []
        self.intake.tell_unchanged(told.append)
        return told[0] if told else None

    @property
    def seqs_in_flight(self) -> list[list[int]]:
        return [[picture.seq for picture in chunk.pictures] for chunk, _ in self.in_flight]

    def submit(self) -> list[Chunk]:
        def encode(chunk: Chunk) -> Future[Encoded]:
            self.in_flight.append((chunk, Future()))
            return self.in_flight[-1][1]

        return [chunk for chunk, _ in self.intake.submit(encode)]

    def settle(self, error: Exception | None = None, done_ns: int = 0) -> None:
        chunk, future = self.in_flight.pop(0)
        if error is None:
            future.set_result(ENCODED)
        else:
            future.set_exception(error)
        self.intake.settle(chunk, future, done_ns)

    def run(self) -> list[list[int]]:
        """Carry everything through; the sequence numbers of the chunks that were encoded."""
        encoded = []
        while (batch := self.take()) is not None or self.in_flight or self.submit():
            self.give_back(batch)
            self.submit()
            while self.in_flight:
                encoded.append([picture.seq for picture in self.in_flight[0][0].pictures])
                self.settle()
        return encoded

    def reset(self) -> None:
        done: Future[CacheInfo] = Future()
        done.set_result(CACHE)
        assert self.intake.reset(lambda: done) is done

    def rollback(self) -> None:
        done: Future[CacheInfo] = Future()
        done.set_result(CACHE)
        assert self.intake.rollback(lambda: done) is done

    @property
    def counters(self) -> FrameCounters:
        return self.intake.counters()

    @property
    def stats(self) -> StreamStats:
        return self.intake.stats(CACHE)


def bench(max_in_flight: int = 2, **options) -> Bench:
    return Bench(StreamOptions(**{"name": "front", "chunk_frames": 2, "ring_frames": 8} | options), max_in_flight)


def accounted(counters: FrameCounters) -> int:
    return sum(counters.dropped.values()) + counters.encoded + counters.pending


def test_frames_become_chunks_in_order():
    front = bench()
    front.send(5)
    assert front.run() == [[0, 1], [2, 3]]
    counters = front.counters
    assert (counters.received, counters.kept, counters.encoded, counters.pending) == (5, 5, 4, 1)
    assert (counters.dropped, counters.last_seq, counters.last_session) == ({}, 4, "a")


def test_a_ring_that_is_full_drops_the_oldest():
    front = bench(ring_frames=4)
    front.send(7)
    assert front.counters.dropped == {"ring_full": 3}
    assert front.run() == [[3, 4], [5, 6]]


def test_a_ring_that_is_full_of_bytes_drops_the_oldest():
    front = bench(ring_bytes=10)
    front.send(2, payload=bytes(3))
    front.send(payload=bytes(7))
    front.send(payload=bytes(3))
    assert front.counters.dropped == {"ring_full": 2}
    assert front.run() == [[2, 3]]


def test_a_frame_larger_than_the_ring_is_too_large_and_costs_no_other():
    front = bench(ring_bytes=10)
    front.send(payload=bytes(10))
    front.send(payload=bytes(11))
    assert front.counters.dropped == {"too_large": 1}
    assert front.counters.pending == 1


def test_a_publisher_with_less_than_a_ring_in_flight_loses_nothing():
    front = bench(ring_frames=8, max_in_flight=1)
    for _ in range(50):
        while front.counters.pending < 7:
            front.send()
        front.give_back(front.take())
        front.submit()
        if front.in_flight:
            front.settle()
    assert front.counters.dropped == {}


def test_no_more_chunks_are_in_flight_than_allowed():
    front = bench(max_in_flight=2)
    front.send(8)
    for _ in range(4):
        front.give_back(front.take())
        front.submit()
    assert len(front.in_flight) == 2
    assert front.take() is None
    front.settle()
    assert front.take() is not None


def test_chunks_of_many_sizes_wait_their_turn_too():
    front = bench(chunk_frames=4, max_in_flight=1)
    front.send(4)
    batch = front.take()
    assert batch is not None
    sizes = [Decoded(np.zeros((2, width, 3), np.uint8), 1.0) for width in (4, 8, 4, 8)]
    front.intake.give_back(batch, sizes)
    assert [len(front.submit()) for _ in range(2)] == [1, 0]
    assert front.take() is None and front.counters.pending == 4
    front.settle()
    assert front.run() == [[1, 1], [2, 2]]
    assert front.counters.pending == 1


def test_the_end_of_a_stream_flushes_what_is_left_after_all_earlier_frames():
    front = bench(chunk_frames=4)
    front.send(7)
    front.send(eos=True)
    assert front.run() == [[0, 1, 2, 3], [4, 5, 6, 6]]
    assert (front.counters.received, front.counters.encoded, front.counters.padded) == (7, 7, 1)
    assert (front.stats.state, front.counters.last_seq) == ("ended", 7)


def test_forgotten_frames_are_counted_and_stay_a_part_of_the_encoded():
    front = bench(chunk_frames=2)
    front.send(2)
    front.give_back(front.take())
    front.submit()
    ((chunk, future),) = front.in_flight
    future.set_result(replace(ENCODED, num_forgotten_frames=3))
    front.intake.settle(chunk, future, 0)
    assert (front.counters.received, front.counters.encoded, front.counters.forgotten) == (2, 2, 3)
    assert front.stats.retention == "stop"


def test_an_even_rest_at_the_end_is_not_padded():
    front = bench(chunk_frames=4)
    front.send(2)
    front.send(eos=True)
    assert front.run() == [[0, 1]]
    assert front.counters.padded == 0


def test_an_end_that_the_ring_lets_go_of_still_ends_the_stream_before_the_next_begins():
    front = bench(chunk_frames=4, ring_frames=2)
    front.send(1)
    front.give_back(front.take())
    front.send(eos=True)
    front.session, front.seq = "b", 100
    front.send(2)
    assert front.counters.dropped == {}
    assert front.run() == [[0, 0]]
    front.send(2)
    assert front.run() == [[100, 101, 102, 103]]


def test_a_stream_is_not_over_while_a_chunk_is_on_its_way():
    front = bench()
    front.send(2)
    front.send(eos=True)
    front.give_back(front.take())
    front.submit()
    front.give_back(front.take())
    assert front.stats.state == "online"
    front.settle()
    assert front.stats.state == "ended"


def test_what_the_sampler_leaves_out_is_counted_and_not_decoded():
    front = bench(stride=3)
    front.send(7)
    assert front.run() == [[0, 3]]
    assert (front.counters.kept, front.counters.pending, front.counters.dropped) == (3, 1, {"sampled_out": 4})


def test_duplicates_late_frames_and_gaps_are_counted():
    front = bench(ring_frames=20)
    for seq in (0, 1, 1, 4, 2, 5):
        front.seq = seq
        front.send()
    assert front.counters.dropped == {"duplicate": 1, "out_of_order": 1}
    assert front.counters.gaps == 1
    assert front.run() == [[0, 1], [4, 5]]


def test_pictures_that_look_like_the_one_encoded_last_are_gated():
    front = bench(gate=10.0, max_in_flight=9)
    front.show(*[PIXELS] * 5, *[BRIGHT] * 4)
    assert front.seqs_in_flight == [[0, 1], [5, 6]]
    counters = front.counters
    assert (counters.received, counters.kept, counters.pending, counters.dropped) == (9, 9, 4, {"gated": 5})


def test_the_second_picture_of_a_temporal_patch_passes_with_the_first():
    front = bench(gate=10.0, chunk_frames=4, max_in_flight=9)
    front.show(PIXELS, PIXELS, BRIGHT, PIXELS)
    assert front.seqs_in_flight == [[0, 1, 2, 3]]
    assert front.counters.dropped == {}


def test_images_are_gated_one_by_one():
    front = bench(gate=10.0, chunk_frames=1, max_in_flight=9)
    front.show(PIXELS, PIXELS, BRIGHT, BRIGHT, PIXELS)
    assert front.seqs_in_flight == [[0], [2], [4]]


def test_nothing_waits_for_a_full_chunk_while_nothing_new_comes():
    front = bench(gate=10.0, chunk_frames=8, max_in_flight=9)
    front.show(PIXELS, PIXELS)
    assert front.seqs_in_flight == [] and front.counters.pending == 2
    front.show(PIXELS)
    assert front.seqs_in_flight == [[0, 1]] and front.counters.padded == 0


def test_the_load_of_a_gated_stream_is_that_of_its_chunks_though_few_are_whole():
    front = bench(gate=10.0, chunk_frames=8, max_in_flight=9)
    for picture in (PIXELS, BRIGHT, PIXELS, BRIGHT):
        front.show(*[picture] * 3)
        front.settle()
        front.now += 1.0
    assert front.stats.load == pytest.approx(0.006)  # 6 ms, once a second


def test_a_still_picture_passes_every_ten_seconds():
    front = bench(gate=10.0, max_in_flight=99)
    front.show(*[PIXELS] * 70, step_ms=500)
    assert front.seqs_in_flight == [[0, 1], [21, 22], [42, 43], [63, 64]]
    assert front.counters.dropped == {"gated": 62}


def test_the_engine_is_told_until_when_nothing_has_changed():
    front = bench(gate=10.0, max_in_flight=9)
    front.show(PIXELS, PIXELS)
    assert front.unchanged() is None
    front.show(PIXELS, PIXELS)
    assert front.unchanged() == Unchanged(stream_ns=40 * MS, until_ns=120 * MS)
    assert front.unchanged() is None
    front.show(PIXELS, BRIGHT)
    assert front.unchanged() == Unchanged(stream_ns=40 * MS, until_ns=160 * MS)


@pytest.mark.parametrize("verb", ["reset", "rollback"])
def test_after_a_reset_nothing_is_gated_for_what_the_memory_has_lost(verb: str):
    front = bench(gate=10.0, max_in_flight=9)
    front.show(*[PIXELS] * 3)
    getattr(front, verb)()
    assert front.unchanged() is None
    front.show(*[PIXELS] * 3)
    assert front.seqs_in_flight == [[0, 1], [3, 4]]


def test_after_a_refused_chunk_nothing_is_gated_for_what_was_in_it():
    front = bench(gate=10.0, max_in_flight=9)
    front.show(*[PIXELS] * 3)
    front.settle(ChunkRefused("out_of_memory", ""))
    front.show(*[PIXELS] * 3)
    assert front.seqs_in_flight == [[3, 4]]
    assert front.counters.dropped == {"gated": 2, "out_of_memory": 2}


def test_after_the_end_of_a_stream_its_first_picture_passes():
    front = bench(gate=10.0, max_in_flight=9)
    front.show(*[PIXELS] * 3)
    front.send(eos=True)
    front.give_back(front.take())
    front.session, front.seq = "b", 10
    front.show(*[PIXELS] * 3)
    assert front.seqs_in_flight == [[0, 1], [10, 11]]


def test_a_gate_at_zero_gates_nothing():
    front = bench(gate=0.0, max_in_flight=9)
    front.show(*[PIXELS] * 4)
    assert front.seqs_in_flight == [[0, 1], [2, 3]]


def test_time_that_runs_backwards_costs_the_frame():
    front = bench()
    for ts in (1000, 2000, 500, 3000):
        front.ts = ts
        front.send()
    assert front.run() == [[0, 1]]
    assert front.counters.dropped == {"time_backwards": 1} and front.counters.pending == 1


def test_a_second_publisher_never_mixes_in():
    front = bench()
    for n in range(4):
        front.session, front.seq = "a", n
        front.send()
        front.session, front.seq = "b", n
        front.send()
    assert front.counters.dropped == {"second_publisher": 4}


def test_a_picture_that_cannot_be_decoded_is_dropped_for_its_reason():
    front = bench()
    front.send(4)
    front.give_back(front.take(), PictureError("too_large", ""))
    assert front.counters.dropped == {"too_large": 2}
    assert front.run() == [[2, 3]]


def test_a_paused_stream_drops_what_comes_and_finishes_what_it_has():
    front = bench()
    front.send(2)
    front.intake.pause()
    front.send(3)
    assert front.stats.state == "paused"
    assert front.run() == [[0, 1]]
    front.intake.resume()
    front.send(2)
    assert front.run() == [[5, 6]]
    assert front.counters.dropped == {"paused": 3}


def test_a_reset_drops_what_waits_everywhere_and_starts_the_clock_anew():
    front = bench(chunk_frames=4, ring_frames=20, max_in_flight=1)
    front.send(15)
    front.give_back(front.take())
    front.submit()  # 4 frames in flight
    front.settle()
    front.give_back(front.take())
    batch = front.take()  # 4 ready, none taken while they wait
    assert batch is None
    front.reset()
    assert (front.counters.dropped, front.counters.encoded, front.counters.pending) == ({"reset": 11}, 4, 0)
    front.send(4)
    front.give_back(front.take())
    front.submit()
    assert [picture.stream_ns for picture in front.in_flight[0][0].pictures] == [n * 40 * MS for n in range(4)]


def test_a_rollback_drops_what_waits_everywhere_and_the_clock_goes_on():
    front = bench(chunk_frames=4, ring_frames=20)
    front.send(4)
    assert front.run() == [[0, 1, 2, 3]]
    front.send(2)
    front.give_back(front.take())
    front.send(2)
    batch = front.take()
    front.send(3)
    front.rollback()
    front.give_back(batch)
    assert (front.counters.dropped, front.counters.encoded, front.counters.pending) == ({"reset": 7}, 4, 0)
    front.send(4)
    front.give_back(front.take())
    front.submit()
    pictures = front.in_flight[0][0].pictures
    assert [(picture.seq, picture.stream_ns) for picture in pictures] == [(n, n * 40 * MS) for n in range(11, 15)]


def test_after_a_rollback_a_memory_that_was_full_is_tried_again():
    front = bench()
    front.send(2)
    front.give_back(front.take())
    front.submit()
    front.settle(ChunkRefused("memory_full", ""))
    front.rollback()
    front.is_full = True  # as the engine's last news are still
    front.send(2)
    assert front.run() == [[2, 3]]


def test_a_batch_must_come_back_before_there_is_another():
    front = bench(ring_frames=20)
    front.send(4)
    batch = front.take()
    assert front.take() is None
    assert front.counters.received == accounted(front.counters)
    front.give_back(batch)
    front.submit()
    assert front.run() == [[0, 1], [2, 3]]


def test_a_batch_of_frames_that_a_reset_dropped_must_come_back_too():
    front = bench()
    front.send(2)
    batch = front.take()
    front.reset()
    front.send(2)
    assert front.take() is None
    front.give_back(batch)
    assert front.run() == [[2, 3]]


def test_a_batch_ends_with_the_picture_that_makes_it_large_enough():
    front = bench(chunk_frames=8)
    front.send(8, payload=bytes(24), enc="rgb8", w=4, h=2)
    batch = front.take(max_bytes=49)
    assert batch is not None
    assert (len(batch.frames), batch.num_bytes) == (3, 72)
    assert front.take(max_bytes=0) is None


@pytest.mark.parametrize("verb", ["reset", "rollback"])
def test_nothing_moves_while_the_engine_is_told_of_it(verb: str):
    front = bench()
    mover = threading.Thread(target=front.send)
    done: Future[CacheInfo] = Future()

    def tell_engine() -> Future[CacheInfo]:
        mover.start()
        mover.join(0.02)
        assert mover.is_alive() and len(front.in_flight) == 0
        return done

    assert getattr(front.intake, verb)(tell_engine) is done
    mover.join()
    assert (front.counters.received, front.counters.dropped) == (1, {})


def test_frames_that_were_being_decoded_at_a_reset_stay_out():
    front = bench()
    front.send(2)
    batch = front.take()
    front.reset()
    front.give_back(batch)
    assert front.submit() == []
    assert (front.counters.dropped, front.counters.pending) == ({"reset": 2}, 0)


@pytest.mark.parametrize("where", ["in the ring", "being decoded"])
def test_a_stream_that_is_reset_after_its_end_has_still_ended(where):
    front = bench()
    front.send(2)
    front.send(eos=True)
    front.send(0)
    if where == "being decoded":
        front.give_back(front.take())
        front.submit()
        front.settle()
        batch = front.take()
        assert batch is not None and batch.ends_session
        front.reset()
        front.give_back(batch)
    else:
        front.reset()
        front.run()
    assert front.stats.state == "ended"


@pytest.mark.parametrize("reason", ["memory_full", "out_of_memory", "reset", "removed", "encode_error"])
def test_a_refused_chunk_is_dropped_for_the_engines_reason(reason):
    front = bench()
    front.send(2)
    front.give_back(front.take())
    front.submit()
    front.settle(ChunkRefused(reason, ""))
    assert (front.counters.dropped, front.counters.encoded) == ({reason: 2}, 0)
    assert front.stats.state == "online"  # one chunk that does not fit says nothing of the memory


def test_a_stream_is_full_while_its_memory_says_so():
    front = bench()
    front.send()
    full = structs.replace(CACHE, full=True)
    assert [front.intake.stats(cache).state for cache in (CACHE, full, CACHE)] == ["online", "full", "online"]


def test_an_engine_that_breaks_costs_the_chunk_alone():
    front = bench()
    front.send(4)
    front.give_back(front.take())
    front.submit()
    front.settle(RuntimeError("the device is lost"))
    assert front.run() == [[2, 3]]
    assert front.counters.dropped == {"encode_error": 2}


def test_padding_is_not_counted_as_frames_when_its_chunk_is_refused():
    front = bench()
    front.send(1)
    front.send(eos=True)
    front.give_back(front.take())
    front.submit()
    front.settle(ChunkRefused("memory_full", ""))
    assert (front.counters.dropped, front.counters.padded) == ({"memory_full": 1}, 0)


def test_nothing_is_decoded_for_a_memory_without_room_until_there_is_some():
    front = bench()
    front.send(2)
    front.give_back(front.take())
    front.submit()
    front.settle(ChunkRefused("memory_full", ""))
    front.is_full = True
    front.send(3)
    assert front.take() is None
    assert front.counters.dropped == {"memory_full": 5}
    front.is_full = False
    front.send(2)
    assert front.run() == [[5, 6]]
    assert front.stats.state == "online"


def test_the_state_follows_the_stream():
    front = bench()
    assert front.stats.state == "waiting"
    front.send()
    assert front.stats.state == "online"
    front.now = 6.0
    assert front.stats.state == "offline"
    front.send()
    assert front.stats.state == "online"


def test_a_slow_camera_is_not_offline_between_two_frames():
    front = bench()
    front.send(fps=0.1)
    front.now = 25.0
    assert front.stats.state == "online"
    front.now = 35.0
    assert front.stats.state == "offline"


def test_facts_that_are_not_known_yet_are_left_out():
    stats = bench().stats
    unknown = (stats.received_size, stats.encoded_size, stats.fps_received, stats.fps_encoded, stats.lag_ms)
    assert unknown == (UNSET,) * 5 and stats.stages.decode_ms is UNSET
    assert stats.frames.last_seq is UNSET


def test_sizes_timings_and_lag_are_those_of_the_chunks():
    front = bench()
    front.send(2)
    front.give_back(front.take())
    front.submit()
    front.settle(done_ns=100 * MS)
    stats = front.stats
    assert (stats.received_size, stats.encoded_size, stats.lag_ms) == ((4, 2), (28, 28), 60.0)
    assert (stats.stages.decode_ms, stats.stages.vision_ms) == (2.0, 2.0)


@pytest.mark.parametrize("ts_kind", ["publish", "receive", "media"])
def test_a_lag_is_only_told_for_capture_times(ts_kind):
    front = bench()
    front.send(2, ts_kind=ts_kind)
    front.run()
    assert front.stats.lag_ms is UNSET


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([1, 2, 4, 6, 8]), st.integers(1, 6), st.integers(1, 3), st.sampled_from([None, 10.0]), st.data())
def test_every_frame_is_dropped_encoded_or_pending_at_every_moment(chunk_frames, ring_frames, stride, gate, data):
    front = bench(chunk_frames=chunk_frames, ring_frames=ring_frames, stride=stride, ring_bytes=100, gate=gate)
    actions = ("send", "send", "send", "jump", "eos", "session", "take", "take", "give", "bright", "submit", "settle")
    rare = ("pause", "resume", "reset", "rollback", "broken", "refuse", "wait", "full")
    batch: Batch | None = None
    for action in data.draw(st.lists(st.sampled_from(actions + actions + rare), max_size=80)):
        match action:
            case "send" | "eos":
                num, payload = data.draw(st.tuples(st.integers(1, 4), st.sampled_from([b"x", bytes(60), bytes(101)])))
                front.send(num if action == "send" else 1, eos=action == "eos", payload=payload)
            case "jump":
                front.seq = max(0, front.seq + data.draw(st.integers(-4, 4)))
                front.ts = max(0, front.ts + data.draw(st.integers(-200, 200)) * MS)
            case "session":
                front.session = data.draw(st.sampled_from("abc"))
            case "wait":
                front.now += data.draw(st.floats(0, 3))
            case "take":
                batch = front.take() if batch is None else batch
            case "give" | "bright" | "broken":
                front.give_back(batch, {"give": PIXELS, "bright": BRIGHT}.get(action, PictureError("decode_error", "")))
                batch = None
            case "submit":
                front.submit()
            case "settle" | "refuse":
                if front.in_flight:
                    front.settle(None if action == "settle" else ChunkRefused("memory_full", ""))
            case "pause":
                front.intake.pause()
            case "resume":
                front.intake.resume()
            case "reset":
                front.reset()
            case "rollback":
                front.rollback()
            case "full":
                front.is_full = not front.is_full
        counters = front.counters
        assert counters.received == accounted(counters), action
        assert counters.pending >= 0 and counters.kept <= counters.received
    front.give_back(batch)
    front.is_full = False
    front.submit()
    while front.in_flight:
        front.settle()
    front.run()
    assert front.counters.pending < chunk_frames
    assert front.counters.received == accounted(front.counters)
