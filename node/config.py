"""What the operator decides: one frozen `NodeConfig` from node.toml, the environment and the command line.

Later sources win: defaults, node.toml, `ONLOOKER_…` variables (`ONLOOKER_QUESTIONS__MAX_WAITING=8`), flags.
Everything is checked here, once; every mistake is reported with the path of its key.
"""

import difflib
import os
import re
import socket
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from ..protocol.codec import check_stream_name
from ..protocol.errors import DecodeError, ErrorCode, NodeError
from ..protocol.messages import UNSET, RetentionName, StreamSpec
from ..protocol.quantity import bytes_text
from ..protocol.sockets import (
    ASK_ENDPOINT,
    CONTROL_ENDPOINT,
    FRAMES_ENDPOINT,
    TELEMETRY_ENDPOINT,
    is_loopback,
)
from .chunk import CHUNK_FRAMES
from .options import StreamOptions

ENV_PREFIX = "ONLOOKER_"
MAX_IPC_PATH_BYTES = 107  # sockaddr_un
MAX_NAME_CHARS = 64
MIN_SCRATCH_TOKENS = 64  # the words around a question, and some of an answer

_TCP = re.compile(r"tcp://(?P<host>\[[0-9A-Fa-f:.]+\]|[^\s:\[\]/]+):(?P<port>\*|[0-9]{1,5})")


class ConfigError(ValueError):
    """A configuration that cannot work; `problems` holds one line for each mistake."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


def _checked_endpoint(endpoint: str) -> str:
    if endpoint.startswith("ipc://"):
        path = endpoint.removeprefix("ipc://")
        if not path or path == "*":
            raise ValueError("ipc:// must be followed by a path")
        if len(os.fsencode(path)) > MAX_IPC_PATH_BYTES:
            raise ValueError(f"an ipc path is at most {MAX_IPC_PATH_BYTES} bytes long")
        return endpoint
    match = _TCP.fullmatch(endpoint)
    if match is None or (match["port"] != "*" and int(match["port"]) > 65535):
        raise ValueError("must be tcp://host:port (port * picks a free one) or ipc:///path")
    return endpoint


def _checked_peer(endpoint: str) -> str:
    if endpoint.endswith(":*"):
        raise ValueError("a port to connect to is needed")
    return endpoint


def _checked_name(name: str) -> str:
    try:
        return check_stream_name(name)
    except DecodeError as error:
        raise ValueError(str(error)) from error


def _checked_chunk_frames(num: int) -> int:
    if num not in CHUNK_FRAMES:
        raise ValueError(f"must be one of {', '.join(map(str, CHUNK_FRAMES))}")
    return num


def _checked_device(device: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?|balanced", device):
        raise ValueError("must be auto, cpu, cuda, cuda:N or balanced")
    return device


def _whole_number(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


def _whole_size(value: object) -> object:
    """Pydantic reads a size up to the first character that it does not know, and leaves out the rest."""
    if isinstance(value, str) and not re.fullmatch(r"\s*\d+(\.\d+)?\s*([kmgtp]i?b?|b)?\s*", value, re.IGNORECASE):
        raise ValueError("must be a size such as 512MiB or 1.5GB")
    return _whole_number(value)


Endpoint = Annotated[str, AfterValidator(_checked_endpoint)]
Bytes = Annotated[ByteSize, BeforeValidator(_whole_size), Field(ge=1)]
Name = Annotated[str, AfterValidator(_checked_name)]
Count = Annotated[int, BeforeValidator(_whole_number), Field(ge=1, le=2**31)]
Seconds = Annotated[float, BeforeValidator(_whole_number), Field(gt=0, le=86_400, allow_inf_nan=False)]
Pixels = Annotated[int, BeforeValidator(_whole_number), Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Endpoints(_Section):
    """Where the node listens: tcp://host:port, where port * picks a free one, or ipc:///path."""

    frames: Endpoint = Field(default=FRAMES_ENDPOINT, description="cameras that connect publish here")
    ask: Endpoint = Field(default=ASK_ENDPOINT, description="questions")
    control: Endpoint = Field(default=CONTROL_ENDPOINT, description="ping, status, streams, reset, marks")
    telemetry: Endpoint = Field(default=TELEMETRY_ENDPOINT, description="records for dashboards")

    @model_validator(mode="after")
    def _check_distinct(self) -> "Endpoints":
        fixed = [endpoint for endpoint in self.model_dump().values() if not endpoint.endswith(":*")]
        twice = sorted({endpoint for endpoint in fixed if fixed.count(endpoint) > 1})
        if twice:
            raise ValueError(f"{twice[0]} is given to two sockets")
        return self


