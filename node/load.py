"""How much of the engine's time the chunks of a stream take, measured or expected."""

from collections.abc import Sequence
from statistics import fmean

from msgspec import UNSET, UnsetType, structs

from ..protocol.errors import ErrorCode, NodeError
from ..protocol.messages import Forecast, StageTimings, StreamStats
from .options import StreamOptions


def load_of(stages: StageTimings, chunks_per_s: float | None) -> float | UnsetType:
    """Share of the time that chunks of these stages take; of a stream with a gate few of them are whole."""
    chunk_s = _chunk_s(stages)
    return UNSET if chunk_s is UNSET or chunks_per_s is None else chunk_s * chunks_per_s


def with_load(forecast: Forecast, options: StreamOptions, streams: Sequence[StreamStats]) -> Forecast:
    """A forecast that also says what share of the time the stream will take, going by the chunks of other streams.

    It is left out where nothing was encoded yet, or the stream's rate or encode size is not known.
    """
    token_s = [each for each in map(_token_s, streams) if each is not None]
    if not (token_s and options.fps and forecast.encode_size is not UNSET):
        return forecast
    tokens_per_second = forecast.footprint.tokens_per_chunk * options.fps / options.chunk_frames
    return structs.replace(forecast, load=tokens_per_second * fmean(token_s))


def check_load(forecast: Forecast, streams: Sequence[StreamStats], max_load: float | None) -> None:
    """Raise NodeError for a stream whose chunks ask for more of the time than others leave of `max_load`, with figures.

    A load that is not known is none.
    """
    if max_load is None or forecast.load is UNSET:
        return
    others = sum(stats.load for stats in streams if stats.load is not UNSET)
    if forecast.load + others <= max_load:
        return
    raise NodeError(
        ErrorCode.TOO_LARGE if forecast.load > max_load else ErrorCode.BUSY,
        f"its chunks would take {forecast.load:.2f} of the engine's time beside {others:.2f} of other streams, and"
        f" all may take {max_load:g} (limits.max_load)",
        details={"load": forecast.load, "others_load": others, "max_load": max_load},
    )


def _chunk_s(stages: StageTimings) -> float | UnsetType:
    """Seconds of the engine that a chunk takes; decoding is done elsewhere."""
    preprocess, vision, prefill = stages.preprocess_ms, stages.vision_ms, stages.prefill_ms
    if preprocess is UNSET or vision is UNSET or prefill is UNSET:
        return UNSET
    return (preprocess + vision + prefill) / 1e3


def _token_s(stats: StreamStats) -> float | None:
    """Seconds that a token of a stream takes, by the chunks that its memory holds."""
    chunk_s, cache = _chunk_s(stats.stages), stats.cache
    return None if chunk_s is UNSET or not cache.num_chunks else chunk_s * cache.num_chunks / cache.num_tokens
