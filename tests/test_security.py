"""With curve required, a listed key opens every socket and nothing else opens any."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq
from deadline import until
from fakes import FakeEngine
from nodes import running_node

from onlooker.node.config import ConfigError
from onlooker.node.node import Node
from onlooker.node.security import ClientKeys, OncePerSecond
from onlooker.protocol.codec import encode_frame
from onlooker.protocol.curve import KeyPair, become_client, generate, load_keypair, write_keypair
from onlooker.protocol.messages import FrameHeader
from onlooker.protocol.sockets import bind

SOCKETS = ("frames", "ask", "control", "telemetry")
SILENCE_MS = 100


@dataclass(frozen=True)
class Keys:
    """The files of a node that requires keys, with one client listed."""

    node: KeyPair
    client: KeyPair
    folder: Path
    settings: dict[str, Any]


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    node, client = generate(), generate()
    _, secret = write_keypair(tmp_path, "node", node)
    folder = tmp_path / "clients"
    write_keypair(folder, "client", client)
    settings = {"security__curve": "required", "security__server_key": secret, "security__client_keys": folder}
    return Keys(node, client, folder, settings)


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    with FakeEngine() as engine:
        yield engine


@pytest.fixture
def node(engine: FakeEngine, keys: Keys) -> Iterator[Node]:
    with running_node(engine, **keys.settings, telemetry__period_s=0.05) as node:
        yield node


@pytest.fixture
def context() -> Iterator[zmq.Context]:
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


def frame(seq: int) -> list[Any]:
    header = FrameHeader(session="camera", stream="front", ts=1_000_000_000 + seq, enc="mono8", w=8, h=8)
    return encode_frame(header, seq, np.zeros((8, 8), np.uint8).tobytes())


def is_shut(context: zmq.Context, node: Node, socket: str, server_key: bytes | None, pair: KeyPair | None) -> bool:
    return not opens(context, node, socket, server_key, pair, SILENCE_MS)


def opens(
    context: zmq.Context,
    node: Node,
    socket: str,
    server_key: bytes | None,
    pair: KeyPair | None,
    timeout_ms: int = 5000,
) -> bool:
    """Whether a client with these keys gets anything through a socket of the node."""
    kind = {"frames": zmq.XPUB, "telemetry": zmq.SUB}.get(socket, zmq.REQ)
    with context.socket(kind) as client:
        client.linger, client.sndtimeo = 0, timeout_ms
        if server_key is not None and pair is not None:
            become_client(client, server_key, pair)
        client.connect(node.endpoints[socket])
        if socket == "telemetry":
            client.subscribe(b"")
        elif socket in ("ask", "control"):
            try:
                client.send(msgpack.packb({"v": 1, "id": "1", "session": "s", "endpoint": "hello"}))
            except zmq.Again:  # refused before it could ask, it has nobody to ask
                return False
        return bool(client.poll(timeout_ms))  # a record, a reply, or the node's subscription


@pytest.mark.parametrize("socket", SOCKETS)
def test_a_listed_key_opens_every_socket(context: zmq.Context, keys: Keys, node: Node, socket: str):
    assert opens(context, node, socket, keys.node.public, keys.client)


@pytest.mark.parametrize("socket", SOCKETS)
def test_nothing_else_opens_any_and_each_refusal_is_counted(context: zmq.Context, keys: Keys, node: Node, socket: str):
    assert is_shut(context, node, socket, keys.node.public, generate()), "an unlisted key"
    assert is_shut(context, node, socket, generate().public, keys.client), "a wrong server key"
    assert is_shut(context, node, socket, None, None), "no key at all"
    until(lambda: status(context, keys, node)["rejected"].get("handshake_failed", 0) >= 3)


def status(context: zmq.Context, keys: Keys, node: Node) -> dict[str, Any]:
    with context.socket(zmq.REQ) as client:
        client.linger = 0
        become_client(client, keys.node.public, keys.client)
        client.connect(node.endpoints["control"])
        client.send(msgpack.packb({"v": 1, "id": "1", "session": "s", "endpoint": "status"}))
        assert client.poll(5000)
        return msgpack.unpackb(client.recv())["data"]


def test_a_camera_with_a_listed_key_is_remembered(context: zmq.Context, keys: Keys, engine: FakeEngine, node: Node):
    with context.socket(zmq.XPUB) as camera:
        camera.linger = 0
        become_client(camera, keys.node.public, keys.client)
        camera.connect(node.endpoints["frames"])
        assert camera.poll(5000)
        for seq in range(4):
            camera.send_multipart(frame(seq))
        until(lambda: len(engine.pictures("front")) == 4)


def test_the_node_connects_to_a_camera_as_a_client_with_its_own_key(
    context: zmq.Context, keys: Keys, engine: FakeEngine, tmp_path: Path
):
    pair = generate()
    public, _ = write_keypair(tmp_path, "camera", pair)
    with context.socket(zmq.XPUB) as camera:
        camera.linger = 0
        camera.curve_server, camera.curve_secretkey = True, pair.secret
        endpoint = bind(camera, "tcp://127.0.0.1:*")
        stream = {"name": "front", "connect": endpoint, "camera_key": public}
        with running_node(engine, **keys.settings, streams=[stream]):
            assert camera.poll(5000), "the node did not subscribe"
            for seq in range(4):
                camera.send_multipart(frame(seq))
            until(lambda: len(engine.pictures("front")) == 4)


def test_a_client_with_keys_at_a_node_without_is_counted(context: zmq.Context, engine: FakeEngine, keys: Keys):
    with running_node(engine) as node:
        assert is_shut(context, node, "control", keys.node.public, keys.client)
        with context.socket(zmq.REQ) as client:
            client.linger = 0
            client.connect(node.endpoints["control"])
            client.send(msgpack.packb({"v": 1, "id": "1", "session": "s", "endpoint": "status"}))
            assert client.poll(5000)
            assert msgpack.unpackb(client.recv())["data"]["rejected"]["handshake_failed"] >= 1


def test_a_key_is_added_and_taken_away_while_the_node_runs(context: zmq.Context, keys: Keys, node: Node):
    newcomer = generate()
    assert is_shut(context, node, "control", keys.node.public, newcomer)
    public, _ = write_keypair(keys.folder, "newcomer", newcomer)
    assert opens(context, node, "control", keys.node.public, newcomer)
    public.unlink()
    assert is_shut(context, node, "control", keys.node.public, newcomer)


def test_a_folder_of_keys_that_breaks_lets_nobody_in(context: zmq.Context, keys: Keys, node: Node, caplog):
    caplog.set_level(logging.ERROR)
    (keys.folder / "broken.key").write_text("no key")
    assert is_shut(context, node, "control", keys.node.public, keys.client)
    assert "nobody can connect" in caplog.text
    (keys.folder / "broken.key").unlink()
    assert opens(context, node, "control", keys.node.public, keys.client)


def test_a_refused_key_is_named_in_the_log(context: zmq.Context, keys: Keys, node: Node, caplog):
    caplog.set_level(logging.WARNING)
    stranger = generate()
    assert is_shut(context, node, "control", keys.node.public, stranger)
    assert stranger.public.decode() in caplog.text
    assert "control: a peer was refused" in caplog.text


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"security__server_key": Path("nowhere")}, r"security\.server_key: .*No such file"),
        ({"security__client_keys": Path("nowhere")}, r"security\.client_keys: .*No such file"),
    ],
)
def test_without_its_keys_a_node_does_not_start(keys: Keys, change: dict[str, Any], problem: str):
    with pytest.raises(ConfigError, match=problem), running_node(None, **(keys.settings | change)):
        pass


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"stream_defaults__camera_key": "nowhere"}, r"stream_defaults\.camera_key: .*No such file"),
        (
            {"streams": [{"name": "front", "connect": "tcp://127.0.0.1:9", "camera_key": "nowhere"}]},
            r"streams\[0\] \(front\)\.camera_key: .*No such file",
        ),
    ],
)
def test_without_the_key_of_a_camera_a_node_does_not_start(keys: Keys, settings: dict[str, Any], problem: str):
    with pytest.raises(ConfigError, match=problem), running_node(None, **keys.settings, **settings):
        pass


def test_a_key_file_without_a_key_is_named(keys: Keys):
    (keys.folder / "broken.key").write_text("no key")
    with pytest.raises(ConfigError, match=r"security\.client_keys: .*broken\.key"), running_node(None, **keys.settings):
        pass


def test_a_secret_that_others_may_read_is_refused(keys: Keys):
    keys.settings["security__server_key"].chmod(0o644)
    with pytest.raises(ConfigError, match=r"security\.server_key: .*0600"), running_node(None, **keys.settings):
        pass


def test_only_key_files_count(tmp_path: Path):
    public, _ = write_keypair(tmp_path, "client", generate())
    (tmp_path / "README").write_text("who is who")
    assert len(ClientKeys(tmp_path)) == 1
    public.unlink()
    assert len(ClientKeys(tmp_path)) == 0


def test_the_same_thing_is_said_once_a_second_and_a_flood_is_not():
    often = OncePerSecond()
    assert often.allows("a")
    assert not often.allows("a")
    assert often.allows("b")
    assert sum(often.allows(str(n)) for n in range(1000)) < OncePerSecond.MAX_KEYS


def test_a_pair_survives_its_files(keys: Keys):
    assert load_keypair(keys.settings["security__server_key"]) == keys.node
