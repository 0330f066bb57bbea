from pathlib import Path

import numpy as np
import pytest

from onlooker.tools.shapes import BACKGROUND, COLOURS, SCENES, ClipFormat, Scene, draw, frames, write_shapes
from onlooker.tools.video import read_video

CLIP = ClipFormat(width=160, height=120, fps=4, scene_frames=4)


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: f"{scene.colour} {scene.shape}")
def test_a_scene_is_one_shape_of_its_colour_on_the_background(scene: Scene) -> None:
    pixels = draw(scene, CLIP)
    colours = {tuple(colour) for colour in np.unique(pixels.reshape(-1, 3), axis=0).tolist()}
    assert colours == {BACKGROUND, COLOURS[scene.colour]}
    assert tuple(pixels[CLIP.height // 2, CLIP.width // 2]) == COLOURS[scene.colour]


def test_the_shapes_differ_in_the_area_they_fill() -> None:
    def filled(shape: str) -> float:
        scene = next(scene for scene in SCENES if scene.shape == shape)
        return (draw(scene, CLIP) != BACKGROUND).any(-1).mean() * CLIP.width * CLIP.height

    radius = CLIP.height * 0.3
    assert filled("circle") == pytest.approx(np.pi * radius**2, rel=0.05)
    assert filled("square") == pytest.approx((1.8 * radius) ** 2, rel=0.05)
    assert filled("triangle") == pytest.approx(2 * radius**2, rel=0.05)


def test_no_two_pictures_of_the_clip_are_the_same() -> None:
    assert len({pixels.tobytes() for pixels in frames(CLIP)}) == CLIP.num_frames


def test_the_clip_can_be_read_back_scene_by_scene(tmp_path: Path) -> None:
    clip = list(read_video(str(write_shapes(tmp_path / "shapes.mp4", CLIP))))
    assert [frame.media_ns for frame in clip] == [n * 250_000_000 for n in range(CLIP.num_frames)]
    middles = [tuple(clip[4 * n].pixels[60, 80].astype(int)) for n in range(3)]
    assert [int(np.argmax(middle)) for middle in middles] == [0, 2, 1]  # red, blue, green
