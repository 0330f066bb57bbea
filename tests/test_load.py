import pytest
from msgspec import UNSET
from records import stream_stats

from onlooker.node.load import load_of, with_load
from onlooker.node.options import StreamOptions
from onlooker.protocol.messages import Footprint, Forecast, StageTimings

STAGES = StageTimings(preprocess_ms=10.0, vision_ms=60.0, prefill_ms=30.0)
FORECAST = Forecast(
    memory_bytes=1000,
    capacity_tokens=100,
    encode_size=(64, 64),
    footprint=Footprint(
        bytes_per_token=10,
        chunk_frames=4,
        opening_tokens=5,
        tokens_per_chunk=50,
        opening_positions=5,
        picture_positions=2,
        positions_per_chunk=0,
        positions_per_second=2.0,
    ),
    num_chunks=1,
    limit="memory",
)


def test_the_load_of_a_stream_is_the_time_of_its_chunks_in_a_second():
    assert load_of(STAGES, 5.0) == pytest.approx(0.5)
    assert load_of(StageTimings(), 5.0) is UNSET
    assert load_of(STAGES, None) is UNSET


def test_the_load_to_come_follows_from_the_tokens_of_the_chunks_that_were():
    seen = [stream_stats(stages=STAGES), stream_stats()]  # 250 tokens in 2 chunks, and one that tells no times
    options = StreamOptions("front", fps=8.0)
    assert with_load(FORECAST, options, seen).load == pytest.approx(50 * 2 * 0.1 / 125)
    assert with_load(FORECAST, options, []).load is UNSET
    assert with_load(FORECAST, StreamOptions("front"), seen).load is UNSET
