"""Telemetry as a node would send it, with facts to look for."""

from typing import Any

from onlooker.protocol.messages import (
    CacheInfo,
    FrameCounters,
    Hello,
    NodeStats,
    QuestionCounters,
    StageTimings,
    StreamStats,
    Vram,
)

NS = 1_000_000_000


def node_stats(**changes: Any) -> NodeStats:
    facts: dict[str, Any] = {
        "ts": NS,
        "state": "ready",
        "uptime_s": 90.0,
        "engine_progress_age_ms": 1.0,
        "model": "Qwen2.5-VL",
        "vram": Vram(device="cuda:0", weights_bytes=7_500_000_000, kv_bytes=1_073_741_824, free_bytes=60 * 10**9),
        "questions": QuestionCounters(received=3, answered=2, failed={"BUSY": 1}, waiting=0, running=0),
        "rejected": {},
    }
    return NodeStats(**facts | changes)


def stream_stats(**changes: Any) -> StreamStats:
    cache = CacheInfo(
        num_tokens=250,
        capacity_tokens=1000,
        logical_bytes=16_000,
        resident_bytes=64_000,
        bytes_per_token=64,
        num_chunks=2,
        num_frames=8,
        num_padded_frames=0,
        positions_used=250,
        seconds=2.5,
    )
    frames = FrameCounters(
        received=12, kept=8, encoded=8, pending=0, padded=0, dropped={"sampled_out": 3, "ring_full": 1}, gaps=5
    )
    facts: dict[str, Any] = {
        "ts": NS,
        "stream": "gate",
        "state": "online",
        "layout": "native",
        "chunk_frames": 4,
        "received_size": (1920, 1080),
        "encoded_size": (644, 364),
        "lag_ms": 120.0,
        "cache": cache,
        "frames": frames,
        "stages": StageTimings(decode_ms=4.0, vision_ms=30.0),
    }
    return StreamStats(**facts | changes)


def hello(session: str = "s1", streams: tuple[str, ...] = ("gate",)) -> Hello:
    return Hello(
        features=[],
        node="n1",
        session=session,
        version="0.1.0",
        model="Qwen2.5-VL",
        model_type="qwen2_5_vl",
        dtype="bfloat16",
        device="cuda:0",
        endpoints={},
        max_question_chars=1,
        max_new_tokens=1,
        max_options=2,
        streams=list(streams),
        notice="the weights are untrained",
    )
