"""Models at the sizes that were published, with random weights, made on the device itself.

Speed and memory do not depend on the values of the weights, so none need to be there to measure them. The words of
such a model mean nothing.
"""

from dataclasses import dataclass
from typing import Any

import torch
import transformers

from .model import VisionLanguageModel
from .random_checkpoint import SPECIAL_TOKENS, build_tokenizer

NOTICE = "The weights are random: speed and memory are real, the words are noise."


@dataclass(frozen=True, slots=True)
class Sizes:
    """One published model: the parts of its configuration that are not its family's defaults."""

    model_type: str
    text: dict[str, Any]
    vision: dict[str, Any]
    is_tied: bool  # the output matrix is that of the embeddings


_QWEN2_5_TEXT = {
    "max_position_embeddings": 128000,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}
_QWEN2_5_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
}
_QWEN3_TEXT = {
    "head_dim": 128,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 36,
    "vocab_size": 151936,
    "max_position_embeddings": 262144,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": [24, 20, 20],
        "mrope_interleaved": True,
    },
}

PUBLISHED: dict[str, Sizes] = {
    "qwen2.5-vl-3b": Sizes(
        "qwen2_5_vl",
        _QWEN2_5_TEXT
        | {
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
        },
        _QWEN2_5_VISION | {"out_hidden_size": 2048},
        is_tied=True,
    ),
    "qwen2.5-vl-7b": Sizes(
        "qwen2_5_vl",
        _QWEN2_5_TEXT
        | {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
        },
        _QWEN2_5_VISION | {"out_hidden_size": 3584},
        is_tied=False,
    ),
    "qwen3-vl-4b": Sizes(
        "qwen3_vl",
        _QWEN3_TEXT | {"hidden_size": 2560, "intermediate_size": 9728},
        {
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "out_hidden_size": 2560,
            "deepstack_visual_indexes": [5, 11, 17],
        },
        is_tied=True,
    ),
    "qwen3-vl-8b": Sizes(
        "qwen3_vl",
        _QWEN3_TEXT | {"hidden_size": 4096, "intermediate_size": 12288},
        {
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_heads": 16,
            "out_hidden_size": 4096,
            "deepstack_visual_indexes": [8, 16, 24],
        },
        is_tied=False,
    ),
}


def published_config(name: str) -> Any:
    """The configuration of a published model, with the token ids of the small tokenizer."""
    sizes = PUBLISHED[name]
    tokenizer = build_tokenizer()
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    return transformers.AutoConfig.for_model(
        sizes.model_type,
        text_config=sizes.text,
        vision_config=sizes.vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=sizes.is_tied,
    )


def build_network(name: str, *, device: str, dtype: torch.dtype, attention: str = "sdpa") -> Any:
    """The model of transformers, by itself. Raises torch.OutOfMemoryError if the device has no room for it."""
    torch.manual_seed(0)
    with torch.device(device):
        return transformers.AutoModelForImageTextToText.from_config(
            published_config(name), dtype=dtype, attn_implementation=attention
        ).eval()


def build_published(name: str, *, device: str, dtype: torch.dtype) -> VisionLanguageModel:
    """A published model as a node would load it, with the small tokenizer."""
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(), eos_token="<|im_end|>")
    network = build_network(name, device=device, dtype=dtype)
    return VisionLanguageModel(network, tokenizer, name=f"{name}, random", processor={}, notice=NOTICE)


def default_dtype(device: str) -> torch.dtype:
    """What "auto" means where no checkpoint says how its weights are stored."""
    return torch.bfloat16 if device.startswith("cuda") else torch.float32
