import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from onlooker.node.preprocess import PatchGeometry, encode_size, patchify, resize_by_axes, to_patches

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
QWEN2 = PatchGeometry(14, 2, 2, MEAN, STD, min_pixels=56 * 56, max_pixels=1280 * 28 * 28)
QWEN3 = PatchGeometry(16, 2, 2, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), min_pixels=256 * 256, max_pixels=4096 * 4096)
GEOMETRIES = [QWEN2, QWEN3]

sides = st.integers(1, 5000)
pixel_bounds = st.none() | st.integers(1, 4_000_000)


def theirs(frame: np.ndarray, geometry: PatchGeometry) -> tuple[Tensor, list[int]]:
    """Patches and grid of one picture, (patches, 3, temporal, patch, patch), by transformers."""
    processor = Qwen2VLImageProcessorPil(
        patch_size=geometry.patch,
        merge_size=geometry.merge,
        temporal_patch_size=geometry.temporal_patch,
        image_mean=list(geometry.mean),
        image_std=list(geometry.std),
        size={"shortest_edge": geometry.min_pixels, "longest_edge": geometry.max_pixels},
    )
    out = processor(images=frame, return_tensors="pt")
    return unflat(out["pixel_values"], geometry), out["image_grid_thw"][0].tolist()


def unflat(patches: Tensor, geometry: PatchGeometry) -> Tensor:
    return patches.view(-1, 3, geometry.temporal_patch, geometry.patch, geometry.patch)


