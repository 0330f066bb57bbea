"""Plots are PNG files with everything in them, and what stands in their way is said before anything is measured."""

import sys
from pathlib import Path

import cv2
import pytest
from replies import asked, showing

from onlooker.tools.plot import PlotError, check_plot, plot_lengths, plot_recall, plot_settings, wilson
from onlooker.tools.scenario import Keeping
from onlooker.tools.score import Count, compare, score, score_recall

NATIVE = showing(*(asked(num_chunks=num, text="red" if num < 20 else "blue") for num in (1, 2, 7, 30)))
TURNS = showing(asked(num_chunks=7), layout="turns", chunk_frames=8)


def ink(path: Path) -> float:
    """The share of a picture that is not white."""
    pixels = cv2.imread(str(path))
    assert pixels is not None
    return float((pixels < 250).any(axis=2).mean())


def test_accuracy_by_length_is_drawn(tmp_path: Path):
    plot_lengths(score([NATIVE, TURNS]), tmp_path / "lengths.png", "a model")
    assert ink(tmp_path / "lengths.png") > 0.01


def test_settings_are_drawn_also_where_one_tells_no_times(tmp_path: Path):
    plot_settings(compare([NATIVE, TURNS, showing(asked(), chunk_frames=2)]), tmp_path / "settings.png", "a model")
    assert ink(tmp_path / "settings.png") > 0.01


def test_what_is_still_known_is_drawn_a_panel_for_each_layout(tmp_path: Path):
    questions = asked(age=0), asked(age=20, text="blue")
    window = Keeping("window", "window", share=0.25)
    native = [showing(*questions), showing(*questions, keeping=window)]
    plot_recall(score_recall(native), tmp_path / "one.png", "a model")
    plot_recall(score_recall([*native, showing(*questions, layout="turns")]), tmp_path / "two.png", "a model")
    one, two = (cv2.imread(str(tmp_path / name)) for name in ("one.png", "two.png"))
    assert one is not None and two is not None
    assert two.shape[0] == 2 * one.shape[0]
    assert ink(tmp_path / "one.png") > 0.01


def test_a_place_that_is_none_is_refused_beforehand(tmp_path: Path):
    check_plot(tmp_path / "x.png")
    with pytest.raises(PlotError, match="there is no folder"):
        check_plot(tmp_path / "none" / "x.png")


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PlotError, match=r"onlooker\[plot\]"):
        check_plot(tmp_path / "x.png")


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path):
    with pytest.raises(PlotError, match="directory"):
        plot_lengths(score([NATIVE]), tmp_path, "a model")


def test_the_interval_of_a_share_is_wilson_s():
    assert wilson(Count(0, 10)) == pytest.approx((0.0, 0.2775), abs=1e-3)
    assert wilson(Count(9, 10)) == pytest.approx((0.596, 0.982), abs=1e-3)
    assert wilson(Count(10, 10))[1] == 1.0
    assert wilson(Count(0, 0)) == (0.0, 1.0)
