import pytest
from msgspec import UNSET, structs
from records import stream_stats

from onlooker.node.load import check_load, load_of, with_load
from onlooker.node.options import StreamOptions
from onlooker.protocol.errors import NodeError
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


@pytest.mark.parametrize(
    ("load", "max_load", "code"),
    [(0.4, 0.9, None), (0.5, 0.9, "BUSY"), (0.95, 0.9, "TOO_LARGE"), (9.0, None, None), (UNSET, 0.1, None)],
)
def test_a_stream_that_asks_for_more_time_than_is_left_is_refused_with_the_figures(load, max_load, code):
    streams = [stream_stats(load=0.2), stream_stats(load=0.25), stream_stats()]
    forecast = structs.replace(FORECAST, load=load)
    if code is None:
        check_load(forecast, streams, max_load)
        return
    with pytest.raises(NodeError, match="of the engine's time") as refused:
        check_load(forecast, streams, max_load)
    assert refused.value.code == code
    assert refused.value.details == {"load": load, "others_load": pytest.approx(0.45), "max_load": max_load}
