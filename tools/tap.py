"""A tap on the way to a node: what goes through it is passed on unchanged, and noted once it was."""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

import zmq

from ..protocol.codec import ReceivedFrame, decode_frame, decode_reply, decode_request
from ..protocol.curve import Credentials, become_client, load_credentials
from ..protocol.errors import DecodeError, OnlookerError
from ..protocol.messages import Reply, Request
from ..protocol.sockets import FRAMES_HWM, MAX_FRAME_BYTES, MAX_REQUEST_BYTES, bind, connect, open_socket
from .connection import Keys

MAX_CLIENTS = 256
MAX_OPEN_REQUESTS = 4096
BURST = 64  # messages of one socket between two looks at the others
SEND_TIMEOUT_MS = 1000
MAX_SUBSCRIPTION_BYTES = 4096


class TapError(OnlookerError):
    """The tap cannot listen."""


class Endpoints(NamedTuple):
    """The three sockets that a tap sits in front of."""

    frames: str
    ask: str
    control: str


class Requested(NamedTuple):
    """A request that was passed on for the first time."""

    request: Request


class Replied(NamedTuple):
    """The final reply that was passed back, and what it replies to."""

    request: Request
    reply: Reply


Passed = ReceivedFrame | Requested | Replied


@dataclass(eq=False)
class Passage:
    """What went through and could not be noted, by what it was."""

    unreadable: Counter[str] = field(default_factory=Counter)
    undelivered: int = 0  # frames that the node did not take in time


class Tap:
    """Listens where cameras and clients connect, and passes everything on to the node and back.

    Cameras see the node's own subscriptions, clients the node's own replies. Each client has a connection of its
    own to the node, which so tells them apart. Not for use by several threads at once.
    """

    def __init__(self, listen: Endpoints, node: Endpoints, keys: Keys) -> None:
        """Raises TapError for an endpoint that cannot be had, and OSError or ValueError for unusable keys."""
        credentials = load_credentials(keys.server, keys.client)
        self.passage = Passage()
        self._context = zmq.Context()
        try:
            self._frames = _FrameTap(self._context, listen.frames, node.frames, credentials, self.passage)
            self._requests = [
                _RequestTap(self._context, listening, there, credentials, self.passage)
                for listening, there in ((listen.ask, node.ask), (listen.control, node.control))
            ]
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self.endpoints = Endpoints(self._frames.endpoint, *(each.endpoint for each in self._requests))

    def pass_on(self, timeout_s: float) -> list[Passed]:
        """Wait for something, at most so long, and pass it on; return what is worth noting, in its order."""
        taps = [self._frames, *self._requests]
        zmq.select([socket for tap in taps for socket in tap.sources], [], [], timeout_s)
        return [passed for tap in taps for passed in tap.pass_on()]

    def close(self) -> None:
        self._context.destroy(linger=200)

    def __enter__(self) -> Tap:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _listening(socket: zmq.Socket, endpoint: str) -> str:
    try:
        return bind(socket, endpoint)
    except zmq.ZMQError as error:
        raise TapError(f"cannot listen at {endpoint}: {error}") from error


def _connected(socket: zmq.Socket, endpoint: str, credentials: Credentials | None) -> None:
    if credentials is not None:
        become_client(socket, credentials.server_public, credentials.pair)
    connect(socket, endpoint)


