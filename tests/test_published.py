import pytest
import torch

from onlooker.node.published import PUBLISHED, build_network, published_config
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