class Security(_Section):
    """Who may connect."""

    curve: Literal["off", "required"] = Field(
        default="off", description='"required": every socket is encrypted and only listed keys may connect'
    )
    server_key: Path | None = Field(
        default=None,
        description="this node's secret key, written by `onlooker keygen`",
        examples=["/etc/onlooker/node.key_secret"],
    )
    client_keys: Path | None = Field(
        default=None,
        description="folder of allowed public keys, one *.key file each",
        examples=["/etc/onlooker/clients"],
    )
    insecure: bool = Field(
        default=False, description="true: listen beyond this machine with curve off; warned about at every start"
    )

    @model_validator(mode="after")
    def _check_keys(self) -> "Security":
        if self.curve == "required":
            for name in ("server_key", "client_keys"):
                if getattr(self, name) is None:
                    raise ValueError(f'{name} is needed when curve = "required"')
        return self


class Questions(_Section):
    """Limits of what clients may ask."""

    max_waiting: Count = Field(default=32, description="questions that wait for the engine; one more is answered BUSY")
    max_per_client: Count = Field(
        default=4, description="of one session or connection, waiting and running; one more is answered BUSY"
    )
    max_concurrent: Count = Field(default=8, description="questions decoded together")
    default_deadline_s: Seconds = Field(default=60.0, description="for requests that name no deadline")
    max_new_tokens: Count = Field(default=1024, description="the longest answer a client may ask for")
    max_question_chars: Count = Field(default=8192, description="a longer question is answered TOO_LARGE")
    max_options: Annotated[Count, Field(ge=2)] = Field(default=32, description="options of a multiple choice")
    scratch_tokens: Annotated[Count, Field(ge=MIN_SCRATCH_TOKENS)] = Field(
        default=2048,
        description=f"private memory of each question, for its words and its answer; {MIN_SCRATCH_TOKENS} or more",
    )


class StreamLimits(_Section):
    """What all streams may take together; a stream beyond that is not added."""

    max_streams: Count = Field(default=16, description="how many there may be")
    max_memory_bytes: Bytes | None = Field(
        default=None,
        description="for all memories; without it, on the CPU half of what the machine has left",
        examples=["8GiB"],
    )
    max_load: Annotated[float, BeforeValidator(_whole_number), Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=None,
        description="share of the engine's time that their chunks may take, as far as foreseen; without it, any",
        examples=[0.9],
    )


class StreamDefaults(_Section):
    """Settings of every stream that does not say otherwise."""

    fps: Annotated[float, BeforeValidator(_whole_number), Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=None, description="frames per second to keep; without it, all of them", examples=[2.0]
    )
    stride: Count = Field(default=1, description="keep every n-th frame")
    gate: Annotated[float, BeforeValidator(_whole_number), Field(ge=0, le=255)] | None = Field(
        default=None,
        description="leave out a frame in which nothing has changed by so many grey levels; one passes every 10 s",
        examples=[10.0],
    )
    drop: Annotated[float, BeforeValidator(_whole_number), Field(ge=0, le=1)] | None = Field(
        default=None,
        description="leave out a token more similar (cosine) to the last one kept at its place; off without it",
        examples=[0.95],
    )
    chunk_frames: Annotated[int, AfterValidator(_checked_chunk_frames)] = Field(
        default=4, description="frames encoded together: 1 (images), 2 (least delay), 4, 6 or 8 (most throughput)"
    )
    layout: Literal["native", "turns"] = Field(
        default="native", description="native: one open video; turns: a user turn for each chunk"
    )
    min_pixels: Pixels | None = Field(
        default=None,
        description="encode size: smaller frames are enlarged; without it, the model's own bound",
        examples=[3136],
    )
    max_pixels: Pixels | None = Field(
        default=None,
        description="encode size: larger frames are reduced; without it, the model's own bound",
        examples=[602112],
    )
    encode_size: tuple[Pixels, Pixels] | None = Field(
        default=None,
        description="encode every frame at this width and height; wins over the pixel bounds",
        examples=[[640, 360]],
    )
    memory_bytes: Bytes = Field(
        default=ByteSize(1 << 30), description="keys and values, reserved when the stream is added"
    )
    min_memory_bytes: Bytes | None = Field(
        default=None,
        description="the least that will do where others need the rest; without it, not less than memory_bytes",
        examples=["256MiB"],
    )
    retention: RetentionName = Field(
        default="stop",
        description="when full: stop, reset (start over), window (keep the newest), thin (and ever less of older)",
    )
    last_frames: Annotated[int, BeforeValidator(_whole_number), Field(ge=0, le=2**31)] = Field(
        default=0,
        description="hold only the newest chunks, of so many frames at most, encoded anew with each chunk; 0: off",
    )
    degrade: bool = Field(
        default=False,
        description="true: give up quality, step by step, while the node has too little time or memory: see [degrade]",
    )
    ring_frames: Count = Field(
        default=64, description="frames that wait to be sampled; the oldest is dropped for a new one"
    )
    camera_key: Path | None = Field(
        default=None,
        description='public key of a camera to connect to; needed with curve = "required", and only then allowed',
        examples=["/etc/onlooker/cameras/gate.key"],
    )


