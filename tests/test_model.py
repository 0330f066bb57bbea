import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from checkpoints import FAMILIES, Checkpoints, chunk, memory
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from onlooker.node.adapter import UnsupportedModelError
from onlooker.node.arena import Arena
from onlooker.node.layout import LAYOUTS, LayoutState
from onlooker.node.model import load_model
from onlooker.node.passes import Prefill
from onlooker.node.random_checkpoint import write_checkpoint


def folder(path: Path, **config: object) -> str:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


# Loading


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_family_loads_from_a_folder(
    checkpoints: Checkpoints, family: str, dtype: str, capsys: pytest.CaptureFixture[str]
):
    path = str(checkpoints.path(family))
    transformers_logging.enable_progress_bar()
    capsys.readouterr()
    model = load_model(path, dtype=dtype, device="cpu")
    assert model.config.model_type == family
    assert model.dtype == model.kv_shape.dtype == getattr(torch, dtype)
    assert model.device == torch.device("cpu")
    assert set(model.kv_shape.layer_devices) == {torch.device("cpu")}
    assert model.notice is None
    assert capsys.readouterr().err == ""  # no progress bar where no terminal is


@pytest.mark.parametrize("family", FAMILIES)
def test_rotary_frequencies_stay_float32_in_a_bfloat16_model(checkpoints: Checkpoints, family: str):
    model = load_model(str(checkpoints.path(family)), dtype="bfloat16", device="cpu")
    frequencies = {name: b for name, b in model._model.named_buffers() if name.endswith("inv_freq")}
    assert len(frequencies) >= 2
    assert {b.dtype for b in frequencies.values()} == {torch.float32}
    sound = dict(checkpoints.model(family)._model.named_buffers())
    assert all(torch.equal(b, sound[name]) for name, b in frequencies.items())


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path):
    write_checkpoint(tmp_path, "qwen2_5_vl")
    weights = load_file(tmp_path / "model.safetensors")
    del weights[next(name for name in weights if name.endswith("layers.1.mlp.up_proj.weight"))]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OSError, match=r"lacks 1 weights, such as .*up_proj"):
        load_model(str(tmp_path), device="cpu")


def test_the_dtype_of_the_checkpoint_is_the_default(tmp_path: Path):
    write_checkpoint(tmp_path, "qwen2_5_vl", dtype="bfloat16")
    assert load_model(str(tmp_path), device="cpu").dtype == torch.bfloat16


def test_a_device_map_gives_the_same_model(checkpoints: Checkpoints):
    model = load_model(str(checkpoints.path("qwen3_vl")), dtype="float32", device="balanced")
    streams = [memory(model), memory(checkpoints.model("qwen3_vl"))]
    for stream in streams:
        stream.append(chunk(factor=32))
    mine, theirs = (stream.extent(stream.now).rows(2) for stream in streams)
    assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])


@pytest.mark.parametrize("name", ["/no/such/folder", "./no-such-folder", "../no", "~/no-such-folder", "a/b/c"])
def test_a_folder_that_is_not_there_is_said_to_be_missing(name: str):
    with pytest.raises(FileNotFoundError, match=f"no checkpoint folder {name}"):
        load_model(name)


