import itertools
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zmq
from clips import number, write_clip, write_pictures
from commands import Ended, endpoint_flags, onlooker, start_onlooker
from deadline import until
from fakes import FakeEngine
from nodes import running_node

from onlooker.node.node import Node
from onlooker.protocol.camera import FramePublisher
from onlooker.protocol.client import NodeClient
from onlooker.protocol.messages import FrameCounters
from onlooker.tools import playback
from onlooker.tools.playback import Account, Arrivals, Playback, PlaybackOptions
from onlooker.tools.replay import UnheardError, stream_names, stream_slug
from onlooker.tools.video import open_video

MS = 1_000_000


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    with FakeEngine() as engine:
        yield engine


@pytest.fixture
def node(engine: FakeEngine) -> Iterator[Node]:
    with running_node(engine) as node:
        yield node


def replay(node: Node, *arguments: object) -> Ended:
    return onlooker("replay", *arguments, *endpoint_flags(node, "frames", "control"))


def seen(engine: FakeEngine, stream: str = "front") -> list[int]:
    """Numbers of the pictures in a memory."""
    return [number(picture.pixels) for picture in engine.pictures(stream)]


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_clip(tmp_path / "front.mp4", 12)


def test_every_picture_reaches_the_memory_with_the_file_s_own_time(clip: Path, engine: FakeEngine, node: Node) -> None:
    ended = replay(node, clip, "--rate", 0, "--lossless")
    assert ended.status == 0, ended.err
    assert seen(engine) == list(range(12))
    assert [(p.ts, p.ts_kind) for p in engine.pictures("front")] == [(n * 100 * MS, "media") for n in range(12)]


def test_each_file_is_a_stream_that_is_added_to_the_node(
    clip: Path, tmp_path: Path, engine: FakeEngine, node: Node
) -> None:
    other = write_clip(tmp_path / "back yard.mp4", 8)
    ended = replay(node, clip, other, "--rate", 0, "--lossless")
    assert ended.status == 0, ended.err
    assert seen(engine, "front") == list(range(12))
    assert seen(engine, "back-yard") == list(range(8))


def test_a_stream_can_be_named(clip: Path, engine: FakeEngine, node: Node) -> None:
    assert replay(node, clip, "--stream", "gate", "--rate", 0, "--lossless").status == 0
    assert len(seen(engine, "gate")) == 12


def test_lossless_loses_nothing_to_a_slow_engine_where_an_ordinary_replay_does(
    tmp_path: Path, engine: FakeEngine
) -> None:
    clip = write_clip(tmp_path / "front.mp4", 30)
    engine.encode_s = 0.04
    with running_node(engine, stream_defaults__ring_frames=16) as node:
        lossy = replay(node, clip, "--loops", 3, "--rate", 0, "--json").json["streams"][0]
        lossless = replay(node, clip, "--loops", 3, "--rate", 0, "--json", "--lossless", "--in-flight", 12)
    assert lossy["node"]["dropped"]["ring_full"] > 0
    assert lossless.status == 0
    assert lossless.json["streams"][0]["node"] == {
        "received": 90,
        "encoded": 90,
        "pending": 0,
        "gaps": 0,
        "dropped": {},
    }


def test_frames_lost_to_a_ring_smaller_than_the_credit_are_an_error(tmp_path: Path, engine: FakeEngine) -> None:
    clip = write_clip(tmp_path / "front.mp4", 20)
    engine.encode_s = 0.1
    with running_node(engine, stream_defaults__ring_frames=2) as node:
        ended = replay(node, clip, "--rate", 0, "--lossless")
    assert ended.status == 1
    assert "ring_full" in ended.err


def test_frames_that_a_full_memory_refused_are_lost_and_what_to_do_is_said(clip: Path) -> None:
    with FakeEngine(capacity_tokens=32) as engine, running_node(engine) as node:
        ended = replay(node, clip, "--rate", 0, "--lossless", "--json")
    assert ended.status == 1
    assert "memory_full 4; make room with `onlooker reset front`" in ended.err
    assert ended.json["streams"][0]["node"]["dropped"] == {"memory_full": 4}


def test_a_replay_of_which_nothing_is_remembered_is_an_error_at_any_pace(clip: Path) -> None:
    with FakeEngine(capacity_tokens=8) as engine, running_node(engine) as node:
        ended = replay(node, clip, "--rate", 20)
    assert ended.status == 1
    assert "memory_full 12; make room with `onlooker reset front`" in ended.err


def test_frames_left_out_on_purpose_are_no_loss(clip: Path, engine: FakeEngine) -> None:
    with running_node(engine, stream_defaults__stride=2) as node:
        ended = replay(node, clip, "--rate", 0, "--lossless")
    assert ended.status == 0, ended.err
    assert "sampled_out 6" in ended.out


