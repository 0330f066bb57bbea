"""Sends recorded frames as they are."""

from __future__ import annotations

import uuid
from collections import defaultdict

import zmq
from msgspec.structs import replace

from ..protocol.codec import encode_frame
from ..protocol.curve import become_client, load_credentials
from ..protocol.errors import NoReplyError
from ..protocol.messages import FrameHeader
from ..protocol.sockets import FRAMES_HWM, connect, open_socket
from .connection import Keys
from .link import NoSubscriberError
from .session_file import FrameEntry

CLOSING_MS = 1000
MAX_SUBSCRIPTION_BYTES = 4096


class FrameSender:
    """Sends frames with the numbers they had, to a node that listens; sessions are new, as they must be."""

    def __init__(self, endpoint: str, keys: Keys, timeout_s: float) -> None:
        """Raises OSError or ValueError for unusable keys."""
        credentials = load_credentials(keys.server, keys.client)
        self._endpoint, self._timeout_s = endpoint, timeout_s
        self._sessions: defaultdict[str, str] = defaultdict(lambda: uuid.uuid4().hex)
        self._open: dict[str, tuple[FrameHeader, int]] = {}  # the last frame of a session that has not ended
        self._context = zmq.Context()
        self._socket = open_socket(
            self._context, zmq.XPUB, max_message_bytes=MAX_SUBSCRIPTION_BYTES, linger_ms=CLOSING_MS, hwm=FRAMES_HWM
        )
        self._socket.set(zmq.XPUB_NODROP, 1)
        self._socket.set(zmq.SNDTIMEO, int(timeout_s * 1000))
        if credentials is not None:
            become_client(self._socket, credentials.server_public, credentials.pair)
        connect(self._socket, endpoint)

    def wait_for_node(self, stream: str) -> None:
        """Wait until the node asks for frames. Raises NoSubscriberError."""
        if not self._socket.poll(int(self._timeout_s * 1000)):
            raise NoSubscriberError(stream, self._endpoint, self._timeout_s)
        self._socket.recv()

    def send(self, frame: FrameEntry) -> FrameHeader:
        """Send a frame and return the header it got. Raises NoReplyError if the node takes none for long."""
        header = replace(frame.header, session=self._sessions[frame.header.session])
        try:
            self._socket.send_multipart(encode_frame(header, frame.seq, frame.payload))
        except zmq.Again as error:
            raise NoReplyError(self._endpoint, self._timeout_s) from error
        self._open[header.session] = header, frame.seq
        if header.eos:
            del self._open[header.session]
        return header

    def close(self) -> None:
        """Say that the sessions have ended which the recording left open, so that the next may begin."""
        try:
            for header, seq in self._open.values():
                end = FrameHeader(session=header.session, stream=header.stream, ts=header.ts, eos=True)
                self._socket.send_multipart(encode_frame(end, seq + 1))
        except zmq.Again as error:
            raise NoReplyError(self._endpoint, self._timeout_s) from error
        finally:
            self._socket.close()
            self._context.term()

    def __enter__(self) -> FrameSender:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