class Stream(StreamDefaults):
    """One stream the node starts with; what is not set follows the defaults."""

    name: Name = Field(description="in the topics of its frames", examples=["gate"])
    connect: Annotated[Endpoint, AfterValidator(_checked_peer)] | None = Field(
        default=None,
        description="a camera that binds; ipc:///path is allowed here, not over the wire",
        examples=["tcp://192.168.1.20:5555"],
    )


class Degrade(_Section):
    """When streams with degrade = true give up quality, and when they get it back."""

    max_lag_ms: Annotated[float, BeforeValidator(_whole_number), Field(gt=0, allow_inf_nan=False)] = Field(
        default=2000.0, description="a chunk that comes into the memory so much later than the fastest did is too late"
    )
    min_free_bytes: Bytes = Field(
        default=ByteSize(512 << 20), description="less free memory on the device is too little, whoever takes it"
    )
    settle_s: Seconds = Field(default=5.0, description="between two steps down")
    recover_s: Seconds = Field(default=60.0, description="without shortage, before each step up")
    recover_load: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.5, description="no step up while chunks take more of the engine's time than this share"
    )


class Telemetry(_Section):
    """How often records are published."""

    period_s: Annotated[Seconds, Field(ge=0.05, le=60)] = Field(
        default=1.0, description="seconds between two of one topic"
    )


class Log(_Section):
    """What is written to standard error."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="debug, info, warning or error"
    )
    format: Literal["text", "json"] = Field(default="text", description="text or json, one line each")


def host_slug() -> str:
    """The host's name, with what a topic cannot hold replaced."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", socket.gethostname()).strip("-")[:MAX_NAME_CHARS] or "node"