def ours(frames: list[np.ndarray], geometry: PatchGeometry) -> Tensor:
    """Patches of frames, (temporal, patches, 3, temporal patch, patch, patch)."""
    height, width = frames[0].shape[:2]
    size = encode_size((width, height), geometry)
    patches = unflat(to_patches(torch.from_numpy(np.stack(frames)), size, geometry), geometry)
    return patches.unflatten(0, (-1, size[0] * size[1] // geometry.patch**2))


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def scene(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Like a camera's picture: soft light, edges as a lens draws them, a little sensor noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    light = 110 + 60 * np.sin(5 * x + 2 * y) + 40 * np.cos(9 * y)
    picture = np.stack([light, light * 0.8 + 30 * x, light * 0.6 + 60 * y], axis=-1)
    for _ in range(6):
        top, left = rng.integers(0, height), rng.integers(0, width)
        picture[top : top + height // 4, left : left + width // 5] = rng.integers(0, 256, 3)
    for axis in (0, 1, 0, 1):
        picture = (np.roll(picture, 1, axis) + 2 * picture + np.roll(picture, -1, axis)) / 4
    return (picture + rng.normal(0, 3, picture.shape)).clip(0, 255).astype(np.uint8)


def checkers(height: int, width: int) -> np.ndarray:
    """The hardest edges there are."""
    y, x = np.mgrid[0:height, 0:width] // 9 % 2
    return np.repeat(((x ^ y) * 255).astype(np.uint8)[..., None], 3, axis=-1)


def steps_apart(frame: np.ndarray, geometry: PatchGeometry) -> Tensor:
    """How far every value is from transformers', in steps of a uint8 pixel."""
    std = torch.tensor(geometry.std).view(3, 1, 1, 1)
    return ((ours([frame], geometry)[0] - theirs(frame, geometry)[0]) * std * 255).abs()


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("grid", [(8, 8), (9, 14), (23, 8)])
def test_a_frame_that_needs_no_resize_equals_transformers(grid: tuple[int, int], geometry: PatchGeometry):
    frame = noise(grid[0] * geometry.factor, grid[1] * geometry.factor)
    expected, grid_thw = theirs(frame, geometry)
    assert grid_thw == [1, grid[0] * 2, grid[1] * 2]
    assert (ours([frame], geometry)[0] - expected).abs().max() <= 1e-6


SIZES = [(480, 640), (1080, 1920), (271, 503), (120, 160)]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_a_resized_scene_is_within_two_pixel_steps_of_transformers(height: int, width: int, geometry: PatchGeometry):
    apart = steps_apart(scene(height, width), geometry)
    assert apart.max() <= 2.01
    assert apart.mean() <= 0.2


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_devices_without_the_uint8_kernel_resize_alike(height: int, width: int):
    pixels = torch.from_numpy(scene(height, width)).permute(2, 0, 1)[None]
    one_by_one = resize_by_axes(pixels, 252, 448)
    at_once = torch.nn.functional.interpolate(pixels, (252, 448), mode="bicubic", antialias=True)
    apart = (one_by_one - at_once).abs()
    assert apart.max() <= 2
    assert apart.mean() <= 0.1


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_even_the_hardest_edges_are_resized_as_in_transformers(height: int, width: int, geometry: PatchGeometry):
    apart = steps_apart(checkers(height, width), geometry)
    assert apart.max() <= 20
    assert apart.mean() <= 0.5


def test_each_frame_of_a_chunk_is_what_it_would_be_alone():
    frames = [scene(240, 320, seed) for seed in range(4)]
    patches = ours(frames, QWEN2)
    assert patches.shape[0] == 2
    for i, frame in enumerate(frames):
        alone, _ = theirs(frame, QWEN2)
        mine = ours([frame], QWEN2)[0]
        assert torch.equal(patches[i // 2][:, :, i % 2], mine[:, :, 0])
        assert (mine - alone).abs().max() <= 0.04


@pytest.mark.parametrize("num", [1, 3, 5])
def test_the_last_frame_fills_an_odd_chunk(num: int):
    frames = [noise(112, 140, seed) for seed in range(num)]
    assert torch.equal(ours(frames, QWEN2), ours([*frames, frames[-1]], QWEN2))


def test_patches_are_read_block_by_block():
    """Row by row of blocks, and inside a block of merge x merge row by row of patches."""
    p = QWEN2.patch
    rows, columns = np.mgrid[0 : 4 * p, 0 : 6 * p] // p
    frame = torch.from_numpy((rows * 10 + columns).astype(np.float32)).expand(2, 3, -1, -1)
    numbers = patchify(frame, QWEN2)[:, 0].int().tolist()
    assert numbers[:8] == [0, 1, 10, 11, 2, 3, 12, 13]
    assert numbers[12:16] == [20, 21, 30, 31]


def test_patches_keep_channel_frame_row_and_column_in_this_order():
    frame = torch.arange(2 * 3 * 28 * 28, dtype=torch.float32).view(2, 3, 28, 28)
    first = unflat(patchify(frame, QWEN2), QWEN2)[0]
    assert torch.equal(first, frame.permute(1, 0, 2, 3)[:, :, :14, :14])


@given(width=sides, height=sides, least=pixel_bounds, most=pixel_bounds)
@settings(max_examples=400, deadline=None)
def test_the_encode_size_is_that_of_transformers(width: int, height: int, least: int | None, most: int | None):
    geometry = QWEN2
    low = geometry.min_pixels if least is None else least
    high = geometry.max_pixels if most is None else most
    if low > high or max(width, height) > 200 * min(width, height):
        return
    expected = smart_resize(height, width, geometry.factor, low, high)
    assert encode_size((width, height), geometry, min_pixels=least, max_pixels=most) == expected[::-1]


@given(width=sides, height=sides, least=pixel_bounds, most=pixel_bounds)
@settings(max_examples=400, deadline=None)
def test_the_encode_size_is_whole_tokens_and_at_least_one(width: int, height: int, least: int | None, most: int | None):
    if max(width, height) > 200 * min(width, height):
        return
    size = encode_size((width, height), QWEN3, min_pixels=least, max_pixels=most)
    assert all(side >= 32 and side % 32 == 0 for side in size)
    assert QWEN3.grid(size) == (size[1] // 32, size[0] // 32)


def test_a_bound_of_the_stream_wins_over_the_models_own():
    assert encode_size((1920, 1080), QWEN3, max_pixels=20_000) == (160, 96)
    assert encode_size((64, 64), QWEN2, min_pixels=2_000_000) == (1428, 1428)


@pytest.mark.parametrize(
    ("explicit", "size"),
    [((640, 360), (644, 364)), ((1, 1), (28, 28)), ((28, 41), (28, 28)), ((10_000, 28), (9996, 28))],
)
def test_an_explicit_size_is_taken_to_whole_tokens(explicit: tuple[int, int], size: tuple[int, int]):
    assert encode_size((1920, 1080), QWEN2, explicit=explicit) == size


def test_an_explicit_size_wins_over_bounds_and_over_the_frames_shape():
    assert encode_size((1, 4000), QWEN2, explicit=(56, 56), min_pixels=1_000_000) == (56, 56)


@pytest.mark.parametrize("size", [(201, 1), (1, 201), (28 * 201, 28), (0, 5), (5, 0)])
def test_a_sliver_of_a_frame_is_refused_with_its_size(size: tuple[int, int]):
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]}"):
        encode_size(size, QWEN2)


def test_the_longest_sliver_that_is_allowed_is_encoded():
    width, height = encode_size((28 * 200, 28), QWEN2)
    assert (width, height) == smart_resize(28, 28 * 200, 28, QWEN2.min_pixels, QWEN2.max_pixels)[::-1]
