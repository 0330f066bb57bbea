import json
from pathlib import Path

import pytest
from checkpoints import FAMILIES, Checkpoints

from onlooker.node.model import BUILTIN
from onlooker.node.random_checkpoint import SPECIAL_TOKENS, build_config, build_tokenizer, main, write_checkpoint


def test_the_tokenizer_is_the_same_at_every_call():
    assert build_tokenizer().to_str() == build_tokenizer().to_str()


@pytest.mark.parametrize("text", ["naïve 東京 🚲", "a\n\n  b\tc", "\x00\x7f", "12.5 seconds", "…" * 40])
def test_the_tokenizer_gives_back_any_text(text: str):
    tokenizer = build_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_special_tokens_are_one_token_each():
    tokenizer = build_tokenizer()
    assert [tokenizer.encode(token).ids for token in SPECIAL_TOKENS] == [
        [tokenizer.token_to_id(token)] for token in SPECIAL_TOKENS
    ]


def test_a_checkpoint_is_the_same_for_the_same_seed(tmp_path: Path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_checkpoint(tmp_path / name, "qwen2_vl", seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_ends_its_answers_at_the_end_of_a_turn(checkpoints: Checkpoints, family: str):
    model = checkpoints.model(family)
    assert model.tokenizer.eos_token_id in model.generation_config.eos_token_id
    assert model.tokenizer.decode([model.tokenizer.eos_token_id]) == "<|im_end|>"


def test_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match="no such family: 'gpt'"):
        build_config("gpt", build_tokenizer())


def test_the_command_writes_a_folder_that_says_that_its_words_are_noise(tmp_path: Path):
    assert main([str(tmp_path), "--model-type", "qwen2_5_vl"]) == 0
    assert "random" in (tmp_path / "notice.txt").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "qwen2_5_vl"


def test_the_builtin_folder_is_there_with_all_its_files():
    names = {path.name for path in BUILTIN.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"} <= names
