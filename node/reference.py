"""The measure of the memory: transformers' own model over a whole prompt in one pass, and what it answers.

Written apart from `layout`, `memory` and `language`, which it is the measure of: the prompt is one string through the
tokenizer, positions come from scanning its ids, attention is transformers' eager one, and so is the cache.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from .layout import Span
from .model import VisionLanguageModel
from .preprocess import to_patches
from .vision import Vision

FRAME_NS = 500_000_000  # two frames a second: whole positions at every known tokens_per_second


@dataclass(frozen=True, slots=True, eq=False)
class Film:
    """Frames at a size that needs no resize, and how they are encoded."""

    frames: np.ndarray  # (num, height, width, 3), uint8
    grid: tuple[int, int]  # merged tokens (rows, columns) of each
    layout: str
    chunk_frames: int

    @property
    def is_images(self) -> bool:
        return self.chunk_frames == 1

    @property
    def num_patches(self) -> int:
        """Temporal patches: of a pair of frames, or of an image."""
        return len(self.frames) if self.is_images else len(self.frames) // 2

    @property
    def seconds_per_patch(self) -> float:
        return (1 if self.is_images else 2) * FRAME_NS / 1e9


def whole_prompt(model: VisionLanguageModel, film: Film, question: str) -> Span:
    """A film and a question about it, as one prompt."""
    form, (height, width) = model.format, film.grid
    patch = ("<|image_pad|>" if film.is_images else "<|video_pad|>") * (height * width)
    per_block = max(1, film.chunk_frames // 2)
    if form.style == "stamped":
        middle = 0.0 if film.is_images else 0.25
        stamps = [k * film.seconds_per_patch + middle for k in range(film.num_patches)]
        shown = [f"<{s:.1f} seconds><|vision_start|>{patch}<|vision_end|>" for s in stamps]
    elif film.layout == "native" and not film.is_images:
        shown, per_block = ["<|vision_start|>" + patch * film.num_patches + "<|vision_end|>"], 1
    else:
        shown = ["<|vision_start|>" + patch * per_block + "<|vision_end|>"] * (film.num_patches // per_block)
        per_block = 1
    system = f"<|im_start|>system\n{form.system}<|im_end|>\n" if form.system else ""
    blocks = ["".join(shown[i : i + per_block]) for i in range(0, len(shown), per_block)]
    user, end = "<|im_start|>user\n", "<|im_end|>\n"
    turns = "".join(user + block + end for block in blocks) + user
    seen = turns if film.layout == "turns" else user + "".join(blocks)
    ids = form.tokenize(f"{system}{seen}{question}{end}<|im_start|>assistant\n")
    return _positioned(np.array(ids), model, film)


def _positioned(ids: np.ndarray, model: VisionLanguageModel, film: Film) -> Span:
    """M-RoPE positions of a whole prompt, run by run of pad tokens; text goes on at the largest plus one."""
    form, (height, width) = model.format, film.grid
    visual = (ids == form.video_pad) | (ids == form.image_pad)
    positions, at, next_position = np.zeros((3, len(ids)), dtype=np.int64), 0, 0
    while at < len(ids):
        if not visual[at]:
            positions[:, at] = next_position
            at, next_position = at + 1, next_position + 1
            continue
        stop = at + int(np.argmin(np.append(visual[at:], False)))
        t, h, w = np.indices(((stop - at) // (height * width), height, width)).reshape(3, -1)
        if form.tokens_per_second is not None:
            t = np.floor(t * form.tokens_per_second * film.seconds_per_patch).astype(np.int64)
        positions[:, at:stop] = next_position + np.stack([t, h, w])
        at, next_position = stop, int(positions[:, at:stop].max()) + 1
    return Span(ids, positions, visual, next_position)


@dataclass(frozen=True, slots=True, eq=False)
class OnePass:
    """A whole prompt that was read at once: its logits (n, vocabulary), and transformers' cache of it."""

    logits: Tensor
    cache: Any
    next_position: int

    def rows(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V of a layer, (n, kv_heads, head_dim)."""
        its = self.cache.layers[layer]
        return its.keys[0].transpose(0, 1), its.values[0].transpose(0, 1)


@torch.inference_mode()
def read_at_once(
    model: VisionLanguageModel, span: Span, film: Film, visible: np.ndarray | None = None, cache: Any = None
) -> OnePass:
    """One forward pass with transformers' own code, its eager attention and its cache.

    visible (n, n), bool: what each token sees, if not all before it. After a `cache`, which grows, the span has the
    last frames of the film alone.
    """
    core, vision = model._model.model, see_at_once(model, film)
    num_shown = int(span.visual.sum())
    visual = torch.from_numpy(span.visual).to(model.device)[None]
    embeds = core.get_input_embeddings()(torch.from_numpy(span.ids).to(model.device))[None]
    embeds = embeds.masked_scatter(visual[..., None], vision.embeds[-num_shown:].to(embeds))
    extra: dict[str, Any] = {}
    if vision.deepstack is not None:
        shown = [features[-num_shown:] for features in vision.deepstack]
        extra = {"visual_pos_masks": visual, "deepstack_visual_embeds": shown}
    if visible is not None:
        hidden = torch.from_numpy(~visible).to(model.device)[None, None]
        extra["attention_mask"] = torch.zeros_like(hidden, dtype=embeds.dtype).masked_fill(hidden, -torch.inf)
    positions = torch.from_numpy(span.positions).to(model.device)[:, None]
    out = core.language_model(
        inputs_embeds=embeds, position_ids=positions, past_key_values=cache, use_cache=True, **extra
    )
    return OnePass(model.logits(out.last_hidden_state[0]), out.past_key_values, span.next_position)


@torch.inference_mode()
def encoded_elsewhere(
    model: VisionLanguageModel, one_pass: OnePass, rows: np.ndarray, positions: np.ndarray, moved: np.ndarray
) -> Any:
    """A cache of some rows (n,) of a pass, from the same hidden states, `positions` (3, n) being `moved` to others."""
    rotary = model._model.model.language_model.rotary_emb
    tables = (
        [
            table / rotary.attention_scaling
            for table in rotary(rotary.inv_freq, torch.from_numpy(axes).to(model.device)[:, None])
        ]
        for axes in (positions, moved)
    )
    (cos, sin), (moved_cos, moved_sin) = tables
    cache, index = transformers.DynamicCache(), torch.from_numpy(rows).to(model.device)
    for number, layer in enumerate(one_pass.cache.layers):
        keys = layer.keys[:, :, index]
        plain = keys * cos - _turned(keys) * sin
        cache.update(plain * moved_cos + _turned(plain) * moved_sin, layer.values[:, :, index], number)
    return cache


def _turned(keys: Tensor) -> Tensor:
    """By a quarter."""
    a, b = keys.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def what_is_new(features: Tensor, num_places: int, max_similarity: float) -> tuple[np.ndarray, float]:
    """Which tokens (num_patches * num_places,) differ from the last one like that at their place, the first or not.

    Of every temporal patch at least one does, the least similar. Also returns how near a similarity came to the bound.
    """
    kept: dict[int, Tensor] = {}
    is_new: list[bool] = []
    nearest = 1.0
    for patch in features.double().cpu().split(num_places):
        alike = [
            float(torch.cosine_similarity(patch[place], kept[place], dim=0)) if place in kept else -1.0
            for place in range(num_places)
        ]
        nearest = min(nearest, *(abs(similarity - max_similarity) for similarity in alike))
        new = {place for place in range(num_places) if alike[place] <= max_similarity} | {int(np.argmin(alike))}
        kept |= {place: patch[place] for place in new}
        is_new += [place in new for place in range(num_places)]
    return np.array(is_new), nearest


@torch.inference_mode()
def see_at_once(model: VisionLanguageModel, film: Film) -> Vision:
    """Transformers' vision tower over the whole film in one call (image mode: over each frame, as an image)."""
    model._model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    geometry, (rows, columns) = model.geometry, film.grid
    pixels = torch.from_numpy(film.frames).to(model.device)
    if film.is_images:
        pixels = pixels.repeat_interleave(geometry.temporal_patch, dim=0)
    patches = to_patches(pixels, (columns * geometry.factor, rows * geometry.factor), geometry)
    temporal = len(pixels) // geometry.temporal_patch
    tower = model._model.model.visual
    grid_thw = torch.tensor([[temporal, rows * geometry.merge, columns * geometry.merge]], device=model.device)
    # Its patch embedding is a convolution, which a GPU would compute in tf32: a measure is exact.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        out = tower(patches.to(tower.dtype), grid_thw=grid_thw, return_dict=True)
    return Vision(out.pooler_output, getattr(out, "deepstack_features", None))


@torch.inference_mode()
def answer_greedily(
    model: VisionLanguageModel, one_pass: OnePass, ends: Collection[int], max_new_tokens: int
) -> list[int]:
    """The likeliest token again and again, without the end, by transformers' own cache; it grows with them."""
    language, embed = model._model.model.language_model, model._model.model.get_input_embeddings()
    ids = [int(one_pass.logits[-1].argmax())]
    while ids[-1] not in ends and len(ids) < max_new_tokens:
        newest = torch.tensor([[ids[-1]]], device=model.device)
        positions = torch.full((3, 1, 1), one_pass.next_position + len(ids) - 1, device=model.device)
        out = language(
            inputs_embeds=embed(newest), position_ids=positions, past_key_values=one_pass.cache, use_cache=True
        )
        ids.append(int(model.logits(out.last_hidden_state[0, -1]).argmax()))
    return ids[:-1] if ids[-1] in ends else ids