class _FrameTap:
    """Frames from cameras to the node, subscriptions from the node to the cameras."""

    def __init__(
        self, context: zmq.Context, listen: str, node: str, credentials: Credentials | None, passage: Passage
    ) -> None:
        self._passage = passage
        self._cameras = open_socket(context, zmq.XSUB, max_message_bytes=MAX_FRAME_BYTES, hwm=FRAMES_HWM)
        self._node = open_socket(context, zmq.XPUB, max_message_bytes=MAX_SUBSCRIPTION_BYTES, hwm=FRAMES_HWM)
        self._node.set(zmq.XPUB_NODROP, 1)  # cameras wait, or drop, as they would with the node itself
        self._node.set(zmq.SNDTIMEO, SEND_TIMEOUT_MS)
        self.endpoint = _listening(self._cameras, listen)
        _connected(self._node, node, credentials)
        self.sources = [self._cameras, self._node]

    def pass_on(self) -> list[Passed]:
        for _ in range(BURST):
            if not self._node.poll(0):
                break
            self._cameras.send(self._node.recv())
        passed: list[Passed] = []
        for _ in range(BURST):
            if not self._cameras.poll(0):
                break
            self._pass_frame(self._cameras.recv_multipart(copy=True), passed)
        return passed

    def _pass_frame(self, parts: list[bytes], passed: list[Passed]) -> None:
        try:
            self._node.send_multipart(parts)
        except zmq.Again:
            self._passage.undelivered += 1
            return
        try:
            passed.append(decode_frame(parts))
        except DecodeError:  # the node counts it, and has no use for it either
            self._passage.unreadable["frames"] += 1


class _RequestTap:
    """Requests from clients to the node, replies from the node to the clients."""

    def __init__(
        self, context: zmq.Context, listen: str, node: str, credentials: Credentials | None, passage: Passage
    ) -> None:
        self._context, self._there, self._credentials, self._passage = context, node, credentials, passage
        self._clients = open_socket(context, zmq.ROUTER, max_message_bytes=MAX_REQUEST_BYTES)
        self.endpoint = _listening(self._clients, listen)
        self._ways: OrderedDict[bytes, zmq.Socket] = OrderedDict()  # by a client's identity, the newest last
        self._open: OrderedDict[tuple[bytes, str], Request] = OrderedDict()

    @property
    def sources(self) -> list[zmq.Socket]:
        return [self._clients, *self._ways.values()]

    def pass_on(self) -> list[Passed]:
        passed: list[Passed] = []
        for _ in range(BURST):
            if not self._clients.poll(0):
                break
            identity, *parts = self._clients.recv_multipart()
            self._pass_request(identity, parts, passed)
        for identity, way in list(self._ways.items()):
            while way.poll(0):
                self._pass_reply(identity, way.recv_multipart(), passed)
        return passed

    def _pass_request(self, identity: bytes, parts: list[bytes], passed: list[Passed]) -> None:
        try:
            self._way(identity).send_multipart(parts, zmq.NOBLOCK)
        except zmq.Again:
            return  # the node has been away for long; the client hears nothing, as without a tap
        try:
            request = decode_request(parts[-1] if parts else b"")
        except DecodeError:
            self._passage.unreadable["requests"] += 1
            return
        key = (identity, request.id)
        if key in self._open:
            return  # sent again after a lost connection: the same request
        self._open[key] = request
        if len(self._open) > MAX_OPEN_REQUESTS:
            self._open.popitem(last=False)
        passed.append(Requested(request))

    def _pass_reply(self, identity: bytes, parts: list[bytes], passed: list[Passed]) -> None:
        self._clients.send_multipart([identity, *parts])
        try:
            reply = decode_reply(parts[-1])
        except DecodeError:
            self._passage.unreadable["replies"] += 1
            return
        if reply.status == "partial":
            return
        request = self._open.pop((identity, reply.id), None)
        if request is not None:
            passed.append(Replied(request, reply))

    def _way(self, identity: bytes) -> zmq.Socket:
        """The connection of a client; of too many, the one that was used the longest ago is closed."""
        way = self._ways.get(identity)
        if way is None:
            way = open_socket(self._context, zmq.DEALER, max_message_bytes=MAX_REQUEST_BYTES)
            _connected(way, self._there, self._credentials)
            self._ways[identity] = way
            if len(self._ways) > MAX_CLIENTS:
                self._ways.popitem(last=False)[1].close()
        self._ways.move_to_end(identity)
        return way
