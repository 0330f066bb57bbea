"""Every message of protocol version 1, as frozen msgspec Structs.

On the wire each is a MessagePack map with these field names; PROTOCOL.md is the authority. Times are
integer nanoseconds since the Unix epoch unless a name ends in `_ms` or `_s`; sizes are bytes.
A field that is `UNSET` is absent from the wire: a fact that is unknown is left out, never sent as 0 or -1.
Unknown fields are ignored on receipt, so a minor version may add some.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

PROTOCOL_VERSION = 1

NAME_PATTERN = r"\A[A-Za-z0-9._-]{1,64}\Z"

# The bounds are checked when a message is decoded, not when one is made.
StreamName = Annotated[str, Meta(pattern=NAME_PATTERN)]
MarkName = Annotated[str, Meta(pattern=NAME_PATTERN)]
RequestId = Annotated[str, Meta(min_length=1, max_length=128)]
SessionId = Annotated[str, Meta(min_length=1, max_length=128)]
Question = Annotated[str, Meta(min_length=1)]
Option = Annotated[str, Meta(min_length=1)]
StopString = Annotated[str, Meta(min_length=1, max_length=128)]
TimeNs = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
DeadlineMs = Annotated[int, Meta(ge=1, le=86_400_000)]
Address = Annotated[str, Meta(min_length=1, max_length=256)]  # a ZeroMQ endpoint
SidePixels = Annotated[int, Meta(ge=1, le=16384)]
Count = Annotated[int, Meta(ge=1, le=(1 << 63) - 1)]
RateHz = Annotated[float, Meta(gt=0, le=1e6)]
GreyLevels = Annotated[float, Meta(ge=0, le=255)]
Similarity = Annotated[float, Meta(ge=0, le=1)]
NumFrames = Annotated[int, Meta(ge=0, le=1 << 31)]
TimeKind = Literal["capture", "publish", "receive", "media"]
KnownAs = Literal["whole", "dropped", "thinned", "forgotten"]  # how well a memory knows a time range
RetentionName = Literal["stop", "reset", "window", "thin"]  # what a full memory does
MemoryLimit = Literal["memory", "positions"]  # what ends a memory: its bytes, or the positions of its model

# ROS 2 sensor_msgs and Foxglove names.
COMPRESSED_ENCODINGS = frozenset({"jpeg", "png"})
RAW_CHANNELS = {"rgb8": 3, "bgr8": 3, "mono8": 1}
ENCODINGS = COMPRESSED_ENCODINGS | RAW_CHANNELS.keys()


T = TypeVar("T")


def or_unset(value: T | None) -> T | UnsetType:
    """Turn Python's "not given" into the absence of a field."""
    return UNSET if value is None else value


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=False):
    """Base of all messages."""


# ---------------------------------------------------------------------------------------------- frames


class FrameHeader(Message, frozen=True, kw_only=True):
    """Part 2 of a frame message: what the payload is, and when it was seen."""

    v: int = PROTOCOL_VERSION
    session: SessionId  # new at each start of the publisher: a change means it restarted
    stream: StreamName
    ts: TimeNs
    ts_kind: TimeKind = "capture"
    enc: str = ""  # empty only with eos
    w: int | UnsetType = UNSET  # pixels; required for raw encodings
    h: int | UnsetType = UNSET
    step: int | UnsetType = UNSET  # bytes per row, raw encodings only; default w * channels
    fps: RateHz | UnsetType = UNSET  # nominal rate of the source
    loop: Annotated[int, Meta(ge=0)] | UnsetType = UNSET  # how often a replayed file has started over
    eos: bool = False  # end of stream: the last message of this session, with no payload


# ------------------------------------------------------------------------------------------- envelopes


class Request(Message, frozen=True, kw_only=True):
    """What a client sends to the ask or the control socket."""

    v: int = PROTOCOL_VERSION
    id: RequestId
    session: SessionId  # the client's; id + session name a request, so a resend is the same request
    endpoint: str
    deadline_ms: DeadlineMs | UnsetType = UNSET  # budget left, relative: no clocks to agree
    stream_reply: bool = False  # DEALER clients: send `partial` replies while the answer grows
    data: msgspec.Raw = msgspec.Raw(b"\x80")


