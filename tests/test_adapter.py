from types import SimpleNamespace

import pytest
import transformers

from onlooker.node.adapter import FAMILIES, UnsupportedModelError, family_of, require_known
from onlooker.node.random_checkpoint import build_config, build_tokenizer

TOKENIZER = build_tokenizer()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_is_found_by_its_configuration(model_type: str):
    assert family_of(build_config(model_type, TOKENIZER)) is FAMILIES[model_type]


def test_the_families_are_those_that_the_documents_name():
    assert sorted(FAMILIES) == ["qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe"]


UNSUPPORTED = [
    model_type
    for model_type in ("qwen2", "llama", "llava", "qwen3_5", "qwen3_5_moe", "qwen2_5_omni", "qwen4_exp")
    if model_type in transformers.CONFIG_MAPPING
]


@pytest.mark.parametrize("model_type", UNSUPPORTED)
def test_any_other_model_is_refused_with_the_list_of_what_is_supported(model_type: str):
    with pytest.raises(UnsupportedModelError) as refused:
        family_of(transformers.CONFIG_MAPPING[model_type]())
    assert f"'{model_type}'" in str(refused.value)
    assert all(name in str(refused.value) for name in FAMILIES)


def test_a_configuration_without_a_type_is_refused():
    with pytest.raises(UnsupportedModelError, match="unknown"):
        family_of(SimpleNamespace())
    with pytest.raises(UnsupportedModelError, match="unknown"):
        require_known(None)


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl"])
def test_sliding_windows_are_refused_because_their_past_cannot_be_kept(model_type: str):
    config = build_config(model_type, TOKENIZER)
    text = config.text_config.to_dict() | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    text.pop("layer_types", None)
    config.text_config = type(config.text_config)(**text)
    with pytest.raises(UnsupportedModelError, match=r"sliding_attention.*full attention"):
        family_of(config)
