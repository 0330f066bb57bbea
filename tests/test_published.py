import pytest
import torch
from checkpoints import chunk, memory

from onlooker.node.config import NodeConfig
from onlooker.node.published import PUBLISHED, Sizes, build_network, build_published, published_config
from onlooker.node.published_node import load_published_engine, main
from onlooker.node.workload import TextSizes, VisionSizes

NUM_PARAMETERS = {"qwen2.5-vl-3b": 3.75e9, "qwen2.5-vl-7b": 8.29e9, "qwen3-vl-4b": 4.44e9, "qwen3-vl-8b": 8.77e9}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_as_many_parameters_as_its_name_says(name: str):
    network = build_network(name, device="meta", dtype=torch.bfloat16)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(NUM_PARAMETERS[name], rel=0.01)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_vision_tower_gives_what_the_language_model_takes(name: str):
    config = published_config(name)
    assert VisionSizes.of(config.vision_config).out_hidden == TextSizes.of(config.text_config).hidden


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    """A model that was never published, of a size for tests."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "vocab_size": 600, "max_position_embeddings": 1000, "rope_parameters": rope}
    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 100, "num_heads": 4, "window_size": 56}
    vision |= {"fullatt_block_indexes": [1], "tokens_per_second": 2, "out_hidden_size": 64}
    monkeypatch.setitem(PUBLISHED, "tiny", Sizes("qwen2_5_vl", text, vision, is_tied=True))
    return "tiny"


def test_a_model_of_random_weights_remembers_as_any_other(tiny: str):
    model = build_published(tiny, device="cpu", dtype=torch.float32)
    stream = memory(model)
    stream.append(chunk(0, 2))
    assert stream.info().num_frames == 2
    assert model.notice and "random" in model.notice


def test_a_node_may_run_on_one(tiny: str):
    engine = load_published_engine(tiny, NodeConfig(device="cpu"))
    try:
        assert engine.is_ready and engine.model.name == "tiny, random"
    finally:
        engine.close()


def test_a_node_is_told_its_mistakes_as_ever(tiny: str, capsys: pytest.CaptureFixture[str]):
    assert main(["--sizes", tiny, "--set", "questions.max_waiting=none"]) == 2
    assert "questions.max_waiting" in capsys.readouterr().err