def test_the_end_of_the_stream_completes_the_last_chunk(tmp_path: Path, engine: FakeEngine, node: Node) -> None:
    clip = write_clip(tmp_path / "front.mp4", 5)
    assert replay(node, clip, "--rate", 0, "--lossless").status == 0
    assert seen(engine) == [0, 1, 2, 3, 4]
    assert [chunk.num_padded for chunk in engine.chunks("front")] == [0, 1]


def test_a_loop_shows_the_file_again_as_later_pictures(clip: Path, engine: FakeEngine, node: Node) -> None:
    assert replay(node, clip, "--rate", 0, "--lossless", "--loops", 3).status == 0
    assert seen(engine) == list(range(12)) * 3
    times = [picture.stream_ns for picture in engine.pictures("front")]
    assert {late - early for early, late in itertools.pairwise(times)} == {100 * MS}


def test_a_replay_can_be_repeated_at_once(clip: Path, engine: FakeEngine, node: Node) -> None:
    for _ in range(2):
        assert replay(node, clip, "--rate", 0, "--lossless").status == 0
    assert seen(engine) == list(range(12)) * 2


def test_with_the_wall_clock_frames_say_when_they_were_published(clip: Path, engine: FakeEngine, node: Node) -> None:
    before = time.time_ns()
    assert replay(node, clip, "--rate", 0, "--lossless", "--clock", "wall").status == 0
    times = [picture.ts for picture in engine.pictures("front")]
    assert before < times[0] <= times[-1] < time.time_ns()
    assert {picture.ts_kind for picture in engine.pictures("front")} == {"publish"}


@pytest.mark.parametrize("encoding", ["jpeg", "png", "rgb8", "bgr8", "mono8"])
def test_every_encoding_shows_the_same_picture(encoding: str, clip: Path, engine: FakeEngine, node: Node) -> None:
    assert replay(node, clip, "--rate", 0, "--lossless", "--encoding", encoding).status == 0
    assert seen(engine) == list(range(12))


def test_colours_survive_every_encoding(tmp_path: Path, engine: FakeEngine, node: Node) -> None:
    red, green, blue = (np.full((48, 64, 3), np.eye(3, dtype=np.uint8)[i] * 200, np.uint8) for i in range(3))
    clip = write_pictures(tmp_path / "front.mp4", [red, green, blue, red], [0, 100, 200, 300])
    for encoding in ("jpeg", "png", "rgb8", "bgr8"):
        assert replay(node, clip, "--rate", 0, "--lossless", "--encoding", encoding).status == 0
    colours = [int(picture.pixels.mean((0, 1)).argmax()) for picture in engine.pictures("front")]
    assert colours == [0, 1, 2, 0] * 4


def test_a_part_of_a_file_can_be_played(tmp_path: Path, engine: FakeEngine, node: Node) -> None:
    clip = write_clip(tmp_path / "front.mp4", 20)
    part = ("--start-offset", 0.5, "--duration", 1, "--stride", 2, "--fps", 4)
    assert replay(node, clip, "--rate", 0, "--lossless", *part).status == 0
    assert seen(engine) == [5, 9, 11, 13]


def test_the_rate_holds_back_and_lag_is_measured(clip: Path, node: Node) -> None:
    played = replay(node, clip, "--rate", 5, "--json").json["streams"][0]
    assert 0.22 <= played["seconds"] < 1  # 11 intervals of 100 ms, 5 times as fast
    assert played["max_lag_ms"] < 500


def test_the_summary_says_what_was_played(clip: Path, node: Node) -> None:
    played = replay(node, clip, "--rate", 0, "--lossless", "--json").json["streams"][0]
    assert (played["stream"], played["source"], played["sent"]) == ("front", str(clip), 12)
    assert (played["loops"], played["broken"]) == (1, 0)
    assert played["sent_bytes"] > 1000


def test_a_file_that_fails_does_not_end_the_others(tmp_path: Path, engine: FakeEngine, node: Node) -> None:
    short, long = write_clip(tmp_path / "short.mp4", 5), write_clip(tmp_path / "front.mp4", 20)
    ended = replay(node, short, long, "--rate", 0, "--lossless", "--start-offset", 1)
    assert ended.status == 1
    assert "short.mp4: there is no picture in the part to play" in ended.err
    assert seen(engine) == list(range(10, 20))


def test_every_file_that_fails_is_named(tmp_path: Path, node: Node) -> None:
    clips = [write_clip(tmp_path / f"{name}.mp4", 5) for name in ("a", "b")]
    err = replay(node, *clips, "--rate", 0, "--start-offset", 1).err
    assert "a.mp4: there is no picture" in err
    assert "b.mp4: there is no picture" in err


