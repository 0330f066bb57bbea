"""Feeding a node from a page, against a node around a fake engine."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from clips import HEIGHT, WIDTH, number, write_clip
from deadline import until
from fakes import FakeEngine
from nodes import running_node

from onlooker.node.node import Node
from onlooker.protocol.client import NodeClient
from onlooker.protocol.errors import NodeError, NoReplyError
from onlooker.protocol.messages import FrameCounters
from onlooker.tools.link import LOSSLESS_IN_FLIGHT, Link
from onlooker.tools.video import VideoError
from onlooker.tools.web_source import (
    MAX_SHOWN_WIDTH,
    Player,
    Sources,
    StreamSettings,
    Webcam,
    make_sample,
    parse_settings,
    shown_jpeg,
)

NUM_FRAMES = 20
FASTEST = 0.0


@pytest.fixture
def node() -> Iterator[Node]:
    with FakeEngine() as engine, running_node(engine, telemetry__period_s=0.05) as node:
        yield node


@pytest.fixture
def client(node: Node) -> Iterator[NodeClient]:
    with NodeClient(node.endpoints["ask"], node.endpoints["control"], timeout_s=5.0) as client:
        yield client


@pytest.fixture
def sources(node: Node, client: NodeClient) -> Iterator[Sources]:
    link = Link(
        node.endpoints["frames"], control=node.endpoints["control"], timeout_s=1.0, max_in_flight=LOSSLESS_IN_FLIGHT
    )
    sources = Sources(client, link)
    yield sources
    sources.close()


@pytest.fixture
def clip(tmp_path: Path) -> str:
    return str(write_clip(tmp_path / "clip.mp4", NUM_FRAMES))


def playing(sources: Sources, clip: str, rate: float) -> Player:
    sources.play(clip, "clip", rate, StreamSettings())
    player = sources.player("clip")
    assert player is not None
    return player


def frames(client: NodeClient, stream: str) -> FrameCounters:
    return next(stats.frames for stats in client.streams() if stats.stream == stream)


def test_a_file_is_played_to_its_end_and_no_frame_is_lost(sources: Sources, clip: str, client: NodeClient) -> None:
    player = playing(sources, clip, FASTEST)
    until(lambda: player.is_over)
    assert player.played is not None, player.error
    assert (player.played.sent, frames(client, "clip").encoded) == (NUM_FRAMES, NUM_FRAMES)
    assert player.position is not None and player.position.played_s == pytest.approx(1.9)


def test_a_player_that_is_paused_sends_nothing_and_goes_on_at_its_own_pace(sources: Sources, clip: str) -> None:
    player = playing(sources, clip, 1.0)
    until(lambda: player.position and player.position.num_sent >= 2)
    player.hold()
    assert player.state == "paused"
    assert player.position is not None
    shown = until(lambda: sources.pictures.newest("clip"))
    held = player.position.num_sent
    assert held < NUM_FRAMES
    player.go_on()
    until(lambda: player.position and player.position.num_sent > held + 1)
    assert player.position.lag_s < 0.5, "what came after the pause was not due so much later"
    newest = until(lambda: sources.pictures.newest("clip"))
    assert newest is not None and shown is not None and newest.number > shown.number


def test_a_player_that_is_stopped_tells_the_node_that_the_stream_has_ended(
    sources: Sources, clip: str, client: NodeClient
) -> None:
    player = playing(sources, clip, 0.5)
    until(lambda: player.position and player.position.num_sent >= 2)
    player.stop()
    assert (player.state, player.was_stopped) == ("ended", True)
    until(lambda: {stats.stream: stats.state for stats in client.streams()}["clip"] == "ended")


def test_what_is_being_played_does_not_start_over_until_it_is_stopped(sources: Sources, clip: str) -> None:
    first = playing(sources, clip, 0.5)
    until(lambda: first.position and first.position.num_sent)
    with pytest.raises(ValueError, match="clip is being played"):
        playing(sources, clip, FASTEST)
    assert sources.player("clip") is first and not first.is_over
    first.stop()
    second = playing(sources, clip, FASTEST)
    until(lambda: second.is_over)
    assert second.played is not None and second.played.node is not None
    assert second.played.node.encoded == NUM_FRAMES


def test_what_is_no_video_is_told_before_a_stream_is_added(
    sources: Sources, client: NodeClient, tmp_path: Path
) -> None:
    path = tmp_path / "notes.mp4"
    path.write_text("no video")
    with pytest.raises(VideoError):
        sources.play(str(path), "notes", FASTEST, StreamSettings())
    assert client.stream_names() == ["front"]


def test_a_node_that_goes_away_ends_the_player_with_a_word(node: Node, sources: Sources, clip: str) -> None:
    player = playing(sources, clip, 4.0)
    until(lambda: player.position and player.position.num_sent)
    node.close()
    until(lambda: player.state == "failed")
    assert isinstance(player.error, NoReplyError)


def test_the_newest_picture_is_there_to_look_at(sources: Sources, clip: str) -> None:
    assert sources.pictures.newest("clip") is None
    player = playing(sources, clip, FASTEST)
    until(lambda: player.is_over)
    shown = sources.pictures.newest("clip")
    assert shown is not None
    assert (shown.number, number(shown.pixels)) == (NUM_FRAMES - 1, NUM_FRAMES - 1)


def test_pictures_are_shown_in_a_moderate_size() -> None:
    cv2 = pytest.importorskip("cv2")
    for size in ((HEIGHT, WIDTH), (2160, 3840)):
        jpeg = shown_jpeg(np.full((*size, 3), (200, 30, 30), np.uint8))
        picture = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
        assert picture.shape[1] == min(size[1], MAX_SHOWN_WIDTH)
        assert picture.shape[0] / picture.shape[1] == pytest.approx(size[0] / size[1], rel=0.01)
        assert picture[0, 0].argmax() == 2  # OpenCV's red


def test_a_webcam_is_a_stream_and_may_come_again(node: Node, client: NodeClient) -> None:
    link = Link(node.endpoints["frames"], control=node.endpoints["control"])
    sources = Sources(client, link)
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    webcam = sources.webcam("front")
    for num_sent in range(1, 9):
        webcam.send(pixels)
        # A camera does not wait, and a burst may lose its end.
        until(lambda num_sent=num_sent: frames(client, "front").received == num_sent)
        if num_sent % 4 == 0:
            webcam.end()
    until(lambda: frames(client, "front").encoded == 8)
    assert isinstance(webcam, Webcam) and sources.webcam("front") is webcam
    sources.close()


def test_settings_are_those_of_a_new_stream_and_of_one_that_begins_anew(
    sources: Sources, clip: str, client: NodeClient
) -> None:
    sources.play(clip, "clip", FASTEST, StreamSettings(chunk_frames=2))
    assert chunk_frames(client, "clip") == 2
    sources.provide("clip", StreamSettings(chunk_frames=8))
    assert chunk_frames(client, "clip") == 2
    sources.apply("clip", StreamSettings(chunk_frames=8))
    assert (chunk_frames(client, "clip"), frames(client, "clip").encoded) == (8, 0)


def chunk_frames(client: NodeClient, stream: str) -> int:
    return next(stats.chunk_frames for stats in client.streams() if stats.stream == stream)


def test_settings_that_no_node_takes_are_the_node_s_own_error(sources: Sources) -> None:
    with pytest.raises(NodeError):
        sources.provide("odd", StreamSettings(chunk_frames=5))


def test_settings_are_read_as_people_type_them() -> None:
    assert parse_settings("4", "", "", "") == StreamSettings(chunk_frames=4)
    typed = StreamSettings(chunk_frames=2, fps=2.5, encode_width=640, encode_height=360, memory_bytes=3 << 19)
    for size in ("640x360", " 640 x 360 ", "640\N{MULTIPLICATION SIGN}360", "640,360"):
        assert parse_settings("2", " 2.5", size, "1.5 ") == typed


@pytest.mark.parametrize(
    ("fps", "size", "memory", "word"),
    [
        ("fast", "", "", "Frames a second"),
        ("0", "", "", "Frames a second"),
        ("-1", "", "", "Frames a second"),
        ("inf", "", "", "Frames a second"),
        ("nan", "", "", "Frames a second"),
        ("", "640", "", "640x360"),
        ("", "640x", "", "640x360"),
        ("", "", "lots", "Memory"),
    ],
)
def test_settings_that_cannot_be_read_say_which(fps: str, size: str, memory: str, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        parse_settings("4", fps, size, memory)


def test_the_sample_is_a_video(tmp_path: Path) -> None:
    from onlooker.tools.video import open_video

    with open_video(make_sample(str(tmp_path / "sample.mp4"))) as video:
        assert video.duration_s == pytest.approx(12.0, abs=0.2)