class Failure(Message, frozen=True, kw_only=True):
    """Why a request got no answer."""

    code: str
    message: str
    retryable: bool
    retry_after_ms: int | UnsetType = UNSET
    error_id: str | UnsetType = UNSET  # find it in the node's log
    details: dict[str, Any] = {}


class Reply(Message, frozen=True, kw_only=True):
    """What comes back: any number of `partial`, then exactly one `ok` or `error`."""

    v: int = PROTOCOL_VERSION
    id: str  # empty in the answer to a request whose id could not be read
    status: Literal["ok", "partial", "error"]
    node: str
    session: str  # the node's: a change means it restarted
    data: msgspec.Raw | UnsetType = UNSET
    error: Failure | UnsetType = UNSET


# ---------------------------------------------------------------------------------- ask: request data


class Ask(Message, frozen=True, kw_only=True):
    """Endpoint `ask`: a free answer about one stream."""

    stream: StreamName
    question: Question
    max_new_tokens: Annotated[int, Meta(ge=1)] = 128
    temperature: Annotated[float, Meta(ge=0, le=100)] = 0.0  # 0 is greedy
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] | UnsetType = UNSET
    stop: Annotated[list[StopString], Meta(max_length=16)] = []
    as_of: MarkName | UnsetType = UNSET  # the name of a mark: answer from the memory as it was then


class AskChoice(Message, frozen=True, kw_only=True):
    """Endpoint `ask_choice`: which of the options is likeliest."""

    stream: StreamName
    question: Question
    options: Annotated[list[Option], Meta(min_length=2)]
    rank_by: Literal["raw", "normalized", "calibrated"] = "normalized"
    as_of: MarkName | UnsetType = UNSET


# ------------------------------------------------------------------------------------ ask: reply data


class TimeRange(Message, frozen=True, kw_only=True):
    """How well a memory knows a stretch of time, as publishers wrote it.

    `whole`: all of its frames; `dropped`: all, less tokens that said nothing new; `thinned`: frames here and there;
    `forgotten`: none.
    """

    from_ns: int
    until_ns: int
    known: KnownAs
    num_frames: int  # in the memory


class Provenance(Message, frozen=True, kw_only=True):
    """What the answer knows, and the proof that asking left no trace.

    The fingerprint is a digest over sampled K and V rows of the memory the question read, taken before
    the question and again after it.
    """

    num_tokens: int
    num_frames: int
    from_ns: int  # time of the oldest frame in the memory, as its publisher wrote it
    until_ns: int  # time of the newest; a file that starts over begins before it
    seconds: float | UnsetType = UNSET  # between the two on the stream's own clock, which never runs backwards
    until_seq: int
    seen_until_ns: int | UnsetType = UNSET  # frames came until then that looked like the newest one, and were gated
    ts_kind: TimeKind
    whole_from_ns: int | UnsetType = UNSET  # nothing was forgotten since; absent if the newest part was
    num_forgotten_chunks: int = 0  # of those encoded up to here, to make room
    num_forgotten_frames: int = 0
    seconds_forgotten: float = 0.0
    ranges: list[TimeRange] = []  # what is known of which time, old to new; at most 16, the oldest are merged
    fingerprint_before: str
    fingerprint_after: str
    unchanged: bool


class AnswerTiming(Message, frozen=True, kw_only=True):
    """Where the time of one question went, in milliseconds, on the node's monotonic clock."""

    queue_ms: float
    prefill_ms: float
    first_token_ms: float  # from the request's arrival to the first token
    decode_ms: float
    total_ms: float


class PartialAnswer(Message, frozen=True, kw_only=True):
    """Data of a `partial` reply: the text that is new since the last one."""

    n: int  # 0, 1, 2, ...
    delta: str


