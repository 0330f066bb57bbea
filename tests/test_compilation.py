import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FAMILIES, Checkpoints, chunk, memory

from onlooker.node.compilation import MIN_WEIGHTS_BYTES, Compilation, compiled, should_compile
from onlooker.node.model import VisionLanguageModel, load_model
from onlooker.node.passes import Prefill

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DENSE = [family for family in FAMILIES if not family.endswith("moe")]


@pytest.fixture(autouse=True)
def stance() -> Iterator[None]:
    """What a test forbids the compiler, it forbids in the whole process."""
    yield
    torch.compiler.set_stance("default")


class Graphs:
    """A backend that counts what it is given to compile, and runs it as it is."""

    def __init__(self) -> None:
        self.num = 0

    def __call__(self, graph: Any, _inputs: Any) -> Any:
        self.num += 1
        return graph.forward


def see(model: VisionLanguageModel, num_frames: int, grid: tuple[int, int]) -> torch.Tensor:
    """Logits of a question about a chunk of that size."""
    stream = memory(model, chunk_frames=num_frames)
    stream.append(chunk(num=num_frames, grid=grid, factor=model.geometry.factor))
    span = stream.layout.question(stream.now.layout, "What?")
    return model.logits(model.read(span, Prefill([stream.extent(stream.now)])))


@pytest.mark.parametrize("family", DENSE)
def test_no_new_size_is_compiled_once_the_first_is(checkpoints: Checkpoints, family: str):
    model = load_model(str(checkpoints.path(family)), dtype="float32", device="cpu")
    sizes = [(2, (2, 3)), (4, (2, 3)), (2, (4, 5)), (1, (2, 2))]
    expected = [see(model, *size) for size in sizes]
    graphs = Graphs()
    assert Compilation(model.tower, model.language, graphs).use(lambda: None)
    logits = [see(model, *size) for size in sizes]
    assert graphs.num == 4  # before and after attention, in the tower and in the language model
    assert all((a - b).abs().max() <= 1e-5 for a, b in zip(logits, expected, strict=True))


def test_what_cannot_be_compiled_runs_as_it_is(checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture):
    model = load_model(str(checkpoints.path("qwen2_vl")), dtype="float32", device="cpu")
    expected = see(model, 2, (2, 3))

    def refuse(_graph: Any, _inputs: Any) -> Any:
        raise NotImplementedError("not today")

    assert not Compilation(model.tower, model.language, refuse).use(lambda: see(model, 2, (2, 3)))
    assert "not today" in caplog.text
    assert torch.equal(see(model, 2, (2, 3)), expected)


def test_compiled_pieces_that_are_given_up_run_as_they_were(checkpoints: Checkpoints):
    model = load_model(str(checkpoints.path("qwen2_vl")), dtype="float32", device="cpu")
    expected, graphs = see(model, 2, (2, 3)), Graphs()
    compilation = Compilation(model.tower, model.language, graphs)
    assert compilation.use(lambda: None)
    compilation.give_up()
    assert torch.equal(see(model, 2, (2, 3)), expected)
    assert graphs.num == 0


def test_experts_run_as_transformers_has_them(checkpoints: Checkpoints):
    family = next(family for family in FAMILIES if family.endswith("moe"))
    model = load_model(str(checkpoints.path(family)), dtype="float32", device="cpu")
    expected, graphs = see(model, 2, (2, 3)), Graphs()
    assert Compilation(model.tower, model.language, graphs).use(lambda: None)
    assert (see(model, 2, (2, 3)) - expected).abs().max() <= 1e-5
    assert graphs.num == 3


def test_what_one_thread_compiled_another_uses():
    graphs = Graphs()
    double = torch.inference_mode()(compiled(lambda x: x + x, graphs))
    double(torch.randn(5, 4))
    thread = threading.Thread(target=lambda: double(torch.randn(7, 4)))
    thread.start()
    thread.join()
    assert graphs.num == 1


def test_what_comes_after_the_end_of_compiling_runs_as_it_is(checkpoints: Checkpoints):
    model, graphs = checkpoints.model("qwen2_vl"), Graphs()
    double = compiled(lambda x: x + x, graphs)
    double(torch.randn(5, 4))
    Compilation(model.tower, model.language, graphs).finish()
    for x in (torch.randn(6, 4), torch.randn(6, 5, dtype=torch.float64)):
        assert torch.equal(double(x), x + x)
    assert graphs.num == 1


@pytest.mark.parametrize("home", ["a file", "a folder"])
def test_what_is_compiled_is_kept_at_home_or_else_in_a_folder_for_once(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
):
    path = tmp_path / "home"
    path.write_text("") if home == "a file" else path.mkdir()
    monkeypatch.setenv("HOME", str(path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that it is restored
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    model = load_model(str(checkpoints.path("qwen2_vl")), dtype="float32", device="cpu")
    assert Compilation(model.tower, model.language, Graphs()).use(lambda: see(model, 2, (2, 3)))
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert folder.is_dir()
    assert folder.is_relative_to(path) == (home == "a folder")


def test_one_token_alone_is_the_only_case_of_its_own():
    graphs = Graphs()
    double = compiled(lambda x: x + x, graphs)
    for num in (5, 1, 9, 2, 1):
        x = torch.randn(num, 4)
        assert torch.equal(double(x), x + x)
    assert graphs.num == 2


@pytest.mark.parametrize(
    ("setting", "device", "weights_bytes", "expected"),
    [
        ("auto", CUDA, MIN_WEIGHTS_BYTES, True),
        ("auto", CUDA, MIN_WEIGHTS_BYTES - 1, False),
        ("auto", CPU, MIN_WEIGHTS_BYTES, False),
        ("on", CPU, 0, True),
        ("off", CUDA, MIN_WEIGHTS_BYTES, False),
    ],
)
def test_large_models_on_a_gpu_are_compiled_unless_the_setting_says_otherwise(
    setting: Any, device: torch.device, weights_bytes: int, expected: bool
):
    assert should_compile(setting, device, weights_bytes) is expected
