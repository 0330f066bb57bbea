"""The metrics that `onlooker metrics` exports: the one place that knows their names.

Base units, `_total` for what only grows, shares instead of percent. What a node does not know has no sample;
a count of something that has not happened is 0 from the start, so that its first time is seen to be one more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, TypeVar, get_args, get_type_hints

from msgspec import UNSET, UnsetType

from ..protocol.errors import DropReason, ErrorCode
from ..protocol.messages import Hello, NodeStats, StageTimings, StreamStats, Vram

T = TypeVar("T")

MS = 1e-3

NODE_STATES = get_args(get_type_hints(NodeStats)["state"])
STREAM_STATES = get_args(get_type_hints(StreamStats)["state"])
# What is refused before it reaches a stream; the other reasons are a stream's own.
REJECTED = (*tuple(DropReason)[:5], "handshake_failed")
DROPPED = tuple(DropReason)[5:]
# PROTOCOL.md, "Event kinds".
EVENT_KINDS = (
    *("stream_added", "stream_removed", "stream_waiting", "stream_online", "stream_offline", "stream_paused"),
    *(
        "stream_resized",
        "stream_ended",
        "memory_full",
        "degraded",
        "restored",
        "forgot",
        "publisher_restarted",
        "reset",
        "rolled_back",
        "trace_left",
    ),
    "request_failed",
)


class Sample(NamedTuple):
    """One value, and the labels that its family adds to those of the node and the stream."""

    value: float
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family(Generic[T]):
    """A metric: its name, what it says, and how it is read from a record. In a query it stands for its name."""

    name: str
    help: str
    read: Callable[[T], Iterable[Sample]]
    labels: tuple[str, ...] = ()

    @property
    def kind(self) -> Literal["counter", "gauge"]:
        return "counter" if self.name.endswith("_total") else "gauge"

    def __str__(self) -> str:
        return self.name


def _known(value: float | UnsetType, scale: float = 1.0) -> list[Sample]:
    """One sample, or none of what is unknown."""
    return [] if value is UNSET else [Sample(value * scale)]


def _by_name(values: Mapping[str, float | UnsetType], scale: float = 1.0) -> list[Sample]:
    """A sample for each name whose value is known."""
    return [Sample(value * scale, (name,)) for name, value in values.items() if value is not UNSET]


def _counts(found: Mapping[str, int], all_names: Iterable[str]) -> list[Sample]:
    """A sample for each name there can be, and for those that a newer node may add."""
    return [Sample(found.get(name, 0), (name,)) for name in dict.fromkeys((*map(str, all_names), *found))]


def _states(state: str, all_states: Iterable[str]) -> list[Sample]:
    """1 for the state that is, and 0 for the others."""
    return [Sample(float(each == state), (each,)) for each in dict.fromkeys((*all_states, state))]


# Of the node

INFO = Family[Hello](
    "onlooker_node_info",
    "Always 1; its labels say what the node runs.",
    lambda hello: [Sample(1.0, (hello.version, hello.model, hello.model_type, hello.dtype, hello.device))],
    ("version", "model", "model_type", "dtype", "device"),
)

NODE_STATE = Family[NodeStats](
    "onlooker_node_state",
    "1 for the state the node is in, 0 for the others.",
    lambda stats: _states(stats.state, NODE_STATES),
    ("state",),
)
UPTIME = Family[NodeStats](
    "onlooker_node_uptime_seconds", "Time since the node started.", lambda stats: _known(stats.uptime_s)
)
ENGINE_AGE = Family[NodeStats](
    "onlooker_engine_progress_age_seconds",
    "Time since the engine last came round.",
    lambda stats: _known(stats.engine_progress_age_ms, MS),
)
HOST_MEMORY = Family[NodeStats](
    "onlooker_node_resident_memory_bytes",
    "Resident memory of the node's process.",
    lambda stats: _known(stats.host_rss_bytes),
)
VRAM = Family[NodeStats](
    "onlooker_vram_bytes", "Device memory by component.", lambda stats: _by_name(_vram(stats.vram)), ("component",)
)
VRAM_CAPACITY = Family[NodeStats](
    "onlooker_vram_capacity_bytes", "Memory that the device has.", lambda stats: _known(stats.vram.total_bytes)
)
TORCH_MEMORY = Family[NodeStats](
    "onlooker_torch_memory_bytes",
    "Device memory as PyTorch's allocator counts it.",
    lambda stats: _by_name(_torch(stats.vram)),
    ("measure",),
)
RECEIVED_QUESTIONS = Family[NodeStats](
    "onlooker_questions_received_total", "Questions that came in.", lambda stats: _known(stats.questions.received)
)
ANSWERED_QUESTIONS = Family[NodeStats](
    "onlooker_questions_answered_total", "Questions that were answered.", lambda stats: _known(stats.questions.answered)
)
FAILED_QUESTIONS = Family[NodeStats](
    "onlooker_questions_failed_total",
    "Questions that were refused or failed, by error code.",
    lambda stats: _counts(stats.questions.failed, ErrorCode),
    ("code",),
)
WAITING_QUESTIONS = Family[NodeStats](
    "onlooker_questions_waiting", "Questions that wait for the engine.", lambda stats: _known(stats.questions.waiting)
)
RUNNING_QUESTIONS = Family[NodeStats](
    "onlooker_questions_running", "Questions being answered.", lambda stats: _known(stats.questions.running)
)
TRACES = Family[NodeStats](
    "onlooker_question_traces_total",
    "Answers after which the memory was not what it had been: anything but 0 is a defect.",
    lambda stats: _known(stats.questions.traces),
)
FIRST_TOKEN = Family[NodeStats](
    "onlooker_question_first_token_mean_seconds",
    "From a question's arrival to the first token of its answer, mean of the recent ones.",
    lambda stats: _known(stats.questions.mean_first_token_ms, MS),
)
ANSWER_TIME = Family[NodeStats](
    "onlooker_question_duration_mean_seconds",
    "From a question's arrival to its whole answer, mean of the recent ones.",
    lambda stats: _known(stats.questions.mean_total_ms, MS),
)
REJECTED_MESSAGES = Family[NodeStats](
    "onlooker_messages_rejected_total",
    "Messages refused before they reached a stream or the engine, by reason.",
    lambda stats: _counts(stats.rejected, REJECTED),
    ("reason",),
)


def _vram(vram: Vram) -> dict[str, float | UnsetType]:
    return {
        "weights": vram.weights_bytes,
        "kv": vram.kv_bytes,
        "activations_peak": vram.activations_peak_bytes,
        "other_process": vram.other_process_bytes,
        "free": vram.free_bytes,
    }


def _torch(vram: Vram) -> dict[str, float | UnsetType]:
    return {
        "allocated": vram.torch_allocated_bytes,
        "reserved": vram.torch_reserved_bytes,
        "peak": vram.torch_peak_bytes,
    }


# Of its streams

STREAM_STATE = Family[StreamStats](
    "onlooker_stream_state",
    "1 for the state the stream is in, 0 for the others.",
    lambda stats: _states(stats.state, STREAM_STATES),
    ("state",),
)
LAG = Family[StreamStats](
    "onlooker_stream_lag_seconds",
    "From capture to memory, of the newest chunk; only of cameras that tell when they captured.",
    lambda stats: _known(stats.lag_ms, MS),
)
RECEIVED_FRAMES = Family[StreamStats](
    "onlooker_frames_received_total", "Frames that came in.", lambda stats: _known(stats.frames.received)
)
KEPT_FRAMES = Family[StreamStats](
    "onlooker_frames_kept_total", "Frames that passed the sampler.", lambda stats: _known(stats.frames.kept)
)
ENCODED_FRAMES = Family[StreamStats](
    "onlooker_frames_encoded_total", "Frames that got into the memory.", lambda stats: _known(stats.frames.encoded)
)
DROPPED_FRAMES = Family[StreamStats](
    "onlooker_frames_dropped_total",
    "Frames that were dropped, by reason.",
    lambda stats: _counts(stats.frames.dropped, DROPPED),
    ("reason",),
)
PENDING_FRAMES = Family[StreamStats](
    "onlooker_frames_pending",
    "Frames on their way: in the ring, or in a chunk that is not complete.",
    lambda stats: _known(stats.frames.pending),
)
PADDED_FRAMES = Family[StreamStats](
    "onlooker_frames_padded_total",
    "Copies of a last frame that filled a chunk.",
    lambda stats: _known(stats.frames.padded),
)
FORGOTTEN_FRAMES = Family[StreamStats](
    "onlooker_frames_forgotten_total",
    "Frames that the memory forgot to make room for others.",
    lambda stats: _known(stats.frames.forgotten),
)
MISSED_FRAMES = Family[StreamStats](
    "onlooker_frames_missed_total",
    "Numbers in the sequence of frames that never arrived.",
    lambda stats: _known(stats.frames.gaps),
)
STAGES = Family[StreamStats](
    "onlooker_chunk_stage_mean_seconds",
    "Time that each stage takes for a chunk, mean of the recent ones.",
    lambda stats: _by_name(_stages(stats.stages), MS),
    ("stage",),
)
TOKENS = Family[StreamStats](
    "onlooker_memory_tokens", "Tokens that the memory holds.", lambda stats: _known(stats.cache.num_tokens)
)
DROPPED_TOKENS = Family[StreamStats](
    "onlooker_memory_dropped_tokens",
    "Tokens left out of the memory since it began or was reset, because they said nothing new.",
    lambda stats: _known(stats.cache.num_dropped_tokens),
)
CAPACITY = Family[StreamStats](
    "onlooker_memory_capacity_tokens",
    "Tokens that the memory can hold.",
    lambda stats: _known(stats.cache.capacity_tokens),
)
LOGICAL_BYTES = Family[StreamStats](
    "onlooker_memory_logical_bytes",
    "Bytes of the keys and values in use.",
    lambda stats: _known(stats.cache.logical_bytes),
)
RESIDENT_BYTES = Family[StreamStats](
    "onlooker_memory_resident_bytes",
    "Bytes reserved for keys and values.",
    lambda stats: _known(stats.cache.resident_bytes),
)
MEMORY_FRAMES = Family[StreamStats](
    "onlooker_memory_frames", "Frames that the memory holds.", lambda stats: _known(stats.cache.num_frames)
)
SPAN = Family[StreamStats](
    "onlooker_memory_span_seconds",
    "Time between the oldest and the newest frame of the memory.",
    lambda stats: _known(stats.cache.seconds),
)
POSITIONS_USED = Family[StreamStats](
    "onlooker_memory_positions_used", "Positions used up.", lambda stats: _known(stats.cache.positions_used)
)
POSITIONS_LEFT = Family[StreamStats](
    "onlooker_memory_positions_left",
    "Positions left, up to the length the model was trained for.",
    lambda stats: _known(stats.cache.positions_left),
)
UNTIL_FULL = Family[StreamStats](
    "onlooker_memory_until_full_seconds",
    "Time until the memory is full, at the present rate.",
    lambda stats: _known(stats.cache.seconds_until_full),
)
HORIZON = Family[StreamStats](
    "onlooker_memory_horizon_seconds",
    "How much of the stream a full memory holds without a gap, at the present rate.",
    lambda stats: _known(stats.cache.seconds_of_memory),
)
DEGRADED = Family[StreamStats](
    "onlooker_stream_degraded_steps",
    "How many steps down the stream has gone for want of time or memory.",
    lambda stats: _known(len(stats.degraded)),
)
LOAD = Family[StreamStats](
    "onlooker_stream_load_ratio",
    "Share of the engine's time that the stream's chunks take.",
    lambda stats: _known(stats.load),
)
FULL = Family[StreamStats](
    "onlooker_memory_full",
    "1 if the memory takes no more frames, otherwise 0.",
    lambda stats: _known(float(stats.cache.full)),
)


def _stages(stages: StageTimings) -> dict[str, float | UnsetType]:
    return {name.removesuffix("_ms"): getattr(stages, name) for name in stages.__struct_fields__}


# Of the exporter


@dataclass(frozen=True, slots=True)
class Hearing:
    """What the exporter itself has heard of a node since the exporter started."""

    is_up: bool
    events: Mapping[str, int]
    missed: int
    malformed: int


UP = Family[Hearing](
    "onlooker_up",
    "1 while the node's telemetry comes in, 0 while the node is silent and its series are gone.",
    lambda hearing: _known(float(hearing.is_up)),
)
EVENTS = Family[Hearing](
    "onlooker_events_total",
    "Events that the node told of since the exporter started.",
    lambda hearing: _counts(hearing.events, EVENT_KINDS),
    ("kind",),
)
MISSED_RECORDS = Family[Hearing](
    "onlooker_telemetry_missed_total",
    "Records of telemetry that never arrived.",
    lambda hearing: _known(hearing.missed),
)
MALFORMED_RECORDS = Family[Hearing](
    "onlooker_telemetry_malformed_total",
    "Messages on the telemetry topic that were no telemetry.",
    lambda hearing: _known(hearing.malformed),
)

OF_HELLO: tuple[Family[Hello], ...] = (INFO,)
OF_NODE: tuple[Family[NodeStats], ...] = (
    *(NODE_STATE, UPTIME, ENGINE_AGE, HOST_MEMORY, VRAM, VRAM_CAPACITY, TORCH_MEMORY),
    *(RECEIVED_QUESTIONS, ANSWERED_QUESTIONS, FAILED_QUESTIONS, WAITING_QUESTIONS, RUNNING_QUESTIONS, TRACES),
    *(FIRST_TOKEN, ANSWER_TIME, REJECTED_MESSAGES),
)
OF_STREAM: tuple[Family[StreamStats], ...] = (
    *(STREAM_STATE, LAG, RECEIVED_FRAMES, KEPT_FRAMES, ENCODED_FRAMES, DROPPED_FRAMES, PENDING_FRAMES),
    *(PADDED_FRAMES, FORGOTTEN_FRAMES, MISSED_FRAMES, STAGES, LOAD, DEGRADED, TOKENS, DROPPED_TOKENS, CAPACITY),
    *(LOGICAL_BYTES, RESIDENT_BYTES, MEMORY_FRAMES, SPAN, POSITIONS_USED, POSITIONS_LEFT, UNTIL_FULL, HORIZON, FULL),
)
OF_HEARING: tuple[Family[Hearing], ...] = (UP, EVENTS, MISSED_RECORDS, MALFORMED_RECORDS)
FAMILIES = (*OF_HELLO, *OF_NODE, *OF_STREAM, *OF_HEARING)
