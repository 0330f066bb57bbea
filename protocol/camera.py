"""The camera's side: publishing frames to nodes."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import zmq

from .codec import Buffer, check_frame, check_stream_name, encode_frame, frame_topic
from .curve import DOMAIN, become_client, become_server, load_credentials, load_keypair, load_public
from .errors import ClosedError, DecodeError, NoReplyError
from .messages import RAW_CHANNELS, FrameHeader, TimeKind, or_unset
from .sockets import FRAMES_ENDPOINT, FRAMES_HWM, HandshakeMonitor, bind, connect, open_socket

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from zmq.auth.thread import ThreadAuthenticator

_CLOSING_MS = 1000  # for frames that are still on their way when the publisher closes
_MAX_SUBSCRIPTION_BYTES = 4096


class FramePublisher:
    """Publishes the frames of one stream, to the node it connects to or to all that connect to it.

    A node that lags behind loses frames, the newest first, and knows it by the gap in their numbers. With
    `lossless` the publisher waits for the slowest node instead, at most `send_timeout_s` a frame.

    Keys: `client_key` is the publisher's own secret key file. `server_key` is the public key of the node or,
    for a publisher that binds, the public keys of all nodes it lets in: a file, or a folder of `.key` files.

    Not for use by several threads at once. Every method raises ClosedError after `close` or `end`, and
    AuthError once a node has refused the keys.
    """

    def __init__(
        self,
        stream: str,
        *,
        connect: str | None = None,
        bind: str | None = None,
        server_key: str | Path | None = None,
        client_key: str | Path | None = None,
        context: zmq.Context | None = None,
        lossless: bool = False,
        send_timeout_s: float = 30.0,
    ) -> None:
        """Open a session: `connect`, by default to a node on this machine, or `bind`.

        Raises ValueError for arguments that do not fit together and for unusable keys.
        """
        if connect is not None and bind is not None:
            raise ValueError("a publisher either connects or binds")
        if (server_key is None) != (client_key is None):
            raise ValueError("server_key and client_key go together")
        if not 0 < send_timeout_s < float("inf"):
            raise ValueError(f"send_timeout_s must be above 0, got {send_timeout_s}")
        try:
            self.stream = check_stream_name(stream)
        except DecodeError as error:
            raise ValueError(str(error)) from error
        self.session = str(uuid.uuid4())
        self.endpoint = bind or connect or FRAMES_ENDPOINT
        self._is_server = bind is not None
        self._send_timeout_s = send_timeout_s
        self._is_lossless = lossless
        self._topic = frame_topic(stream)
        self._seq = 0
        self._subscriptions: Counter[bytes] = Counter()
        self._is_open = True
        self._has_ended = False
        self._authenticator: ThreadAuthenticator | None = None
        self._owns_context = context is None
        self._context = zmq.Context() if context is None else context
        self._socket = self._open_socket()
        # A server refuses strangers, which is not its own failure: it watches nothing.
        self._monitor = None if self._is_server else HandshakeMonitor(self._socket)
        try:
            self._attach(*(None if key is None else Path(key) for key in (server_key, client_key)))
        except BaseException:
            self.close()
            raise

    def _open_socket(self) -> zmq.Socket:
        socket = open_socket(
            self._context,
            zmq.XPUB,
            max_message_bytes=_MAX_SUBSCRIPTION_BYTES,
            linger_ms=_CLOSING_MS,
            hwm=FRAMES_HWM,
        )
        socket.set(zmq.XPUB_VERBOSER, 1)  # every subscription of every node is told, not only the first
        # One of several nodes that lags behind may not keep frames from the others; where there is only one, a frame
        # that does not fit is dropped in `_send`, so that the end can wait for room.
        socket.set(zmq.XPUB_NODROP, int(self._is_lossless or not self._is_server))
        socket.set(zmq.SNDTIMEO, int(self._send_timeout_s * 1000) if self._is_lossless else 0)
        return socket

    def _attach(self, peer: Path | None, own: Path | None) -> None:
        if self._is_server:
            if peer is not None and own is not None:
                self._admit(_public_keys(peer))
                become_server(self._socket, load_keypair(own))
            self.endpoint = bind(self._socket, self.endpoint)
        else:
            credentials = load_credentials(peer, own)
            if credentials is not None:
                become_client(self._socket, credentials.server_public, credentials.pair)
            connect(self._socket, self.endpoint)

    def _admit(self, keys: frozenset[bytes]) -> None:
        from zmq.auth.thread import ThreadAuthenticator  # only a publisher that binds needs a thread for it

        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(domain=DOMAIN.decode(), credentials_provider=_Admission(keys))

    @property
    def has_subscriber(self) -> bool:
        """Whether a node asks for this stream right now."""
        return self.num_subscribers > 0

    @property
    def num_subscribers(self) -> int:
        """How many subscriptions match this stream right now; a node usually has one."""
        self._check_open()
        self._take_subscriptions()
        return sum(num for topic, num in self._subscriptions.items() if self._topic.startswith(topic))

    def wait_for_subscriber(self, timeout_s: float, *, count: int = 1) -> bool:
        """Wait until `count` nodes ask for this stream; False if that takes longer than `timeout_s`.

        Frames published before are lost: a connection takes a moment, and nobody keeps them.
        """
        deadline = time.monotonic() + timeout_s
        while self.num_subscribers < count:
            left_ms = (deadline - time.monotonic()) * 1000
            if left_ms <= 0:
                return False
            zmq.select(self._sources(), [], [], left_ms / 1000)
        return True

    def _sources(self) -> list[zmq.Socket]:
        return [self._socket] if self._monitor is None else [self._socket, self._monitor.socket]

    def _take_subscriptions(self) -> None:
        if self._monitor is not None:
            self._monitor.raise_if_refused()
        while self._socket.poll(0, zmq.POLLIN):
            message = self._socket.recv()
            # Anything else is a message that a subscriber sent upstream, which means nothing here.
            if message[:1] in (b"\x00", b"\x01"):
                self._note_subscription(message[1:], 1 if message[0] else -1)

    def _note_subscription(self, topic: bytes, change: int) -> None:
        self._subscriptions[topic] += change
        if self._subscriptions[topic] <= 0:
            del self._subscriptions[topic]  # strangers may ask for any number of topics, one after another

    def publish_image(
        self,
        pixels: NDArray[np.uint8],
        *,
        encoding: str = "rgb8",
        ts: int | None = None,
        ts_kind: TimeKind | None = None,
        fps: float | None = None,
        loop: int | None = None,
    ) -> int:
        """Publish raw pixels, uint8 of (height, width, 3), or (height, width) for mono8; return the number.

        `ts` is in ns since the Unix epoch and its kind `capture` unless said otherwise. Without it the frame
        gets the present time, of the kind `publish`: the publisher does not know when the picture was taken.
        """
        if encoding not in RAW_CHANNELS:
            raise ValueError(f"pixels are one of {sorted(RAW_CHANNELS)}, got {encoding!r}")
        channels = () if RAW_CHANNELS[encoding] == 1 else (RAW_CHANNELS[encoding],)
        if pixels.dtype != "uint8" or pixels.ndim != 2 + len(channels) or pixels.shape[2:] != channels:
            raise ValueError(
                f"{encoding} needs uint8 of {('height', 'width', *channels)}, got {pixels.dtype} {pixels.shape}"
            )
        height, width = pixels.shape[:2]
        is_flat = pixels.flags.c_contiguous and pixels.size > 0
        payload = pixels.data.cast("B") if is_flat else pixels.tobytes()
        return self.publish_encoded(payload, encoding, size=(width, height), ts=ts, ts_kind=ts_kind, fps=fps, loop=loop)

    def publish_encoded(
        self,
        payload: Buffer,
        encoding: str,
        *,
        size: tuple[int, int] | None = None,
        ts: int | None = None,
        ts_kind: TimeKind | None = None,
        fps: float | None = None,
        loop: int | None = None,
    ) -> int:
        """Publish a picture that is encoded already, such as a `jpeg`; `size` is its width and height."""
        width, height = size or (None, None)
        header = FrameHeader(
            session=self.session,
            stream=self.stream,
            ts=time.time_ns() if ts is None else int(ts),
            ts_kind=ts_kind or ("publish" if ts is None else "capture"),
            enc=encoding,
            w=or_unset(width),
            h=or_unset(height),
            fps=or_unset(fps),
            loop=or_unset(loop),
        )
        try:
            check_frame(header, len(payload))
        except DecodeError as error:
            raise ValueError(str(error)) from error
        return self._send(header, payload)

    def end(self) -> None:
        """Say that this session sends no more frames: nodes encode what is left of it.

        One that connects waits a second at most for a node that lags behind. From one that binds it is lost as every
        message is, unless the publisher is `lossless`.
        """
        self._check_open()
        if not self._is_lossless:
            self._socket.set(zmq.SNDTIMEO, _CLOSING_MS)
        self._send(FrameHeader(session=self.session, stream=self.stream, ts=time.time_ns(), eos=True))
        self._has_ended = True

    def _send(self, header: FrameHeader, payload: Buffer = b"") -> int:
        self._check_open()
        self._take_subscriptions()
        seq = self._seq
        try:
            # Copied: the caller may draw the next picture into the same array at once.
            self._socket.send_multipart(encode_frame(header, seq, payload), copy=True)
        except zmq.Again as error:
            if self._is_lossless:
                raise NoReplyError(self.endpoint, self._send_timeout_s) from error
        self._seq += 1
        return seq

    def _check_open(self) -> None:
        if not self._is_open or self._has_ended:
            raise ClosedError(f"the publisher of {self.stream} is {'ended' if self._is_open else 'closed'}")

    def close(self) -> None:
        """Close; frames on their way get a second more. Does nothing the second time."""
        if not self._is_open:
            return
        self._is_open = False
        if self._monitor is not None:
            self._monitor.close()
        self._socket.close()
        if self._authenticator is not None:
            self._authenticator.stop()
        if self._owns_context:
            self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Admission:
    """Which nodes a publisher that binds lets in."""

    def __init__(self, keys: frozenset[bytes]) -> None:
        self._keys = keys

    def callback(self, domain: str, key: bytes) -> bool:
        return key in self._keys


def _public_keys(path: Path) -> frozenset[bytes]:
    files = sorted(path.glob("*.key")) if path.is_dir() else [path]
    return frozenset(load_public(file) for file in files)