def test_what_was_sent_of_a_file_that_vanishes_is_remembered(clip: Path, engine: FakeEngine, node: Node) -> None:
    flags = ("--loop", "--rate", 10, "--lossless", *endpoint_flags(node, "frames", "control"))
    with start_onlooker("replay", clip, *flags) as command:
        until(lambda: engine.pictures("front"), 20)
        clip.unlink()
        _, err = command.communicate(timeout=10)
    assert command.returncode == 1
    assert "there is no such file" in err
    until(lambda: len(seen(engine)) % 12 == 0)


def test_a_stream_that_is_not_to_be_added_must_be_known(clip: Path, node: Node) -> None:
    ended = replay(node, clip, "--stream", "gate", "--no-add", "--lossless")
    assert ended.status == 1
    assert "UNKNOWN_STREAM" in ended.err


def test_a_stream_that_is_not_to_be_added_must_be_known_without_lossless_too(clip: Path, node: Node) -> None:
    ended = replay(node, clip, "--stream", "gate", "--no-add")
    assert (ended.status, ended.out) == (1, "")
    assert "UNKNOWN_STREAM: the node has no stream gate" in ended.err


def test_what_a_stream_that_is_added_reserves_is_said(clip: Path, engine: FakeEngine, node: Node) -> None:
    ended = replay(node, clip, "--stream", "gate", "--rate", 0, "--lossless")
    assert ended.err == "stream gate added to the node (1.07 GB of memory reserved)\n"


def test_without_a_listener_nothing_is_sent(clip: Path, tmp_path: Path) -> None:
    ended = onlooker("replay", clip, "--no-add", "--frames", f"ipc://{tmp_path}/nowhere", "--timeout", 0.2)
    assert ended.status == 3
    assert "no node asked for the frames of stream front" in ended.err


def test_it_can_wait_for_more_nodes_than_there_are(clip: Path, node: Node) -> None:
    assert replay(node, clip, "--wait-subscribers", 2, "--timeout", 0.3).status == 3


def test_a_node_that_is_not_there_is_no_reply(clip: Path, tmp_path: Path) -> None:
    nowhere = f"ipc://{tmp_path}/nowhere"
    ended = onlooker("replay", clip, "--frames", nowhere, "--control", nowhere, "--timeout", 0.2)
    assert ended.status == 3
    assert f"no node answers at {nowhere}; is one running? onlooker node" in ended.err


def test_a_missing_file_is_named_before_anything_is_sent(tmp_path: Path) -> None:
    ended = onlooker("replay", tmp_path / "none.mp4")
    assert ended.status == 1
    assert "none.mp4: there is no such file" in ended.err


@pytest.mark.parametrize(
    "flags",
    [
        ("--rate", -1),
        ("--stride", 0),
        ("--fps", 0),
        ("--duration", 0),
        ("--encoding", "gif"),
        ("--frames", "localhost:5556"),
        ("--stream", "a", "--stream", "b"),
        ("--stream", "back yard"),
        ("--server-key", "none.key", "--client-key", "none.key_secret"),
    ],
    ids=lambda flags: flags[0] + " " + str(flags[1]),
)
def test_a_flag_that_cannot_work_is_a_mistake_of_the_command_line(clip: Path, flags: tuple[object, ...]) -> None:
    assert onlooker("replay", clip, "--timeout", 0.2, *flags).status == 2


def test_ctrl_c_ends_the_stream_for_the_node_too(clip: Path, engine: FakeEngine, node: Node) -> None:
    flags = ("--loop", "--rate", 10, *endpoint_flags(node, "frames", "control"))
    with start_onlooker("replay", clip, *flags) as command:
        until(lambda: len(engine.pictures("front")) > 12, 20)
        command.send_signal(signal.SIGINT)
        out, err = command.communicate(timeout=10)
    assert command.returncode == 130, err
    assert out.startswith("front: ")
    assert "Traceback" not in err
    with NodeClient(node.endpoints["ask"], node.endpoints["control"]) as client:
        assert client.streams()[0].state == "ended"


def test_the_summary_after_ctrl_c_adds_up(clip: Path, engine: FakeEngine, node: Node) -> None:
    engine.encode_s = 0.3
    flags = ("--loop", "--rate", 0, "--lossless", *endpoint_flags(node, "frames", "control"))
    with start_onlooker("replay", clip, *flags) as command:
        until(lambda: engine.pictures("front"), 20)
        command.send_signal(signal.SIGINT)
        out, err = command.communicate(timeout=10)
    assert command.returncode == 130, err
    found = re.search(r"(\d+) frames .*node so far: received (\d+), encoded (\d+), pending (\d+), dropped none", out)
    assert found, out
    sent, received, encoded, pending = map(int, found.groups())
    assert sent == received == encoded + pending