def test_a_folder_without_a_configuration_is_said_to_have_none(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_model(str(tmp_path))


def test_a_folder_without_weights_is_an_error_that_names_them(tmp_path: Path):
    with pytest.raises(OSError, match="safetensors"):
        load_model(folder(tmp_path, model_type="qwen2_5_vl"), device="cpu")


@pytest.mark.parametrize("model_type", ["qwen2", "of_my_own_making", None])
def test_an_unsupported_checkpoint_is_refused_with_the_list_of_what_is(tmp_path: Path, model_type: str | None):
    with pytest.raises(UnsupportedModelError, match="Supported: qwen2_5_vl, qwen2_vl, qwen3_vl, qwen3_vl_moe"):
        load_model(folder(tmp_path, model_type=model_type), device="cpu")


@pytest.mark.parametrize("setting", [{"dtype": "float8"}, {"dtype": "nonsense"}])
def test_a_dtype_that_cannot_be_had_is_refused(checkpoints: Checkpoints, setting: dict[str, str]):
    with pytest.raises(ValueError, match="dtype must be one of"):
        load_model(str(checkpoints.path("qwen2_5_vl")), **setting)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_refused(checkpoints: Checkpoints, device: str):
    with pytest.raises(ValueError, match=f"device {device}: .* no CUDA device"):
        load_model(str(checkpoints.path("qwen2_5_vl")), device=device)


def test_the_notice_of_a_folder_is_the_models(tmp_path: Path):
    write_checkpoint(tmp_path, "qwen2_5_vl")
    (tmp_path / "notice.txt").write_text("It is noise.\n")
    assert load_model(str(tmp_path), device="cpu").notice == "It is noise."


# What is read from the configuration


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_per_token_are_those_of_the_storage(checkpoints: Checkpoints, family: str):
    model = checkpoints.model(family)
    text = model.config.text_config
    head_dim = text.hidden_size // text.num_attention_heads
    assert model.kv_shape.bytes_per_token == 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim * 4
    assert Arena(model.kv_shape, 100).resident_bytes == 100 * model.kv_shape.bytes_per_token


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_counted_once_even_where_they_are_tied(checkpoints: Checkpoints, family: str):
    model = checkpoints.model(family)
    buffers = sum(b.numel() * b.element_size() for b in model._model.buffers())
    with safe_open(checkpoints.path(family) / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(name).numel() * 4 for name in file.keys())  # noqa: SIM118
    assert stored <= model.weights_bytes <= stored + 2 * buffers


@pytest.mark.parametrize("family", FAMILIES)
def test_the_format_takes_its_tokens_from_the_configuration(checkpoints: Checkpoints, family: str):
    model = checkpoints.model(family)
    form = model.format
    assert form.tokenize("<|video_pad|><|image_pad|>") == [form.video_pad, form.image_pad]
    assert form.style == ("stamped" if family.startswith("qwen3") else "open")
    assert form.tokens_per_second == (2 if family == "qwen2_5_vl" else None)
    assert form.system == (None if family.startswith("qwen3") else "You are a helpful assistant.")


def test_the_preprocessor_configuration_wins_over_the_familys_statistics(tmp_path: Path):
    write_checkpoint(tmp_path, "qwen2_5_vl")
    own = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3], "min_pixels": 784, "max_pixels": 7840}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(own))
    geometry = load_model(str(tmp_path), device="cpu").geometry
    assert (geometry.mean, geometry.std) == ((0.1, 0.2, 0.3), (1, 2, 3))
    assert (geometry.min_pixels, geometry.max_pixels) == (784, 7840)


def test_a_checkpoint_without_a_preprocessor_configuration_has_its_familys(tmp_path: Path):
    write_checkpoint(tmp_path, "qwen3_vl")
    (tmp_path / "preprocessor_config.json").unlink()
    geometry = load_model(str(tmp_path), device="cpu").geometry
    assert geometry.mean == geometry.std == (0.5, 0.5, 0.5)
    assert (geometry.patch, geometry.factor, geometry.max_pixels) == (16, 32, 16_777_216)


# Reading


@pytest.mark.parametrize("family", FAMILIES)
def test_vision_gives_an_embedding_for_every_token_of_the_span(checkpoints: Checkpoints, family: str):
    model = checkpoints.model(family)
    patches = torch.zeros(2 * 4 * 6, 3 * 2 * model.geometry.patch**2)
    vision = model.see(patches, (2, 4, 6))
    assert vision.embeds.shape == (12, model.config.text_config.hidden_size)
    layers = len(model.config.vision_config.deepstack_visual_indexes) if family.startswith("qwen3") else None
    assert (None if vision.deepstack is None else len(vision.deepstack)) == layers


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_text_equals_transformers_own_forward(checkpoints: Checkpoints, family: str):
    model = checkpoints.model(family)
    reference = transformers.AutoModelForImageTextToText.from_pretrained(
        checkpoints.path(family), attn_implementation="eager"
    ).eval()
    span = LAYOUTS["native"](model.format).question(LayoutState(), "What do you see, left or right?")
    mine = model.logits(model.read(span, Prefill([])))
    with torch.inference_mode():
        theirs = reference(input_ids=torch.from_numpy(span.ids)[None]).logits[0]
    assert (mine - theirs).abs().max() <= 1e-5


def test_rows_of_text_read_as_a_batch_equal_each_by_itself(checkpoints: Checkpoints):
    model = checkpoints.model("qwen2_5_vl")
    ids = np.random.default_rng(0).integers(20, 300, (3, 7))
    positions = np.broadcast_to(np.arange(7), ids.shape).copy()
    together = model.logits(model.read_batch(ids, positions, Prefill([])))
    for row in range(3):
        alone = model.logits(model.read_batch(ids[row : row + 1], positions[:1], Prefill([])))
        assert (alone[0] - together[row]).abs().max() <= 1e-5


def test_logits_of_a_bfloat16_model_are_float32(checkpoints: Checkpoints):
    model = load_model(str(checkpoints.path("qwen2_5_vl")), dtype="bfloat16", device="cpu")
    stream = memory(model)
    stream.append(chunk())
    span = stream.layout.question(stream.now.layout, "What?")
    logits = model.logits(model.read(span, Prefill([stream.extent(stream.now)])))
    assert logits.dtype == torch.float32 and logits.isfinite().all()