class Answer(Message, frozen=True, kw_only=True):
    """Data of the final reply to `ask`."""

    text: str
    finish: Literal["stop", "length"]
    num_prompt_tokens: int
    num_answer_tokens: int
    memory: Provenance
    timing: AnswerTiming
    notice: str | UnsetType = UNSET  # e.g. that the model's weights are untrained


class OptionScore(Message, frozen=True, kw_only=True):
    """Log-probabilities of one option, in nats.

    `raw` sums over the option's tokens, `normalized` is the mean per token, `calibrated` is `normalized`
    minus the same mean under the question asked of an empty memory (Holtzman et al. 2021, domain
    conditional PMI): what the memory says, less what the words say by themselves.
    """

    option: str
    num_tokens: int
    raw: float
    normalized: float
    calibrated: float
    probability: float  # softmax over the ranked score


class Choice(Message, frozen=True, kw_only=True):
    """Data of the reply to `ask_choice`."""

    index: int
    option: str
    margin: float  # ranked score of the best minus that of the second, nats
    rank_by: Literal["raw", "normalized", "calibrated"]
    scores: list[OptionScore]
    memory: Provenance
    timing: AnswerTiming
    notice: str | UnsetType = UNSET


# ---------------------------------------------------------------------------------- control: requests


class StreamRef(Message, frozen=True, kw_only=True):
    """Data of `cache_info`, `reset`, `stream_remove`, `stream_pause`, `stream_resume`, `marks`."""

    stream: StreamName


class MarkRef(Message, frozen=True, kw_only=True):
    """Data of `mark`, `rollback` and `mark_delete`."""

    stream: StreamName
    name: MarkName


class CancelRef(Message, frozen=True, kw_only=True):
    """Data of `cancel`: the request to end, by its id and the session that sent it."""

    id: RequestId
    session: SessionId


class StreamSpec(Message, frozen=True, kw_only=True):
    """Data of `stream_add`, and how a stream is configured; what is unset follows the node's defaults."""

    stream: StreamName
    connect: Address | UnsetType = UNSET  # of a camera that binds; absent: cameras connect to the node
    fps: RateHz | UnsetType = UNSET  # rate to keep
    stride: Count | UnsetType = UNSET  # keep every n-th frame
    gate: GreyLevels | UnsetType = UNSET  # leave out frames that changed by less; 0 leaves out none
    drop: Similarity | UnsetType = UNSET  # leave out tokens more similar to the last one kept there; 1 leaves out none
    chunk_frames: Annotated[int, Meta(ge=1, le=8)] | UnsetType = UNSET  # 1, 2, 4, 6 or 8
    layout: Literal["native", "turns"] | UnsetType = UNSET
    min_pixels: Count | UnsetType = UNSET
    max_pixels: Count | UnsetType = UNSET
    encode_width: SidePixels | UnsetType = UNSET  # explicit encode size, pixels
    encode_height: SidePixels | UnsetType = UNSET
    memory_bytes: Count | UnsetType = UNSET
    min_memory_bytes: Count | UnsetType = UNSET  # less than memory_bytes will do, down to this
    retention: RetentionName | UnsetType = UNSET
    last_frames: NumFrames | UnsetType = UNSET  # hold only the newest so many, encoded anew with each chunk; 0: off
    degrade: bool | UnsetType = UNSET  # give up quality, step by step, while there is too little time or memory


# ---------------------------------------------------------------------- control: replies and telemetry


class Empty(Message, frozen=True, kw_only=True):
    """Data of a request or reply that carries nothing."""


class Footprint(Message, frozen=True, kw_only=True):
    """What pictures take in a memory.

    After n chunks of t seconds, `opening_positions` and the larger of `picture_positions` and of
    n * `positions_per_chunk` + t * `positions_per_second` are used.
    """

    bytes_per_token: int
    chunk_frames: int
    opening_tokens: int  # what the first chunk takes beyond a later one
    tokens_per_chunk: int
    opening_positions: int
    picture_positions: int  # of one picture in a video that stays open: the clock is behind it at first
    positions_per_chunk: int
    positions_per_second: float
    max_positions: int | UnsetType = UNSET  # the length the model was trained for


