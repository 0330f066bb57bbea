"""The way from a tool to a node's frames socket: the streams it needs, and a publisher for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import typer
from msgspec import UNSET

from ..protocol.camera import FramePublisher
from ..protocol.client import NodeClient
from ..protocol.errors import ErrorCode, NodeError, NoReplyError
from ..protocol.forecast import tokens_of
from ..protocol.interface import VideoMemory
from ..protocol.messages import Forecast, StreamAdded, StreamSpec, StreamStats
from ..protocol.sockets import ASK_ENDPOINT, CONTROL_ENDPOINT, FRAMES_ENDPOINT
from .connection import Keys, NoNodeError, check_keys, open_client, wait_ready
from .quantity import bytes_text, seconds_text

# Below the ring of a node with default settings, above the pictures of the largest chunk.
LOSSLESS_IN_FLIGHT = 16


class NoSubscriberError(NoReplyError):
    """No node asks for the frames of a stream."""

    def __init__(self, stream: str, endpoint: str, timeout_s: float) -> None:
        super().__init__(endpoint, timeout_s)
        self.args = (f"no node asked for the frames of stream {stream} at {endpoint} within {timeout_s:g} s",)


class Opened(NamedTuple):
    """What a link opens: the node, if the link has to do with it, and a publisher for each stream."""

    node: NodeClient | None
    publishers: list[FramePublisher]


@dataclass(frozen=True, slots=True)
class Link:
    """Where the frames go. With `max_in_flight` their senders are to wait for the node, and lose none."""

    frames: str = FRAMES_ENDPOINT
    is_bound: bool = False  # the publisher listens, and the node connects to it
    control: str = CONTROL_ENDPOINT
    keys: Keys = field(default_factory=Keys)
    timeout_s: float = 10.0
    num_subscribers: int = 1
    max_in_flight: int | None = None
    adds_streams: bool = True

    @contextmanager
    def open(self, streams: Sequence[str]) -> Iterator[Opened]:
        """Add the streams the node does not know, open their publishers, and wait until the node listens.

        Raises the errors of the client and the publisher, UNKNOWN_STREAM, and NoSubscriberError.
        """
        with ExitStack() as stack:
            node = self._node(stack)
            if node:
                self._provide(node, streams)
            publishers = [stack.enter_context(self._publisher(name)) for name in streams]
            for publisher in publishers:
                self._wait_for_node(publisher)
            yield Opened(node, publishers)

    def _node(self, stack: ExitStack) -> NodeClient | None:
        """The node, once it is ready; None where frames are sent without a word with it.

        A node that connects to its cameras asks only for streams it knows.
        """
        if self.is_bound and not self._needs_node:
            return None
        node = stack.enter_context(open_client(ASK_ENDPOINT, self.control, self.keys, self.timeout_s))
        try:
            wait_ready(node, self.timeout_s)
        except NoNodeError:
            if self._needs_node:
                raise
            typer.echo(f"no node answers at {self.control}: what becomes of the frames is not known", err=True)
            return None
        return node

    @property
    def _needs_node(self) -> bool:
        return self.adds_streams or self.max_in_flight is not None

    def _provide(self, node: NodeClient, streams: Sequence[str]) -> None:
        """See to it that the node knows the streams."""
        known = node.stream_names()
        for name in streams:
            if name not in known and not self.adds_streams:
                message = f"the node has no stream {name}; leave out --no-add, or: onlooker add {name}"
                raise NodeError(ErrorCode.UNKNOWN_STREAM, message)
            if name not in known:
                spec = StreamSpec(stream=name)
                typer.echo(added_text(spec, node.add_stream(spec)), err=True)

    def _publisher(self, stream: str) -> FramePublisher:
        check_keys(self.keys, is_server=self.is_bound)
        return FramePublisher(
            stream,
            bind=self.frames if self.is_bound else None,
            connect=None if self.is_bound else self.frames,
            server_key=self.keys.server,
            client_key=self.keys.client,
            lossless=self.max_in_flight is not None,
            send_timeout_s=self.timeout_s,
        )

    def _wait_for_node(self, publisher: FramePublisher) -> None:
        if not publisher.wait_for_subscriber(self.timeout_s, count=self.num_subscribers):
            raise NoSubscriberError(publisher.stream, publisher.endpoint, self.timeout_s)


def added_text(spec: StreamSpec, added: StreamAdded) -> str:
    text = f"stream {spec.stream} added to the node"
    if added.forecast is UNSET:
        return text
    asked, reserved = spec.memory_bytes, added.forecast.memory_bytes
    text += f" ({bytes_text(reserved)} of memory reserved"
    if asked is not UNSET and reserved < asked:
        text += f" instead of {bytes_text(asked)}: other streams have the rest"
    return text + ")"


def forecast_text(forecast: Forecast) -> str:
    """What a memory will hold, in one line."""
    footprint = forecast.footprint
    num_frames = forecast.num_chunks * footprint.chunk_frames
    size = forecast.encode_size
    pictures = "the largest pictures" if size is UNSET else "pictures of {}x{}".format(*size)
    text = f"it holds {num_frames} frames of {pictures}, {footprint.tokens_per_chunk} tokens a chunk"
    if forecast.seconds_of_memory is not UNSET:
        text += f", {seconds_text(forecast.seconds_of_memory)}"
    if forecast.limit == "positions":
        text += ", where the model's positions end"
    elif forecast.seconds_of_positions is not UNSET:
        text += f"; the model's positions end after {seconds_text(forecast.seconds_of_positions)}"
    used_bytes = tokens_of(footprint, forecast.num_chunks) * footprint.bytes_per_token
    if 0 < used_bytes < forecast.memory_bytes / 2:
        text += f"; that takes {bytes_text(used_bytes)} of the memory: a smaller --memory will do"
    if forecast.load is not UNSET:
        text += f"; it takes {forecast.load:.0%} of the engine's time"
    return text


def stats_of(node: VideoMemory, stream: str) -> StreamStats:
    """What a node says of a stream. Raises UNKNOWN_STREAM, and the errors of the client."""
    for stats in node.streams():
        if stats.stream == stream:
            return stats
    raise NodeError(ErrorCode.UNKNOWN_STREAM, f"the node has no stream {stream}")
