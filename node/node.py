"""The node: it owns the sockets and threads, and the order in which they begin and end."""

import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeVar

import msgspec
import zmq

from ..protocol.errors import NodeError, OnlookerError
from ..protocol.messages import Pong
from ..protocol.sockets import MAX_REQUEST_BYTES, bind, open_socket
from .config import NodeConfig
from .control import Control
from .degradation import Degradation
from .engine_protocol import EngineProtocol
from .intake import Intake
from .ipc_lock import IpcLock
from .ladder import Bounds
from .questions import Questions
from .requests import Endpoint, Limits, Steps
from .security import RefusedPeers, Security
from .server import Server
from .state import NodeState
from .telemetry import MAX_SUBSCRIPTION_BYTES, Announce, Telemetry

logger = logging.getLogger(__name__)

NUM_IO_THREADS = 2
MAX_OPEN_CONTROL = 64
CONTROL_RETRY_MS = 200
STREAM_TIMEOUT_S = 60.0
ENGINE_CHECK_S = 0.5
CONTEXT_END_S = 2.0  # above the linger of every socket

T = TypeVar("T")


class StartError(OnlookerError):
    """The node cannot start; the message names the setting at fault."""


class EngineFailedError(OnlookerError):
    """The engine has ended by itself. The log says why; only a new process can go on."""


