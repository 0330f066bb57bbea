"""The way from a tool to a node's frames socket: the streams it needs, and a publisher for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from ..protocol.camera import FramePublisher
from ..protocol.client import NodeClient
from ..protocol.errors import NoReplyError
from ..protocol.messages import StreamSpec
from ..protocol.sockets import ASK_ENDPOINT, CONTROL_ENDPOINT, FRAMES_ENDPOINT
from .connection import Keys, open_client, usable_keys

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

        Raises the errors of the client and the publisher, and NoSubscriberError.
        """
        with ExitStack() as stack:
            node = stack.enter_context(self._client()) if self._needs_node else None
            if node:
                node.wait_ready()  # a node that was just started is still loading its model
            if node and self.adds_streams:
                for name in set(streams) - set(node.stream_names()):
                    node.add_stream(StreamSpec(stream=name))
            publishers = [stack.enter_context(self._publisher(name)) for name in streams]
            for publisher in publishers:
                self._wait_for_node(publisher)
            yield Opened(node, publishers)

    @property
    def _needs_node(self) -> bool:
        return self.adds_streams or self.max_in_flight is not None

    def _client(self) -> NodeClient:
        return open_client(ASK_ENDPOINT, self.control, self.keys, self.timeout_s)

    def _publisher(self, stream: str) -> FramePublisher:
        with usable_keys():
            return FramePublisher(
                stream,
                bind=self.frames if self.is_bound else None,
                connect=None if self.is_bound else self.frames,
                server_key=self.keys.server,
                client_key=self.keys.client,
                lossless=self.max_in_flight is not None,
            )

    def _wait_for_node(self, publisher: FramePublisher) -> None:
        if not publisher.wait_for_subscriber(self.timeout_s, count=self.num_subscribers):
            raise NoSubscriberError(publisher.stream, publisher.endpoint, self.timeout_s)
