"""`onlooker camera`, on sources that drop: of our own, and an HTTP camera on this machine."""

import io
import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from clips import grey, number
from commands import endpoint_flags, onlooker, start_onlooker
from deadline import until
from fakes import FakeEngine
from nodes import running_node
from PIL import Image

from onlooker.protocol.client import NodeClient
from onlooker.tools.camera import Camera
from onlooker.tools.video import Video, VideoError

PICTURES_A_CONNECTION = 8


class FakeSource(Video):
    """A source that shows `num` pictures and then drops."""

    reader = "fake"

    def __init__(self, num: int, *, fails: bool = False) -> None:
        super().__init__("fake")
        self._num = num
        self._fails = fails
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True

    def decode(self, start_ns: int) -> Iterator[tuple[int, Callable[[], np.ndarray]]]:
        for n in range(self._num):
            yield 0, lambda n=n: np.full((2, 2, 3), grey(n), np.uint8)
        if self._fails:
            raise VideoError("fake", "the cable was pulled")


def camera(sources: list[Video], said: list[str], **settings: Any) -> Camera:
    """A camera that opens the given sources one after the other, and stops with the last."""
    stop = threading.Event()
    left = iter(sources)

    def open_next() -> Video:
        source = next(left, None)
        if source is None:
            stop.set()
            return FakeSource(0)
        return source

    return Camera(open_next, stop, said.append, first_pause_s=0.001, max_pause_s=0.003, **settings)


def test_a_source_that_drops_is_opened_again_and_closed_each_time() -> None:
    sources, said = [FakeSource(2), FakeSource(3, fails=True), FakeSource(1)], []
    shots = list(camera([*sources], said).shots())
    assert [number(shot.pixels) for shot in shots] == [0, 1, 0, 1, 2, 0]
    assert all(source.is_closed for source in sources)
    assert any("the cable was pulled" in line for line in said)


def test_the_pause_grows_while_nothing_comes_and_is_short_again_after_a_picture() -> None:
    said: list[str] = []
    list(camera([FakeSource(1), FakeSource(0), FakeSource(0), FakeSource(1)], said).shots())
    assert [line.rpartition(" in ")[2] for line in said] == ["0.001 s", "0.002 s", "0.003 s", "0.001 s"]


def test_a_source_that_never_gave_a_picture_is_an_error() -> None:
    with pytest.raises(VideoError, match="pulled"):
        list(camera([FakeSource(0, fails=True)], []).shots())


def test_pictures_carry_the_time_they_were_grabbed() -> None:
    before = time.time_ns()
    times = [shot.captured_ns for shot in camera([FakeSource(3)], []).shots()]
    assert before <= times[0] <= times[1] <= times[2] <= time.time_ns()


@pytest.mark.parametrize(("fps", "taken"), [(None, 30), (200, 30), (20, 3), (66, 10)])
def test_a_rate_thins_by_time(fps: float | None, taken: int) -> None:
    clock = itertools.count(10**18, 5_000_000)  # a picture each 5 ms
    shots = list(camera([FakeSource(30)], [], fps=fps, now_ns=lambda: next(clock)).shots())
    assert len(shots) == taken


class MjpegCamera(BaseHTTPRequestHandler):
    """A network camera that hangs up after some pictures."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        for n in range(PICTURES_A_CONNECTION):
            jpeg = io.BytesIO()
            Image.new("RGB", (64, 48), (grey(n),) * 3).save(jpeg, "JPEG")
            head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {jpeg.tell()}\r\n\r\n"
            self.wfile.write(head.encode() + jpeg.getvalue() + b"\r\n")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), MjpegCamera) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/live.mjpeg"
        server.shutdown()
        thread.join()


def test_a_network_camera_is_remembered_across_its_hanging_up(address: str) -> None:
    with FakeEngine() as engine, running_node(engine) as node:
        flags = ("--stream", "gate", "--json", *endpoint_flags(node, "frames", "control"))
        with start_onlooker("camera", address, *flags) as command:
            until(lambda: "gate" in engine.streams() and len(engine.pictures("gate")) > PICTURES_A_CONNECTION, 20)
            command.send_signal(signal.SIGTERM)
            out, err = command.communicate(timeout=10)
        assert command.returncode == 0, err
        assert '"opened":2' in out
        assert {picture.ts_kind for picture in engine.pictures("gate")} == {"capture"}
        with NodeClient(node.endpoints["ask"], node.endpoints["control"]) as client:
            assert {stats.stream: stats.state for stats in client.streams()}["gate"] == "ended"


def test_a_camera_ends_by_itself_after_the_time_it_was_given(address: str) -> None:
    with FakeEngine() as engine, running_node(engine) as node:
        flags = ("--duration", 0.001, "--json", "--encoding", "rgb8", *endpoint_flags(node, "frames", "control"))
        ended = onlooker("camera", address, *flags)
    assert ended.status == 0
    assert ended.json["sent"] >= 1


def test_an_address_where_nobody_is_is_an_error_with_a_reason_and_no_stream() -> None:
    with FakeEngine() as engine, running_node(engine) as node:
        ended = onlooker("camera", "http://127.0.0.1:9/live", *endpoint_flags(node, "frames", "control"))
        assert engine.streams() == ["front"]
    assert ended.status == 1
    assert "http://127.0.0.1:9/live: PyAV cannot open it: Connection refused" in ended.err


def test_a_file_is_no_camera() -> None:
    ended = onlooker("camera", __file__)
    assert ended.status == 2
    assert "onlooker replay" in ended.err
