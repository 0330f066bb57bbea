"""What is still is held back, whatever its noise; what changes passes, be it as small as a person far away."""

import numpy as np
import pytest

from onlooker.node.frame_gate import MAX_HELD_NS, FrameGate, View, thumbnail

SIZE = (768, 432)
S = 1_000_000_000
GATE = 10.0


def scene(seed: int = 0, sensor_noise: float = 4.0, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A gradient as a cheap sensor sees it."""
    width, height = size
    noise = np.random.default_rng(seed).normal(0, sensor_noise, (height, width, 3))
    return (np.linspace(40, 200, width)[None, :, None] + noise).clip(0, 255).astype(np.uint8)


def with_person(pixels: np.ndarray, x: int = 300, y: int = 200, contrast: int = 60) -> np.ndarray:
    """A person of 16 by 40 pixels, somewhat darker than what is behind."""
    pixels = pixels.copy()
    behind = pixels[y : y + 40, x : x + 16]
    behind[:] = np.maximum(behind.astype(int) - contrast, 0)
    return pixels


def view(pixels: np.ndarray, stream_ns: int = 0) -> View:
    return View((pixels.shape[1], pixels.shape[0]), stream_ns, thumbnail(pixels))


def gate(min_change: float = GATE) -> FrameGate:
    gate = FrameGate(min_change)
    gate.encoded = view(scene())
    return gate


@pytest.mark.parametrize("sensor_noise", [0.0, 4.0, 12.0])
def test_a_still_scene_looks_like_itself_whatever_the_noise(sensor_noise: float):
    still = gate()
    still.encoded = view(scene(0, sensor_noise))
    assert all(still.looks_like(view(scene(seed, sensor_noise))) is still.encoded for seed in range(1, 6))


@pytest.mark.parametrize(("x", "y"), [(0, 0), (300, 200), (311, 211), (752, 392)])
def test_someone_far_away_is_new_wherever_they_are(x: int, y: int):
    assert gate().looks_like(view(with_person(scene(1), x, y))) is None


def test_a_change_of_colour_alone_is_new():
    red, green = (np.full((18, 32, 3), colour, np.uint8) for colour in ((200, 0, 0), (0, 102, 0)))
    colours = FrameGate(GATE)
    colours.encoded = view(red)
    assert colours.looks_like(view(green)) is None


def test_a_slow_change_is_new_once_it_has_come_far_enough():
    slow, num_new, still = gate(), 0, scene(0, 0)
    for level in range(40):
        now = view((still * (1 - level / 200)).astype(np.uint8), level)
        if slow.looks_like(now) is None:
            slow.encoded, num_new = now, num_new + 1
    assert num_new == 3


def test_a_picture_of_another_size_is_new():
    assert gate().looks_like(view(scene(0, size=(384, 216)))) is None


def test_what_is_held_back_long_enough_passes():
    still = gate()
    assert still.looks_like(view(scene(1), MAX_HELD_NS - 1)) is still.encoded
    assert still.looks_like(view(scene(1), MAX_HELD_NS)) is None


def test_without_anything_encoded_all_is_new():
    assert FrameGate(255).looks_like(view(scene())) is None


def test_at_zero_all_is_new():
    assert gate(0).looks_like(view(scene())) is None
