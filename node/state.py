"""What the node knows of itself, for those who ask and those who watch."""

import os
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from msgspec import UNSET, UnsetType

from ..protocol.errors import ErrorCode, NodeError
from ..protocol.messages import Hello, NodeStats, Pong, StreamStats
from .allotment import Allotment, default_memory_bytes
from .config import Endpoints, NodeConfig
from .engine_protocol import EngineProtocol, ModelInfo
from .intake import Intake
from .question_limits import QuestionLimits
from .tally import Tally

MAX_PROGRESS_AGE_MS = 10_000  # an engine that has not come round for longer is not ready

FEATURES: Sequence[str] = (
    "ask",
    "ask_choice",
    "partial",
    "cancel",
    "marks",
    "streams",
    "forecast",
    "retention",
    "gate",
    "drop",
    "last_frames",
    "degrade",
)


class NodeState:
    """Facts that any thread may read. The engine and the intake are there once the model is loaded."""

    def __init__(self, config: NodeConfig) -> None:
        self.config = config
        self.session = uuid.uuid4().hex
        self.rejected = Tally()
        self.is_stopping = False
        self.is_adding = False  # the streams of the configuration, one after the other
        self._bound: dict[str, str] = {}
        self._started = time.monotonic()
        self._engine: EngineProtocol | None = None
        self._intake: Intake | None = None
        self._allotment: Allotment | None = None

    def attach(self, engine: EngineProtocol, intake: Intake) -> None:
        """From now on the node has a model, and cameras."""
        limits = self.config.limits
        allowed = limits.max_memory_bytes
        # int: the settings' own type is none of a message's.
        max_memory_bytes = default_memory_bytes(engine.model.device) if allowed is None else int(allowed)
        promised = {stream.name: self.config.stream_options(stream).guaranteed_bytes for stream in self.config.streams}
        self._allotment = Allotment(limits.max_streams, max_memory_bytes, promised)
        self._intake = intake
        self._engine = engine

    def listens(self, socket: str, endpoint: str) -> None:
        """Note where a socket was bound."""
        self._bound = {**self._bound, socket: endpoint}

    @property
    def endpoints(self) -> dict[str, str]:
        """Where the sockets were bound, in the order of the configuration."""
        return {name: self._bound[name] for name in Endpoints.model_fields if name in self._bound}

    @property
    def engine(self) -> EngineProtocol:
        """Raises NodeError NOT_READY while the model is loaded."""
        if self._engine is None:
            raise NodeError(ErrorCode.NOT_READY, "the model is being loaded", retry_after_ms=1000)
        return self._engine

    @property
    def intake(self) -> Intake:
        """Raises NodeError NOT_READY while the model is loaded."""
        if self._intake is None:
            raise NodeError(ErrorCode.NOT_READY, "the model is being loaded", retry_after_ms=1000)
        return self._intake

    @property
    def allotment(self) -> Allotment:
        """What the streams may take. Raises NodeError NOT_READY while the model is loaded."""
        if self._allotment is None:
            raise NodeError(ErrorCode.NOT_READY, "the model is being loaded", retry_after_ms=1000)
        return self._allotment

    @property
    def ready_engine(self) -> EngineProtocol:
        """The engine, if it takes questions now. Raises NodeError NOT_READY."""
        if self.is_stopping:
            raise NodeError(ErrorCode.NOT_READY, "the node is stopping")
        if not self.engine.is_ready or self.is_adding:
            raise NodeError(ErrorCode.NOT_READY, "the engine is starting", retry_after_ms=1000)
        return self.engine

    @property
    def phase(self) -> Literal["starting", "ready", "stopping"]:
        if self.is_stopping:
            return "stopping"
        is_ready = self._engine is not None and self._engine.is_ready and not self.is_adding
        return "ready" if is_ready else "starting"

    @property
    def limits(self) -> QuestionLimits:
        return QuestionLimits.of(self.config.questions, self.engine.model)

    def check_stream(self, stream: str) -> None:
        """Raises NodeError UNKNOWN_STREAM, which names the streams there are."""
        streams = self.engine.streams()
        if stream not in streams:
            details = {"streams": sorted(streams)}
            raise NodeError(ErrorCode.UNKNOWN_STREAM, f"there is no stream {stream!r}", details=details)

    def pong(self) -> Pong:
        """The engine is ready if it is loaded and came round lately: one long step may make it unready for a while."""
        age_ms = self._engine.progress_age_ms if self._engine is not None else self._uptime_s * 1e3
        is_ready = self.phase == "ready" and age_ms < MAX_PROGRESS_AGE_MS
        return Pong(live=True, ready=is_ready, engine_progress_age_ms=age_ms)

    def hello(self) -> Hello:
        model, limits = self.engine.model, self.limits
        return Hello(
            features=list(FEATURES),
            node=self.config.name,
            session=self.session,
            version=version("onlooker"),
            model=model.name,
            model_type=model.model_type,
            dtype=model.dtype,
            device=model.device,
            endpoints=self.endpoints,
            max_question_chars=limits.max_question_chars,
            max_new_tokens=limits.max_new_tokens,
            max_options=limits.max_options,
            streams=sorted(self.engine.streams()),
            notice=_notice(model),
        )

    def stats(self) -> NodeStats:
        engine = self.engine
        rejected = Counter(self.rejected.counts())
        rejected.update(self.intake.rejected)
        return NodeStats(
            ts=time.time_ns(),
            state=self.phase,
            uptime_s=self._uptime_s,
            engine_progress_age_ms=engine.progress_age_ms,
            model=engine.model.name,
            vram=engine.vram(),
            questions=engine.question_counters(),
            rejected=dict(rejected),
            host_rss_bytes=host_rss_bytes(),
        )

    def stream_stats(self) -> list[StreamStats]:
        """One record a stream, by name."""
        return sorted(self.intake.stream_stats(), key=lambda stats: stats.stream)

    @property
    def _uptime_s(self) -> float:
        return time.monotonic() - self._started


def host_rss_bytes() -> int | UnsetType:
    """Resident memory of this process; unset where the kernel does not tell."""
    try:
        num_pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return UNSET
    return num_pages * os.sysconf("SC_PAGE_SIZE")


def _notice(model: ModelInfo) -> str | UnsetType:
    return UNSET if model.notice is None else model.notice