class Forecast(Message, frozen=True, kw_only=True):
    """What a stream's memory will hold, as far as that is known before its first frame."""

    memory_bytes: int  # reserved: what was asked for, or what there was
    capacity_tokens: int
    encode_size: tuple[int, int] | UnsetType = UNSET  # absent: it follows the pictures, the largest are counted
    footprint: Footprint
    num_chunks: int  # that fit
    limit: MemoryLimit | UnsetType = UNSET  # what ends first; absent where only the rate would tell
    seconds_of_memory: float | UnsetType = UNSET  # of the stream, until then; absent if its rate is unknown
    seconds_of_positions: float | UnsetType = UNSET  # until the model's positions end
    load: float | UnsetType = UNSET  # expected share of the engine's time; over 1 is more than it has


class StreamAdded(Message, frozen=True, kw_only=True):
    """Data of the reply to `stream_add`."""

    forecast: Forecast | UnsetType = UNSET


class Mark(Message, frozen=True, kw_only=True):
    """A named point of a stream's memory."""

    name: str
    num_tokens: int
    num_frames: int
    until_ns: int | UnsetType = UNSET


class Marks(Message, frozen=True, kw_only=True):
    """Data of the reply to `marks`."""

    marks: list[Mark]


class CacheInfo(Message, frozen=True, kw_only=True):
    """The memory of one stream, measured from its tensors."""

    num_tokens: int
    capacity_tokens: int
    logical_bytes: int  # bytes of the K and V rows in use
    resident_bytes: int  # bytes of the storage behind them, reserved at the start
    bytes_per_token: int
    num_chunks: int
    num_frames: int  # real frames, padding not counted
    num_padded_frames: int
    positions_used: int
    positions_left: int | UnsetType = UNSET  # up to the length the model was trained for
    seconds: float | UnsetType = UNSET  # capture time between the oldest and the newest frame
    oldest_ns: int | UnsetType = UNSET
    newest_ns: int | UnsetType = UNSET
    newest_seq: int | UnsetType = UNSET
    seen_until_ns: int | UnsetType = UNSET  # frames came until then that looked like the newest one, and were gated
    seconds_until_full: float | UnsetType = UNSET  # at the present rate of tokens
    seconds_of_memory: float | UnsetType = UNSET  # without a gap, once it is full, at the present rate of tokens
    full: bool = False
    limit: MemoryLimit | UnsetType = UNSET  # of what there is no more; present while it is full
    whole_from_ns: int | UnsetType = UNSET  # nothing was forgotten since; absent if the newest part was
    num_forgotten_chunks: int = 0  # to make room, since the memory began or was reset
    num_forgotten_frames: int = 0
    seconds_forgotten: float = 0.0
    num_dropped_tokens: int = 0  # since the memory began or was reset: like those kept at their places before


class FrameCounters(Message, frozen=True, kw_only=True):
    """Frames of one stream since the node's start.

    received = dropped + encoded + pending, where pending are those still in the ring or in a chunk
    that is not complete. `dropped` is keyed by reason: see PROTOCOL.md.
    """

    received: int
    kept: int  # passed the sampler
    encoded: int  # in the memory
    pending: int
    padded: int  # copies of a last frame that filled a chunk at the end of a stream
    dropped: dict[str, int]
    gaps: int  # sequence numbers that never arrived
    forgotten: int = 0  # of the encoded ones, by the stream's retention to make room for others
    last_seq: int | UnsetType = UNSET
    last_session: str | UnsetType = UNSET  # of the publisher that sent `last_seq`


class StageTimings(Message, frozen=True, kw_only=True):
    """Mean milliseconds per chunk over the recent chunks, by stage."""

    decode_ms: float | UnsetType = UNSET  # JPEG or PNG to pixels, off the engine thread
    preprocess_ms: float | UnsetType = UNSET
    vision_ms: float | UnsetType = UNSET
    prefill_ms: float | UnsetType = UNSET