class NodeConfig(BaseSettings):
    """Every setting of a node. Raises pydantic's ValidationError; `load` turns it into a ConfigError."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_prefix=ENV_PREFIX, env_nested_delimiter="__")

    name: Name = Field(
        default_factory=host_slug,
        description="in topics and replies; without it, the name of the host",
        examples=["gate"],
    )
    model: Annotated[str, Field(min_length=1)] = Field(
        default="builtin", description='a folder, a hub id such as Qwen/Qwen2.5-VL-3B-Instruct, or "builtin"'
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto (as the weights are stored), float32, bfloat16 or float16"
    )
    device: Annotated[str, AfterValidator(_checked_device)] = Field(
        default="auto", description="auto, cpu, cuda, cuda:N, or balanced: spread over several GPUs by accelerate"
    )
    compile: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="auto (large models on a GPU), on or off: compiled layers; the first start takes longer",
    )
    max_together: Count | None = Field(
        default=None,
        description="of how many streams small chunks are encoded at once; without it 4 on a GPU, 1 on a CPU",
        examples=[1],
    )
    endpoints: Endpoints = Endpoints()
    security: Security = Security()
    questions: Questions = Questions()
    limits: StreamLimits = StreamLimits()
    stream_defaults: StreamDefaults = StreamDefaults()
    degrade: Degrade = Degrade()
    telemetry: Telemetry = Telemetry()
    log: Log = Log()
    streams: tuple[Stream, ...] = ()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what it is given: `load` merges the file, the environment and the flags."""
        return (init_settings,)

    @model_validator(mode="after")
    def _check(self) -> "NodeConfig":
        self._check_exposure()
        self._check_camera_key(self.stream_defaults.camera_key, "stream_defaults.camera_key")
        names = [stream.name for stream in self.streams]
        for index, stream in enumerate(self.streams):
            try:
                self._check_stream(stream, names[:index])
            except ValueError as error:
                raise ValueError(f"streams[{index}] ({stream.name}): {error}") from None
        self._check_limits()
        return self

    def _check_limits(self) -> None:
        """Find before a model is loaded what would keep the streams from being added to it."""
        num, limits = len(self.streams), self.limits
        if num > limits.max_streams:
            raise ValueError(
                f"limits.max_streams: must be at least {num}, for that many streams, got {limits.max_streams}"
            )
        needed_bytes = sum(self.stream_options(stream).guaranteed_bytes for stream in self.streams)
        if limits.max_memory_bytes is not None and needed_bytes > limits.max_memory_bytes:
            raise ValueError(
                f"limits.max_memory_bytes: must be at least {needed_bytes} ({bytes_text(needed_bytes)}),"
                f" for all streams, got {bytes_text(limits.max_memory_bytes)}"
            )

    def _check_exposure(self) -> None:
        if self.security.curve == "required" or self.security.insecure:
            return
        for socket_name, endpoint in self.exposed_endpoints().items():
            raise ValueError(
                f"endpoints.{socket_name}: {endpoint} can be reached from other machines, by anybody; "
                'set security.curve = "required", or security.insecure = true (--insecure) to allow it'
            )

    def _check_stream(self, stream: Stream, names_before: Sequence[str]) -> None:
        if stream.name in names_before:
            raise ValueError("another stream has this name")
        self.stream_options(stream)

    def _check_camera_key(self, key: Path | None, name: str) -> None:
        if key is not None and self.security.curve != "required":
            # Without curve the link to the camera would be open, and the key a promise that nobody keeps.
            raise ValueError(f'{name}: a camera is known by its key only when security.curve = "required"')

    def camera_keys(self) -> dict[str, Path]:
        """The key files of cameras, by the setting that names them."""
        keys = {"stream_defaults.camera_key": self.stream_defaults.camera_key}
        keys |= {f"streams[{i}] ({s.name}).camera_key": s.camera_key for i, s in enumerate(self.streams)}
        return {name: key for name, key in keys.items() if key is not None}

    def exposed_endpoints(self) -> dict[str, str]:
        """The endpoints that other machines can reach, by socket."""
        return {name: e for name, e in self.endpoints.model_dump().items() if not is_loopback(e)}

    def stream_options(self, stream: Stream) -> StreamOptions:
        """The settings of a configured stream. Raises ValueError naming the field."""
        return self._options(stream.model_dump(exclude_unset=True))

    def spec_options(self, spec: StreamSpec) -> StreamOptions:
        """The settings of a stream asked for over the wire. Raises NodeError BAD_REQUEST naming the field.

        Its camera is one of tcp://: an ipc:// endpoint names a file, which is the operator's alone to do.
        """
        asked = {name: getattr(spec, name) for name in spec.__struct_fields__ if name != "stream"}
        values: dict[str, Any] = {name: value for name, value in asked.items() if value is not UNSET}
        values["name"] = spec.stream
        try:
            _check_wire_peer(values.get("connect"))
            values |= _encode_size(values.pop("encode_width", None), values.pop("encode_height", None))
            return self._options(Stream.model_validate(values).model_dump(exclude_unset=True))
        except ValidationError as error:
            message = "; ".join(_problem(Stream, detail) for detail in error.errors())
            field = str((error.errors()[0]["loc"] or ("",))[0])
            raise NodeError(ErrorCode.BAD_REQUEST, message, details={"path": f"$.data.{field}"}) from error
        except ValueError as error:
            raise NodeError(ErrorCode.BAD_REQUEST, str(error)) from error

    def _options(self, values: Mapping[str, Any]) -> StreamOptions:
        merged = {**self.stream_defaults.model_dump(), **values}
        key = merged["camera_key"]
        self._check_camera_key(key, "camera_key")
        if merged.get("connect") and self.security.curve == "required" and key is None:
            raise ValueError('camera_key: connecting to a camera needs its key when curve = "required"')
        merged["camera_key"] = None if key is None else str(key)
        for name in ("memory_bytes", "min_memory_bytes"):
            merged[name] = None if merged[name] is None else int(merged[name])  # a plain number, as in messages
        if merged["min_memory_bytes"] is not None and "min_memory_bytes" not in values:
            merged["min_memory_bytes"] = min(merged["min_memory_bytes"], merged["memory_bytes"])  # a default yields
        return StreamOptions(**merged)


