"""A node under a benchmark, with its real sockets, and a camera in another process that sends all it takes."""

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from .bench_camera import Sent
from .bench_engine import EngineBench, Setting
from .bench_report import Case, Row
from .config import NodeConfig
from .node import Node
from .options import StreamOptions

STREAM = "wire"
RING_FRAMES = 256
MAX_IN_FLIGHT = 96

_SOCKETS = ("frames", "ask", "control", "telemetry")
_SPARE_TOKENS = 1024
_WORDS_PER_FRAME = 16  # of timestamps and markers, at most


class CameraError(Exception):
    """The camera's process ended without a result; the message is what it said."""


@dataclass(frozen=True, slots=True)
class Burst:
    """Frames that a camera sends as fast as they are taken."""

    setting: Setting
    num_frames: int
    encoding: str  # jpeg, png or rgb8


def measure_burst(bench: EngineBench, burst: Burst, *, timeout_s: float) -> list[Row]:
    """From the first frame sent until the last one is in the memory, and the first token of a question then.

    Raises CameraError, and subprocess.TimeoutExpired.
    """
    with Node(_config(bench, burst), bench.engine) as node:
        try:
            sent = _film(node.endpoints, burst, timeout_s)
        finally:
            bench.engine.remove_stream(STREAM).result()
    return _rows(bench, burst, sent)


def _config(bench: EngineBench, burst: Burst) -> NodeConfig:
    """A node on free ports of the loopback interface, with its one stream."""
    setting = burst.setting
    num_chunks = -(-burst.num_frames // setting.chunk_frames)
    num_tokens = num_chunks * (bench.num_chunk_tokens(setting) + _WORDS_PER_FRAME * setting.chunk_frames)
    stream: dict[str, Any] = {
        "name": STREAM,
        "chunk_frames": setting.chunk_frames,
        "memory_bytes": (num_tokens + _SPARE_TOKENS) * bench.model.kv_shape.bytes_per_token,
        "ring_frames": RING_FRAMES,
    }
    if setting.encode_size is not None:
        stream["encode_size"] = setting.encode_size
    endpoints: dict[str, Any] = {name: "tcp://127.0.0.1:*" for name in _SOCKETS}
    return NodeConfig(name="bench", endpoints=endpoints, streams=[stream])  # type: ignore[arg-type]


def _num_in_flight(burst: Burst) -> int:
    """Frames on their way at most, so that the node's ring never overflows."""
    width, height = burst.setting.received
    frame_bytes = 3 * width * height  # at most, also where they are compressed
    num_held = StreamOptions(STREAM).ring_bytes // (2 * frame_bytes)
    return max(2 * burst.setting.chunk_frames, min(MAX_IN_FLIGHT, num_held))


def _film(endpoints: dict[str, str], burst: Burst, timeout_s: float) -> Sent:
    width, height = burst.setting.received
    arguments = [part for name in ("frames", "ask", "control") for part in (f"--{name}", endpoints[name])]
    arguments += ["--stream", STREAM, "--encoding", burst.encoding, "--num", str(burst.num_frames)]
    arguments += ["--width", str(width), "--height", str(height), "--in-flight", str(_num_in_flight(burst))]
    command = [sys.executable, "-m", f"{__package__}.bench_camera", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    if run.returncode:
        raise CameraError(run.stderr.strip() or f"the camera ended with status {run.returncode}")
    return Sent(**json.loads(run.stdout))


def _rows(bench: EngineBench, burst: Burst, sent: Sent) -> list[Row]:
    received = "x".join(map(str, burst.setting.received))
    encoded = "" if sent.encoded_size is None else "x".join(map(str, sent.encoded_size))
    frames = Row(
        Case(bench.name, f"over the wire, {burst.encoding}", encoded, burst.setting.chunk_frames),
        ms=sent.wall_s * 1e3,
        rate=sent.num_encoded / sent.wall_s,
        unit="frames/s",
        num_tokens=sent.num_tokens,
        note=f"{sent.num_sent} frames of {received} sent ({sent.num_bytes / 1e6:.0f} MB), {sent.num_received} "
        f"received, {sent.num_encoded} encoded as {encoded or '?'} ({sent.num_tokens} tokens){_lost_text(sent)}",
    )
    if sent.first_token_ms is None:
        return [frames]
    question = Row(
        Case(bench.name, "first token, over the wire", history=sent.num_tokens, num_answers=1),
        ms=sent.first_token_ms,
        num_tokens=sent.num_prompt_tokens or 0,
        note=f"a question of {sent.num_prompt_tokens} tokens, from the request to the reply",
    )
    return [frames, question]


def _lost_text(sent: Sent) -> str:
    return "".join(f", {num} {reason}" for reason, num in sent.dropped.items() if num)