class StreamStats(Message, frozen=True, kw_only=True):
    """Telemetry `stream/<node>/<stream>/`, and an entry of `streams`."""

    v: int = PROTOCOL_VERSION
    ts: int
    stream: StreamName
    state: Literal["waiting", "online", "offline", "paused", "full", "ended"]
    layout: str
    chunk_frames: int
    retention: str | UnsetType = UNSET  # what a full memory does: see StreamSpec
    gate: float | UnsetType = UNSET  # see StreamSpec; absent: none
    drop: float | UnsetType = UNSET
    last_frames: int | UnsetType = UNSET
    received_size: tuple[int, int] | UnsetType = UNSET  # width, height
    encoded_size: tuple[int, int] | UnsetType = UNSET
    fps_received: float | UnsetType = UNSET
    fps_encoded: float | UnsetType = UNSET
    lag_ms: float | UnsetType = UNSET  # capture to memory, newest chunk; only for capture times
    load: float | UnsetType = UNSET  # share of the engine's time that its chunks take
    degraded: list[str] = []  # what the stream has given up, the first first
    cache: CacheInfo
    frames: FrameCounters
    stages: StageTimings


class Streams(Message, frozen=True, kw_only=True):
    """Data of the reply to `streams`."""

    streams: list[StreamStats]


class Vram(Message, frozen=True, kw_only=True):
    """Device memory by component. On the CPU only `weights`, `kv` and `activations_peak` are known."""

    device: str
    weights_bytes: int
    kv_bytes: int
    activations_peak_bytes: int | UnsetType = UNSET
    total_bytes: int | UnsetType = UNSET
    free_bytes: int | UnsetType = UNSET
    other_process_bytes: int | UnsetType = UNSET
    torch_allocated_bytes: int | UnsetType = UNSET
    torch_reserved_bytes: int | UnsetType = UNSET
    torch_peak_bytes: int | UnsetType = UNSET


class QuestionCounters(Message, frozen=True, kw_only=True):
    """Questions since the node's start, and recent means."""

    received: int
    answered: int
    failed: dict[str, int]  # by error code
    waiting: int
    running: int
    traces: int = 0  # answers whose fingerprint changed: anything but 0 is a defect
    mean_first_token_ms: float | UnsetType = UNSET
    mean_total_ms: float | UnsetType = UNSET


class NodeStats(Message, frozen=True, kw_only=True):
    """Telemetry `stats/<node>/`, and the reply to `status`."""

    v: int = PROTOCOL_VERSION
    ts: int
    state: Literal["starting", "ready", "stopping"]
    uptime_s: float
    engine_progress_age_ms: float  # since the engine thread last came round
    model: str
    vram: Vram
    questions: QuestionCounters
    rejected: dict[str, int]  # malformed or refused messages, by reason, over all sockets
    host_rss_bytes: int | UnsetType = UNSET


class Pong(Message, frozen=True, kw_only=True):
    """Reply to `ping`, answered without the engine: live and ready are different facts."""

    live: bool
    ready: bool
    engine_progress_age_ms: float


class Hello(Message, frozen=True, kw_only=True):
    """Telemetry `hello/<node>/` on each new subscription, and the reply to `hello`."""

    v: int = PROTOCOL_VERSION
    protocol: str = "1.0"
    features: list[str]
    node: str
    session: str
    version: str
    model: str
    model_type: str
    dtype: str
    device: str
    endpoints: dict[str, str]
    max_question_chars: int
    max_new_tokens: int
    max_options: int
    streams: list[StreamName]
    notice: str | UnsetType = UNSET


class Event(Message, frozen=True, kw_only=True):
    """Telemetry `event/<node>/`: something changed."""

    v: int = PROTOCOL_VERSION
    ts: int
    kind: str
    stream: StreamName | UnsetType = UNSET
    message: str
    details: dict[str, Any] = {}