class Node:
    """A memory of cameras that answers over ZeroMQ.

        with Node(config, engine) as node:
            print(node.endpoints)
            node.run()  # until another thread calls request_stop

    Without an engine it starts all the same: it answers `ping`, and everything else with NOT_READY, until
    `attach` gives it one. The engine stays the caller's, who closes it after the node.
    """

    def __init__(self, config: NodeConfig, engine: EngineProtocol | None = None) -> None:
        """Raises ConfigError for keys that cannot be read."""
        self._config = config
        self._engine = engine
        self._should_stop = threading.Event()
        self._open = ExitStack()  # closes what is open, the last first
        self._has_started = False
        self._state = NodeState(config)
        self._security = Security(config.security, config.camera_keys())

    def __enter__(self) -> "Node":
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def endpoints(self) -> dict[str, str]:
        """Where the node listens, with the ports that were taken."""
        return self._state.endpoints

    @property
    def session(self) -> str:
        """New at each start."""
        return self._state.session

    def start(self) -> None:
        """Bind and begin to answer. Raises StartError, with nothing left open. A node starts only once."""
        try:
            self._start()
            if self._engine is not None:
                self.attach(self._engine)
            self._has_started = True
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        self._warn_of_exposure()
        for name, endpoint in self._config.endpoints.model_dump().items():
            if endpoint.startswith("ipc://"):
                lock = _starting(f"endpoints.{name}", partial(IpcLock, endpoint))
                self._open.callback(lock.close)
        self._context = zmq.Context(NUM_IO_THREADS)
        self._open.callback(self._end_context)
        _starting("security", partial(self._security.start, self._context))
        self._open.callback(self._security.close)
        telemetry = self._start_telemetry()
        ask = self._start_ask(telemetry.announce)
        settings = self._config
        bounds, period_s = Bounds(**settings.degrade.model_dump()), settings.telemetry.period_s
        self._degradation = Degradation(self._state, telemetry.announce, bounds, period_s)
        self._control = Control(self._state, telemetry.announce, ask.cancel, self._degradation)
        self._start_server("control", self._control.endpoints(), self._control_limits(), telemetry.announce)

    def attach(self, engine: EngineProtocol) -> None:
        """Give the node its engine: cameras are let in, and the configured streams are added.

        Raises StartError if the frames endpoint cannot be had, or a stream cannot be added.
        """
        self._engine = engine
        intake = Intake(engine, context=self._context, bind=self._config.endpoints.frames, secure=self._security.secure)
        self._open.callback(intake.close)
        _starting(f"endpoints.frames: cannot listen at {self._config.endpoints.frames}", intake.start)
        self._state.listens("frames", intake.bound_endpoint or self._config.endpoints.frames)
        self._state.is_adding = True
        self._state.attach(engine, intake)
        engine.relieve = self._degradation.relieve
        self._degradation.start()
        self._open.callback(self._degradation.close)
        for stream in self._config.streams:
            steps = self._control.add_stream(self._config.stream_options(stream))
            _starting(f"stream {stream.name}", partial(_run_steps, steps))
        self._state.is_adding = False
        model = engine.model
        facts = {"node": self._config.name, "model": model.name, "dtype": model.dtype, "device": model.device}
        logger.info("ready", extra={"facts": {**facts, **self._state.endpoints}})

    def run(self, observe: Callable[[Pong], None] | None = None) -> None:
        """Wait until `request_stop`, and tell `observe` how the engine does, some times a second.

        Raises EngineFailedError if the engine ends before that.
        """
        while not self._should_stop.wait(ENGINE_CHECK_S):
            if observe is not None:
                observe(self._state.pong())
            if self._engine is not None and not self._engine.is_ready:
                raise EngineFailedError("the engine has ended; the node cannot go on without it")

    def request_stop(self) -> None:
        """Make `run` return, and refuse new questions. For any thread."""
        self._state.is_stopping = True
        self._should_stop.set()

    def close(self) -> None:
        """Answer what is open with NOT_READY, and close everything, in bounded time."""
        self.request_stop()
        self._open.close()
        if self._has_started:
            self._has_started = False
            logger.info("stopped")

    # Parts

    def _end_context(self) -> None:
        """End the context, which waits for all its sockets, and so for ever if a thread is stuck with one."""
        ending = threading.Thread(target=self._context.term, name="context-end", daemon=True)
        ending.start()
        ending.join(CONTEXT_END_S)
        if ending.is_alive():
            logger.error("a thread of the node has not ended: its sockets are left open")

    def _warn_of_exposure(self) -> None:
        if self._config.security.curve == "off":
            for name, endpoint in self._config.exposed_endpoints().items():
                logger.warning("insecure: anybody who reaches %s may use the %s socket", endpoint, name)

    def _start_telemetry(self) -> Telemetry:
        socket, refused = self._listen("telemetry", zmq.XPUB, MAX_SUBSCRIPTION_BYTES)
        socket.set(zmq.XPUB_VERBOSE, 1)  # tells of every subscription: each newcomer is greeted
        telemetry = Telemetry(socket, self._state, refused=refused, period_s=self._config.telemetry.period_s)
        self._open.callback(telemetry.close)
        telemetry.start()
        return telemetry

    def _start_ask(self, announce: Announce) -> Server:
        settings, questions = self._config.questions, Questions(self._state, announce)
        limits = Limits(
            max_open=settings.max_concurrent + settings.max_waiting,
            max_per_client=settings.max_per_client,
            default_deadline_s=settings.default_deadline_s,
            retry_after_ms=questions.retry_after_ms,
        )
        return self._start_server("ask", questions.endpoints(), limits, announce)

    def _control_limits(self) -> Limits:
        return Limits(
            max_open=MAX_OPEN_CONTROL,
            max_per_client=MAX_OPEN_CONTROL,
            default_deadline_s=self._config.questions.default_deadline_s,
            retry_after_ms=lambda: CONTROL_RETRY_MS,
        )

    def _start_server(
        self, name: str, endpoints: dict[str, Endpoint[Any]], limits: Limits, announce: Announce
    ) -> Server:
        socket, refused = self._listen(name, zmq.ROUTER, MAX_REQUEST_BYTES)
        server = Server(
            socket,
            endpoints,
            node=self._config.name,
            session=self._state.session,
            limits=limits,
            rejected=self._state.rejected,
            refused=refused,
            on_internal=lambda endpoint, error_id: announce(
                "request_failed", f"{endpoint} failed by a defect of the node", error_id=error_id
            ),
            name=name,
        )
        self._open.callback(server.close)
        server.start()
        return server

    def _listen(self, name: str, kind: int, max_message_bytes: int) -> tuple[zmq.Socket[bytes], RefusedPeers]:
        """Bind one of the sockets, secured and watched."""
        endpoint = getattr(self._config.endpoints, name)
        socket = open_socket(self._context, kind, max_message_bytes=max_message_bytes)
        self._security.secure(socket, "bind")
        refused = RefusedPeers(socket, name, self._state.rejected)
        try:
            bound = _starting(f"endpoints.{name}: cannot listen at {endpoint}", lambda: bind(socket, endpoint))
        except StartError:
            refused.close()
            socket.close()
            raise
        self._state.listens(name, bound)
        return socket, refused


def _starting(what: str, start: Callable[[], T]) -> T:
    """Say of what keeps the node from starting where it comes from."""
    try:
        return start()
    except (zmq.ZMQError, OSError, ValueError, RuntimeError, NodeError, TimeoutError) as error:
        raise StartError(f"{what}: {error}") from error


def _run_steps(steps: Steps[msgspec.Struct]) -> None:
    """Take the steps of an endpoint one by one, waiting for each."""
    try:
        awaited = next(steps)
        while True:
            try:
                result = awaited.result(STREAM_TIMEOUT_S)
            except Exception as error:
                awaited = steps.throw(error)
            else:
                awaited = steps.send(result)
    except StopIteration:
        return