def counted(received: int, encoded: int, pending: int) -> FrameCounters:
    return FrameCounters(
        received=received, kept=received, encoded=encoded, pending=pending, padded=0, dropped={}, gaps=0
    )


@pytest.mark.parametrize(
    ("before", "after", "own"),
    [
        ((0, 0, 0), (9, 5, 4), (9, 5, 4)),
        ((20, 12, 8), (29, 25, 4), (9, 5, 4)),
        ((20, 12, 8), (29, 15, 14), (9, 0, 9)),
        ((20, 12, 8), (9, 5, 4), (9, 5, 4)),
    ],
    ids=["the first", "after another", "behind another", "of a node that was restarted"],
)
def test_only_the_frames_of_this_replay_are_counted(
    before: tuple[int, int, int], after: tuple[int, int, int], own: tuple[int, int, int]
) -> None:
    arrivals = Arrivals.between(counted(*before), counted(*after))
    assert (arrivals.received, arrivals.encoded, arrivals.pending) == own


@pytest.mark.parametrize("flags", [("--lossless",), ()], ids=["lossless", "lossy"])
def test_a_node_that_dies_ends_in_a_summary_and_an_error(
    clip: Path, engine: FakeEngine, flags: tuple[str, ...]
) -> None:
    with running_node(engine) as node:
        ends = endpoint_flags(node, "frames", "control")
        command = start_onlooker("replay", clip, "--loops", 3, "--rate", 4, "--timeout", 0.5, *flags, *ends)
        until(lambda: engine.pictures("front"), 20)
    with command:
        out, err = command.communicate(timeout=20)
    assert command.returncode == 3
    assert re.match(r"front: \d+ frames ", out)
    assert "no reply from" in err
    assert "within 0.5 s" in err


def test_a_playback_counts_the_frames_that_nobody_listened_to(clip: Path) -> None:
    with FramePublisher("front", bind="tcp://127.0.0.1:*") as publisher, zmq.Context() as context:
        with context.socket(zmq.SUB) as listener:
            listener.subscribe("frame/front/")
            listener.connect(publisher.endpoint)
            assert publisher.wait_for_subscriber(5)
            playback = Playback(open_video(str(clip)), publisher, PlaybackOptions(rate=0), threading.Event())
        until(lambda: not publisher.has_subscriber)
        assert playback.trouble is None
        playback.run()
        assert playback.trouble == "no node listens"
        assert "no node listened to 12 of the 12 frames" in str(UnheardError("front", playback.position))


def test_an_account_knows_whether_its_node_is_there(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(playback, "PROBE_TIMEOUT_S", 0.2)
    with running_node(engine) as node:
        client = NodeClient(node.endpoints["ask"], node.endpoints["control"])
        publisher = FramePublisher("front", connect=node.endpoints["frames"])
        account = Account(client, publisher)
        account.probe()
        assert not account.is_silent
    with client, publisher:
        account.probe()
        assert account.is_silent


def test_keys_open_a_node_that_requires_them(clip: Path, tmp_path: Path, engine: FakeEngine) -> None:
    for name in ("node", "camera", "stranger"):
        assert onlooker("keygen", tmp_path / name, name).status == 0
    security = {"security__curve": "required", "security__client_keys": str(tmp_path / "camera")}
    with running_node(engine, security__server_key=str(tmp_path / "node" / "node.key_secret"), **security) as node:
        server_key = ("--server-key", tmp_path / "node" / "node.key")
        known = replay(
            node, clip, "--rate", 0, "--lossless", *server_key, "--client-key", tmp_path / "camera/camera.key_secret"
        )
        stranger = replay(node, clip, *server_key, "--client-key", tmp_path / "stranger/stranger.key_secret")
    assert known.status == 0, known.err
    assert seen(engine) == list(range(12))
    assert stranger.status == 1
    assert "not allowed" in stranger.err


@pytest.mark.parametrize(
    ("video", "name"),
    [
        ("videos/gate.mp4", "gate"),
        ("back yard (1).mkv", "back-yard-1"),
        ("...mp4", "video"),
        ("http://camera/live/door.mjpeg?user=x", "door"),
        ("é.mp4", "video"),
        ("x" * 100 + ".mp4", "x" * 64),
    ],
)
def test_a_stream_is_named_after_its_file(video: str, name: str) -> None:
    assert stream_slug(video) == name


def test_files_of_one_name_get_streams_of_their_own() -> None:
    assert stream_names(["a/x.mp4", "b/x.mp4", "x-2.mp4"], []) == ["x", "x-2", "x-2-2"]
