"""Small random checkpoints of every family, written as ordinary checkpoint folders.

They load through the same code as the published ones, and the exactness checks run on them.
`python -m onlooker.node.random_checkpoint FOLDER` writes one.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from .adapter import FAMILIES
from .model import NOTICE_FILE

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# The split of the Qwen2 tokenizer: words, single digits, punctuation, line breaks.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_CORPUS = (
    "system\nYou are a helpful assistant.",
    "user\nWhat do you see now? What did you see first? What came last, before that, and after it?",
    "assistant\nI see a red circle, a blue square, a green triangle, a yellow star and a white cross.",
    "What colour is the shape on the left? Is it moving, or is it still? Which way did it go?",
    "How many different shapes have appeared so far? Name all of them in order.",
    "Has a person walked past the camera? Is the door open? Is there a car in the picture?",
    "Yes. No. Nothing yet. left right top bottom black orange purple <12.5 seconds>",
)

# One message after the other, as the Qwen-VL checkpoints have it; SYSTEM stands for the default system message.
_CHAT_TEMPLATE = """\
{%- if messages[0].role != 'system' %}SYSTEM{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}{{ '\\n' }}
{%- if message.content is string %}{{ message.content }}
{%- else %}
{%- for part in message.content %}
{%- if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>
{%- else %}{{ part.text }}{% endif %}
{%- endfor %}
{%- endif %}<|im_end|>{{ '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}
"""

UNTRAINED = "The weights of this model are random: its words are noise. Memory, timing and proof are real."


def build_tokenizer(vocab_size: int = 512, corpus: Iterable[str] = _CORPUS) -> tokenizers.Tokenizer:
    """Byte-level BPE in the manner of Qwen2, with its special tokens; the same at every call."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def build_config(model_type: str, tokenizer: tokenizers.Tokenizer, *, hidden: int = 64, num_layers: int = 3) -> Any:
    """A configuration of the family, tiny but with every feature of the published ones."""
    if model_type not in FAMILIES:
        raise ValueError(f"no such family: {model_type!r}; there are {', '.join(FAMILIES)}")
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    is_v3 = model_type.startswith("qwen3")
    head_dim = 16
    text: dict[str, Any] = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden // head_dim,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        "initializer_range": 0.1,  # wide enough for logits that differ between contexts
        "tie_word_embeddings": True,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    if is_v3:
        text["rope_parameters"]["mrope_interleaved"] = True
    else:
        del text["head_dim"]
    if model_type == "qwen3_vl_moe":
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": hidden}
    return transformers.AutoConfig.for_model(
        model_type,
        text_config=text,
        vision_config=_vision(model_type, hidden),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def _vision(model_type: str, hidden: int) -> dict[str, Any]:
    common = {"depth": 3, "num_heads": 4, "patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2}
    if model_type == "qwen2_vl":
        return common | {"embed_dim": 64, "hidden_size": hidden, "mlp_ratio": 2}
    common |= {"hidden_size": 64, "intermediate_size": 128, "out_hidden_size": hidden}
    if model_type == "qwen2_5_vl":
        return common | {"window_size": 56, "fullatt_block_indexes": [2], "tokens_per_second": 2}
    return common | {"patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}


def build_model(config: Any, seed: int = 0) -> Any:
    """A float32 model with seeded random weights; biases too, so that none of them can hide a mistake."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.05)
    return model.eval()


def write_checkpoint(folder: Path, model_type: str, *, seed: int = 0, dtype: str = "float32") -> None:
    """Write a random checkpoint of a family as a folder that loads like any other."""
    tokenizer = build_tokenizer()
    model = build_model(build_config(model_type, tokenizer), seed)
    pixels = (56 * 56, 224 * 224)
    save_checkpoint(folder, model, tokenizer, model_type, pixels=pixels, dtype=getattr(torch, dtype))


def save_checkpoint(
    folder: Path,
    model: Any,
    tokenizer: tokenizers.Tokenizer,
    model_type: str,
    *,
    pixels: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    """Write a model and all that belongs to it; pixels are the least and the most that a frame is encoded at."""
    im_end, end = (tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>"))
    model.generation_config = transformers.GenerationConfig(eos_token_id=[im_end, end], pad_token_id=end)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config())
    family = FAMILIES[model_type]
    system = f"<|im_start|>system{{{{ '\\n' }}}}{family.system}<|im_end|>{{{{ '\\n' }}}}" if family.system else ""
    (folder / "chat_template.jinja").write_text(_CHAT_TEMPLATE.replace("SYSTEM", system))
    size = {"shortest_edge": pixels[0], "longest_edge": pixels[1]}
    statistics = {"image_mean": family.image_mean, "image_std": family.image_std}
    _write_json(folder / "preprocessor_config.json", statistics | {"size": size})


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def main(argv: Iterable[str] | None = None) -> int:
    """Write one, with a notice of what it is."""
    parser = argparse.ArgumentParser(description="Write a small checkpoint with random weights.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model-type", default="qwen2_5_vl", choices=sorted(FAMILIES))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(None if argv is None else list(argv))
    write_checkpoint(args.folder, args.model_type, seed=args.seed)
    (args.folder / NOTICE_FILE).write_text(UNTRAINED + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
