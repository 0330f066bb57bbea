"""The far side of a benchmark over the wire, as a process of its own: a camera that sends as fast as the node takes.

Publishes frames of one stream without loss, waits until they are in the memory, asks a question a few times, and
prints what it measured as one line of JSON. Imports no torch.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from ..protocol.camera import FramePublisher
from ..protocol.client import NodeClient
from ..protocol.errors import OnlookerError
from ..protocol.messages import Answer, StreamStats

NUM_DISTINCT_FRAMES = 8
FPS = 8.0
POLL_S = 0.002
READY_TIMEOUT_S = 30.0
QUESTION = "What do you see now?"
NUM_QUESTIONS = 5

_FRAME_NS = round(1e9 / FPS)


@dataclass(frozen=True, slots=True)
class Sent:
    """What went over the wire, and when it was in the memory."""

    num_sent: int
    num_received: int
    num_encoded: int
    dropped: dict[str, int]
    num_bytes: int
    wall_s: float  # from the first frame until the last one is in the memory
    encoded_size: tuple[int, int] | None
    num_tokens: int
    first_token_ms: float | None  # from the request until the reply; None: nothing was there to ask about
    num_prompt_tokens: int | None


def pictures(size: tuple[int, int], num: int) -> Iterator[np.ndarray]:
    """Something that moves before a background with some grain, uint8, RGB, as cameras see it."""
    width, height = size
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width]
    background = np.stack([x * 200 // width, y * 200 // height, (x + y) * 200 // (width + height)], axis=-1)
    grain = rng.integers(0, 12, (height, width, 1))
    for i in range(num):
        picture = (background + grain).astype(np.uint8)
        left, top = width * i // (2 * num), height // 4
        picture[top : top + height // 4, left : left + width // 4] = (230, 40, 40)
        yield picture


def payloads(size: tuple[int, int], encoding: str) -> list[bytes]:
    """A few frames as they go over the wire, encoded beforehand: a camera does that in hardware."""
    frames = pictures(size, NUM_DISTINCT_FRAMES)
    if encoding == "rgb8":
        return [frame.tobytes() for frame in frames]
    import cv2

    bgr = (np.ascontiguousarray(frame[..., ::-1]) for frame in frames)
    return [cv2.imencode(f".{encoding}", frame)[1].tobytes() for frame in bgr]


class Camera:
    """Sends frames of a stream, never more ahead of the node than its ring holds."""

    def __init__(self, node: NodeClient, publisher: FramePublisher, *, max_in_flight: int) -> None:
        self._node = node
        self._publisher = publisher
        self._max_in_flight = max_in_flight
        self._num_done = 0

    def send(self, frames: Sequence[bytes], num: int, size: tuple[int, int], encoding: str) -> float:
        """Send so many frames; return the seconds until all are done with. Raises the client's errors."""
        began = time.perf_counter()
        for seq, payload in zip(range(num), itertools.cycle(frames), strict=False):
            self._wait_until(seq + 1 - self._max_in_flight)
            self._publisher.publish_encoded(payload, encoding, size=size, ts=seq * _FRAME_NS, ts_kind="media", fps=FPS)
        self._publisher.end()
        self._wait_until(num + 1)
        return time.perf_counter() - began

    def stats(self) -> StreamStats:
        return next(stats for stats in self._node.streams() if stats.stream == self._publisher.stream)

    def _wait_until(self, num: int) -> None:
        """Wait until the node is done with so many messages."""
        while self._num_done < num:
            frames = self.stats().frames
            if frames.last_session == self._publisher.session and isinstance(frames.last_seq, int):
                self._num_done = frames.last_seq + 1 - frames.pending
            if self._num_done < num:
                time.sleep(POLL_S)


def first_token_ms(node: NodeClient, stream: str) -> tuple[float, int]:
    """Median milliseconds from a question until its first token is back on this side, and its number of tokens."""
    times: list[float] = []
    answers: list[Answer] = []
    for _ in range(NUM_QUESTIONS):
        began = time.perf_counter()
        answers.append(node.ask(stream, QUESTION, max_new_tokens=1))
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times), answers[-1].num_prompt_tokens


def run(args: argparse.Namespace) -> Sent:
    """Send, wait, ask. Raises the client's errors."""
    size = (args.width, args.height)
    frames = payloads(size, args.encoding)
    with (
        NodeClient(args.ask, args.control, timeout_s=READY_TIMEOUT_S) as node,
        FramePublisher(args.stream, connect=args.frames, lossless=True) as publisher,
    ):
        if not publisher.wait_for_subscriber(READY_TIMEOUT_S):
            raise OnlookerError(f"no node asks for the frames of {args.stream}")
        camera = Camera(node, publisher, max_in_flight=args.in_flight)
        wall_s = camera.send(frames, args.num, size, args.encoding)
        stats = camera.stats()
        first = first_token_ms(node, args.stream) if stats.cache.num_frames else None
    return Sent(
        num_sent=args.num,
        num_received=stats.frames.received,
        num_encoded=stats.frames.encoded,
        dropped=stats.frames.dropped,
        num_bytes=sum(len(payload) for payload, _ in zip(itertools.cycle(frames), range(args.num), strict=False)),
        wall_s=wall_s,
        encoded_size=stats.encoded_size if isinstance(stats.encoded_size, tuple) else None,
        num_tokens=stats.cache.num_tokens,
        first_token_ms=first[0] if first else None,
        num_prompt_tokens=first[1] if first else None,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Be the camera."""
    parser = argparse.ArgumentParser(description="The camera of a benchmark; started by it.")
    for name in ("frames", "ask", "control", "stream", "encoding"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("width", "height", "num", "in-flight"):
        parser.add_argument(f"--{name}", type=int, required=True)
    try:
        sent = run(parser.parse_args(argv))
    except (OnlookerError, ImportError) as error:
        print(f"the camera failed: {error}", file=sys.stderr)
        return 1
    print(json.dumps(asdict(sent)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
