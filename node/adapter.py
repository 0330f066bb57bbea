"""What differs between the model families, and nothing else.

Everything that a configuration states (head counts, patch sizes, token ids) is read from it.
"""

from dataclasses import dataclass
from typing import Any

DEFAULT_SYSTEM = "You are a helpful assistant."


class UnsupportedModelError(ValueError):
    """The checkpoint is of a kind this node cannot keep a memory for."""

    def __init__(self, model_type: str, reason: str) -> None:
        supported = ", ".join(sorted(FAMILIES))
        super().__init__(f"cannot use a model of type {model_type!r}: {reason}. Supported: {supported}")


@dataclass(frozen=True, slots=True)
class Family:
    """One model family of transformers.

    `style` is how it lays out a video (see `layout.Format`); `clocked` says whether the temporal positions of
    an open video follow `vision_config.tokens_per_second`; `system` is the prompt that its chat template adds by
    itself.
    """

    style: str
    clocked: bool
    system: str | None
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    max_pixels: int


_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)

_QWEN2_VL = Family("open", False, DEFAULT_SYSTEM, _CLIP_MEAN, _CLIP_STD, max_pixels=12_845_056)
_QWEN2_5_VL = Family("open", True, DEFAULT_SYSTEM, _CLIP_MEAN, _CLIP_STD, max_pixels=12_845_056)
_QWEN3_VL = Family("stamped", False, None, _HALF, _HALF, max_pixels=16_777_216)

# Statistics and max_pixels stand in where a checkpoint folder has no preprocessor_config.json.
FAMILIES: dict[str, Family] = {
    "qwen2_vl": _QWEN2_VL,
    "qwen2_5_vl": _QWEN2_5_VL,
    "qwen3_vl": _QWEN3_VL,
    "qwen3_vl_moe": _QWEN3_VL,
}


def require_known(model_type: str | None) -> None:
    """Raise UnsupportedModelError for a model type of no family here."""
    if model_type not in FAMILIES:
        raise UnsupportedModelError(model_type or "unknown", "its family is unknown here")


def family_of(config: Any) -> Family:
    """The family of a transformers configuration. Raises UnsupportedModelError."""
    model_type = getattr(config, "model_type", "")
    require_known(model_type)
    layer_types = set(getattr(config.text_config, "layer_types", None) or ["full_attention"])
    if layer_types != {"full_attention"}:
        others = ", ".join(sorted(layer_types - {"full_attention"}))
        raise UnsupportedModelError(model_type, f"its layers use {others}, a memory needs full attention")
    rope = (getattr(config.text_config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise UnsupportedModelError(model_type, f"its {rope} rotary frequencies change with the length of a prompt")
    return FAMILIES[model_type]
