"""A node that has too little time, and then too little memory, gives up quality in steps, and takes it back."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from checkpoints import Checkpoints, DirectedModel
from deadline import until
from nodes import running_node
from torch import Tensor

from onlooker.node.engine import Engine
from onlooker.node.node import Node
from onlooker.node.vision import Vision
from onlooker.protocol.camera import FramePublisher
from onlooker.protocol.client import NodeClient
from onlooker.protocol.messages import Event, StreamStats, Vram
from onlooker.protocol.telemetry import TelemetrySubscriber

WAIT_S = 30.0
ALL = ["frame_rate", "gate", "drop", "encode_size"]
OF_A_WINDOW = [*ALL, "thin", "newest"]
NS = 1_000_000_000


class SharedDevice(Engine):
    """An engine on a device of which another process may take some."""

    free_bytes = 8 << 30

    def vram(self) -> Vram:
        known = {"total_bytes": 16 << 30, "free_bytes": self.free_bytes, "activations_peak_bytes": 0}
        known |= {"torch_allocated_bytes": 0, "torch_reserved_bytes": 0}
        return Vram(device="cuda:0", weights_bytes=1, kv_bytes=1, **known)


class SmallDevice(DirectedModel):
    """A model whose device has no memory for pictures wider than some."""

    max_width = 1 << 20

    def see(self, patches: Tensor, grid: tuple[int, int, int], between: Callable[[], None] | None = None) -> Vision:
        if grid[2] * self.geometry.patch > self.max_width:
            raise torch.OutOfMemoryError("that is too much")
        return super().see(patches, grid, between)


class Scene:
    """A node, a camera of moving noise, and who watches them."""

    def __init__(self, node: Node, model: SmallDevice, device: SharedDevice) -> None:
        ends = node.endpoints
        self.model, self.device = model, device
        self.client = NodeClient(ends["ask"], ends["control"], timeout_s=WAIT_S)
        self.camera = FramePublisher("front", connect=ends["frames"], lossless=True)
        self.watcher = TelemetrySubscriber(ends["telemetry"], kinds=["hello", "event"])
        self.num_sent = 0
        self.steps: list[Event] = []

    def stats(self) -> StreamStats:
        return self.client.streams()[0]

    def show(self, age_s: float = 0.0) -> StreamStats:
        """Send two pictures that are as old as that, and wait until they are done with."""
        side = 4 * self.model.geometry.factor
        for _ in range(2):
            pixels = np.random.default_rng(self.num_sent).integers(0, 256, (side, side, 3), dtype=np.uint8)
            self.camera.publish_image(pixels, ts=time.time_ns() - round(age_s * NS))
            self.num_sent += 1

        until(lambda: self.stats().frames.received == self.num_sent and self.stats().frames.pending < 2, WAIT_S)
        return self.stats()

    def hear(self, kind: str, rung: str) -> Event | None:
        """The event, if it has come; all that are steps are kept in order."""
        while (message := self.watcher.receive(0.02)) is not None:
            if isinstance(message.record, Event) and message.record.kind in ("degraded", "restored"):
                self.steps.append(message.record)
        return next((e for e in self.steps if (e.kind, e.details["rung"]) == (kind, rung)), None)


@contextmanager
def scene(checkpoints: Checkpoints, **settings: Any) -> Iterator[Scene]:
    model = SmallDevice(checkpoints.model("qwen2_5_vl"))
    engine = SharedDevice(model, max_concurrent_questions=2, scratch_tokens=128)
    engine.start()
    known = {"stream_defaults__chunk_frames": 2, "stream_defaults__degrade": True, "stream_defaults__min_pixels": 1}
    known |= {"stream_defaults__memory_bytes": "2MiB", "telemetry__period_s": 0.05}
    known |= {"degrade__settle_s": 0.01, "degrade__recover_s": 0.01, "degrade__recover_load": 1.0}
    try:
        with running_node(engine, **known | settings) as node:
            watched = Scene(node, model, engine)
            with watched.client, watched.camera, watched.watcher:
                assert watched.camera.wait_for_subscriber(WAIT_S)
                assert watched.watcher.receive(WAIT_S), "nobody is greeted"  # from now on no event is missed
                yield watched
    finally:
        assert engine.close(WAIT_S)


def accounted(stats: StreamStats) -> bool:
    frames = stats.frames
    return frames.received == frames.encoded + sum(frames.dropped.values()) + frames.pending


def test_lag_and_an_eaten_device_drive_a_stream_down_and_their_end_up_again(checkpoints: Checkpoints):
    forgetting = {"stream_defaults__retention": "window", "stream_defaults__memory_bytes": "128KiB"}
    with scene(checkpoints, degrade__settle_s=0.1, degrade__recover_s=0.1, **forgetting) as watched:
        begun = watched.show()
        full_size, num_tokens = begun.encoded_size, begun.cache.capacity_tokens
        num_answered = 0

        def ask() -> None:
            nonlocal num_answered
            assert watched.client.ask("front", "What?", max_new_tokens=2).memory.unchanged
            num_answered += 1

        until(lambda: [watched.show(age_s=9.0), ask(), watched.hear("degraded", "frame_rate")][-1], WAIT_S)
        watched.device.free_bytes = 1 << 20
        until(lambda: [watched.show(), ask(), watched.hear("degraded", "encode_size")][-1], WAIT_S)
        until(lambda: watched.show().encoded_size != full_size, WAIT_S)
        until(lambda: [watched.show(age_s=9.0), ask(), watched.hear("degraded", "newest")][-1], WAIT_S)
        until(lambda: watched.show(age_s=9.0).cache.num_tokens <= num_tokens / 2, WAIT_S)
        assert watched.stats().degraded == OF_A_WINDOW
        watched.device.free_bytes = 8 << 30
        until(lambda: [watched.show(), ask(), watched.hear("restored", "frame_rate")][-1], WAIT_S)
        until(lambda: watched.show().encoded_size == full_size, WAIT_S)
        stats = watched.stats()
        assert [event.details["rung"] for event in watched.steps] == [*OF_A_WINDOW, *reversed(OF_A_WINDOW)]
        reasons = [event.details["reason"] for event in watched.steps]
        assert (reasons[0], reasons[3], set(reasons[6:])) == ("lag", "device_memory", {"recovered"})
        assert set(reasons[4:6]) <= {"device_memory", "lag"}
        assert watched.steps[0].details["lag_ms"] > 2000 and watched.steps[3].details["free_bytes"] == 1 << 20
        assert accounted(stats) and stats.degraded == [] and stats.cache.capacity_tokens == num_tokens
        assert stats.frames.encoded == stats.cache.num_frames + stats.frames.forgotten > stats.cache.num_frames
        assert stats.frames.received == watched.num_sent and stats.frames.dropped["sampled_out"] > 0
        questions = watched.client.status().questions
        assert (questions.answered, questions.failed, questions.traces) == (num_answered, {}, 0)


def test_a_chunk_that_the_device_has_no_memory_for_is_tried_once_more_and_smaller(checkpoints: Checkpoints):
    with scene(checkpoints, degrade__recover_s=3600) as watched:
        watched.model.max_width = 2 * watched.model.geometry.factor
        stats = watched.show()
        assert (stats.frames.encoded, stats.frames.dropped) == (2, {})
        assert stats.encoded_size == (watched.model.max_width, watched.model.max_width)
        assert stats.degraded == ALL
        until(lambda: watched.hear("degraded", "encode_size"), WAIT_S)
        assert [event.details["reason"] for event in watched.steps] == ["out_of_memory"] * 4


def test_a_chunk_that_is_too_much_even_then_is_counted_and_the_node_goes_on(checkpoints: Checkpoints):
    with scene(checkpoints, degrade__recover_s=3600) as watched:
        watched.model.max_width = 1
        assert watched.show().frames.dropped == {"out_of_memory": 2}
        watched.model.max_width = 1 << 20
        until(lambda: watched.show().frames.encoded, WAIT_S)
        assert accounted(watched.stats())


def test_a_stream_that_was_not_to_give_up_anything_does_not(checkpoints: Checkpoints):
    with scene(checkpoints, stream_defaults__degrade=False) as watched:
        watched.model.max_width = 1
        assert watched.show(age_s=9.0).frames.dropped == {"out_of_memory": 2}
        watched.model.max_width = 1 << 20
        assert watched.show(age_s=9.0).degraded == []
        assert watched.hear("degraded", "frame_rate") is None