def load(
    path: Path | None = None,
    overrides: Mapping[str, object] | None = None,
    *,
    streams: Iterable[str] = (),
) -> NodeConfig:
    """Read, merge and check a configuration.

    `overrides` maps dotted keys (`questions.max_waiting`) to values; `streams` names streams to start beside
    those of the file. Raises ConfigError.
    """
    values = _read_toml(path) if path else {}
    _merge(values, _environment())
    for key, value in (overrides or {}).items():
        _merge(values, _nested(key, value))
    _add_streams(values, streams)
    try:
        return NodeConfig(**values)
    except ValidationError as error:
        source = f"{path}: " if path else ""
        raise ConfigError([source + _problem(NodeConfig, detail) for detail in error.errors()]) from error


def parse_setting(text: str) -> tuple[str, object]:
    """Split `key=value`; the value is read as TOML, or as plain text if it is none. Raises ConfigError."""
    key, equals, value = text.partition("=")
    key, value = key.strip(), value.strip()
    if not equals or not key:
        raise ConfigError([f"{text!r} is not key=value"])
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError([f"{path}: {reason}"]) from error


def _environment() -> dict[str, Any]:
    for variable in sorted(os.environ):
        key = variable.upper().removeprefix(ENV_PREFIX).partition("__")[0].lower()
        if variable.upper().startswith(ENV_PREFIX) and key not in NodeConfig.model_fields:
            raise ConfigError([f"{variable}: unknown key{_suggestion(key, NodeConfig)}"])
    try:
        return EnvSettingsSource(NodeConfig)()
    except SettingsError as error:
        raise ConfigError([f"environment: {error}: {error.__cause__}"]) from error


def _merge(values: dict[str, Any], later: Mapping[str, Any]) -> None:
    for key, value in later.items():
        below = values.get(key)
        if isinstance(below, dict) and isinstance(value, Mapping):
            _merge(below, value)
        else:
            values[key] = value


def _nested(key: str, value: object) -> dict[str, Any]:
    *tables, last = key.split(".")
    nested: dict[str, Any] = {last: value}
    for table in reversed(tables):
        nested = {table: nested}
    return nested


def _add_streams(values: dict[str, Any], names: Iterable[str]) -> None:
    configured = values.get("streams", [])
    if not isinstance(configured, list):
        return  # the check that follows says so
    known = {stream.get("name") for stream in configured if isinstance(stream, dict)}
    added = [{"name": name} for name in dict.fromkeys(names) if name not in known]
    if added:
        values["streams"] = [*configured, *added]


def _check_wire_peer(endpoint: str | None) -> None:
    if endpoint is not None and not endpoint.startswith("tcp://"):
        raise ValueError(f"connect: must be tcp://host:port over the wire, got {endpoint!r}")


def _encode_size(width: int | None, height: int | None) -> dict[str, tuple[int, int]]:
    if width is None and height is None:
        return {}
    if width is None or height is None:
        raise ValueError("encode_width and encode_height go together")
    return {"encode_size": (width, height)}


def _problem(model: type[BaseModel], detail: Any) -> str:
    """One line for one of pydantic's complaints, beginning with the path of the key."""
    path, section = "", model
    for part in detail["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f"{'.' if path else ''}{part}"
    for part in detail["loc"][:-1]:
        section = _section_of(section, part) if section and isinstance(part, str) else section
    if detail["type"] == "extra_forbidden":
        return f"{path}: unknown key{_suggestion(str(detail['loc'][-1]), section)}"
    message = detail["msg"].removeprefix("Value error, ")
    if not detail["loc"] or (detail["type"] in ("missing", "value_error") and isinstance(detail["input"], dict)):
        return f"{path}: {message}" if path else message
    got = f", got {detail['input']!r}"
    return f"{path}: {message[:1].lower()}{message[1:].removesuffix(got)}{got}"


def _section_of(section: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The model behind a key, if it is a table or a list of tables."""
    field = section.model_fields.get(key)
    if field is None:
        return None
    for candidate in (field.annotation, *get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _suggestion(key: str, section: type[BaseModel] | None) -> str:
    known = list(section.model_fields) if section else []
    near = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}" if known else ""
