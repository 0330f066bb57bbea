"""The built-in model's shape, and its forward pass over a batch: the same weights, run wide for training."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from ..node.preprocess import PatchGeometry, to_patches
from ..node.random_checkpoint import SPECIAL_TOKENS
from ..tools.scenes import draw, pixel_grid
from ..tools.story import COLOURS, SHAPES
from .batches import IGNORE, PAST, Batch, cell_centres


@dataclass(frozen=True, slots=True)
class Size:
    """How large the model is; `mrope` are the frequencies of time, height and width, half a head's width together."""

    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    mrope: tuple[int, int, int]
    vision_hidden: int
    vision_intermediate: int
    vision_heads: int


SIZES = {
    "small": Size(192, 512, 4, 6, (8, 4, 4), 128, 320, 4),
    "medium": Size(256, 640, 6, 4, (16, 8, 8), 192, 448, 6),
}


def build_config(tokenizer: Any, size: Size) -> Any:
    """Qwen2.5-VL, small. Every vision layer sees its whole temporal patch: the window is larger than any frame."""
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    text = {
        "vocab_size": -(-tokenizer.get_vocab_size() // 64) * 64,
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_heads,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        # The lowest frequencies serve the width: at theta 40 neighbouring columns are still told apart, and times
        # of some twenty seconds are on one turn of the slowest hand of the clock.
        "rope_parameters": {"rope_type": "default", "rope_theta": 40.0, "mrope_section": list(size.mrope)},
        "initializer_range": 0.03,
        "tie_word_embeddings": True,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    vision = {
        "depth": 4,
        "hidden_size": size.vision_hidden,
        "intermediate_size": size.vision_intermediate,
        "num_heads": size.vision_heads,
        "out_hidden_size": size.hidden,
        "window_size": 448,
        "fullatt_block_indexes": [0, 1, 2, 3],
        "tokens_per_second": 2,
        "initializer_range": 0.03,
    }
    return transformers.AutoConfig.for_model(
        "qwen2_5_vl",
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


SIGHTS = ("there", "shape", "colour", "place", "motion")  # what the auxiliary heads read, each with a loss


NUM_READING = 2  # last layers in which a question can read what the head of the past taught the visual tokens


class Verdict(NamedTuple):
    """Which answer tokens were the likeliest; counted later, so that the GPU is not waited for."""

    hit: Tensor  # (num_tokens,) bool
    answer: np.ndarray  # (num_tokens,) which answer of the batch it belongs to
    kind: np.ndarray  # (num_tokens,) of the question

    def by_answer(self) -> tuple[np.ndarray, np.ndarray]:
        """For each answer: was every token of it right, and its kind."""
        _, first, inverse = np.unique(self.answer, return_index=True, return_inverse=True)
        right = np.ones(len(first), bool)
        np.logical_and.at(right, inverse, self.hit.cpu().numpy())
        return right, self.kind[first]


class Losses(NamedTuple):
    """Of one batch."""

    answers: Tensor  # cross entropy per answer token
    sight: Tensor  # (2, len(SIGHTS)) of the auxiliary heads
    past: Tensor  # (len(PAST),) of the one that reads what was before
    verdict: Verdict | None  # None where nothing was asked


class Trainee(nn.Module):
    """The model, and auxiliary heads on its visual tokens that are dropped after training.

    Without them colour is learned and shape is not: the answers alone say too little about pixels.
    """

    def __init__(self, model: Any, geometry: PatchGeometry) -> None:
        super().__init__()
        self._vision_layer, self._text_layer = _vision_layer, _text_layer
        self.model = model
        self.core = model.model
        self.geometry = geometry
        hidden = model.config.text_config.hidden_size
        # The tower's tokens know where in the frame they are only through the positions of the language model.
        self.heads = nn.ModuleList([_SightHead(hidden, knows_place=False), _SightHead(hidden, knows_place=True)])
        self.past = _PastHead(hidden)

    def compile(self) -> None:
        """Have both kinds of layers compiled, once for all lengths: eagerly they are bound by memory."""
        self._vision_layer = torch.compile(_vision_layer, dynamic=True)
        self._text_layer = torch.compile(_text_layer, dynamic=True)

    def look(self, batch: Batch, device: torch.device, noise: torch.Generator) -> Losses:
        """What the vision tower alone learns from a batch; no question is read."""
        truth = torch.from_numpy(batch.truth).to(device)
        seen = self._see(self._patches(batch, device, noise), batch).unflatten(0, truth.shape[:3])
        sight = self.heads[0](seen, truth, batch.shape.grid)
        return Losses(sight.new_zeros(()), torch.stack([sight, 0 * sight]), sight.new_zeros(len(PAST)), None)

    def forward(self, batch: Batch, device: torch.device, noise: torch.Generator) -> Losses:
        truth = torch.from_numpy(batch.truth).to(device)
        seen = self._see(self._patches(batch, device, noise), batch)
        halfway, hidden = self._read(seen, batch, device)
        visual = torch.from_numpy(np.flatnonzero(batch.visual)).to(device)
        remembered = hidden[:, visual].unflatten(1, truth.shape[1:3])
        grid = batch.shape.grid
        sight = [self.heads[0](seen.unflatten(0, truth.shape[:3]), truth, grid), self.heads[1](remembered, truth, grid)]
        past = self.past(halfway[:, visual].unflatten(1, truth.shape[1:3]), torch.from_numpy(batch.past).to(device))
        loss, verdict = self._answers(hidden, batch, device)
        return Losses(loss, torch.stack(sight), past, verdict)

    def _patches(self, batch: Batch, device: torch.device, noise: torch.Generator) -> Tensor:
        return to_patches(render(batch, device, noise), _size(batch, self.geometry), self.geometry)

    def _see(self, patches: Tensor, batch: Batch) -> Tensor:
        """The vision tower over all temporal patches at once; returns (num_tokens, hidden)."""
        visual = self.core.visual
        per_patch = batch.shape.grid[0] * batch.shape.grid[1] * self.geometry.merge**2
        x = visual.patch_embed(patches).unflatten(0, (-1, per_patch))
        rotary = _rotary(visual, batch.shape.grid, self.geometry, x.device)
        for block in visual.blocks:
            x = self._vision_layer(block, x, rotary)
        return visual.merger(x.flatten(0, 1))

    def _read(self, seen: Tensor, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
        """The language model over all rows: (b, s, hidden) NUM_READING layers before the end, and at the end."""
        ids = torch.from_numpy(batch.ids).to(device)
        embeds = self.core.get_input_embeddings()(ids)
        visual = torch.from_numpy(np.flatnonzero(batch.visual)).to(device)
        embeds = embeds.index_copy(1, visual, seen.to(embeds.dtype).unflatten(0, (len(ids), -1)))
        # Once for all layers, in their dtype: made of booleans in each of them, it would be written again each time.
        is_cast = torch.is_autocast_enabled(device.type)
        zero = torch.zeros((), device=device, dtype=torch.get_autocast_dtype(device.type) if is_cast else embeds.dtype)
        mask = torch.where(visibility(batch, device), zero, float("-inf"))
        positions = torch.from_numpy(batch.positions).to(device)
        language = self.core.language_model
        x, cos_sin = embeds, language.rotary_emb(embeds, positions)
        for layer in language.layers[:-NUM_READING]:
            x = self._text_layer(layer, x, mask, cos_sin)
        halfway = x
        for layer in language.layers[-NUM_READING:]:
            x = self._text_layer(layer, x, mask, cos_sin)
        return halfway, language.norm(x)

    def _answers(self, hidden: Tensor, batch: Batch, device: torch.device) -> tuple[Tensor, Verdict]:
        where = np.flatnonzero(batch.labels != IGNORE)
        labels = torch.from_numpy(batch.labels.flat[where]).to(device)
        logits = self.model.lm_head(hidden.flatten(0, 1)[torch.from_numpy(where).to(device)]).float()
        answer = where // batch.labels.shape[1] * 1000 + batch.branch.flat[where]
        hit = (logits.argmax(-1) == labels).detach()
        return F.cross_entropy(logits, labels), Verdict(hit, answer, batch.kinds.flat[where])


class _SightHead(nn.Module):
    """Reads from every visual token the thing that covers its part of the frame: shape, colour, place and motion.

    The place is that of the thing's centre: in the frame, or, without `knows_place`, as seen from the token.
    """

    def __init__(self, hidden: int, *, knows_place: bool) -> None:
        super().__init__()
        self.knows_place = knows_place
        self.out = nn.Linear(hidden, 1 + len(SHAPES) + len(COLOURS) + 4)

    def forward(self, tokens: Tensor, truth: Tensor, grid: tuple[int, int]) -> Tensor:
        """Its losses, one for each of SIGHTS; tokens (..., rows * columns, hidden), truth (..., rows * columns, 7)."""
        there, shape, colour, place, motion = self.out(tokens).float().split([1, len(SHAPES), len(COLOURS), 2, 2], -1)
        is_there, true_shape, true_colour = truth[..., :3].unbind(-1)
        true_place, true_motion = truth[..., 3:5], truth[..., 5:]
        if not self.knows_place:
            true_place = true_place - torch.from_numpy(cell_centres(grid)).to(truth)
        weight = is_there / is_there.sum().clamp(min=1)

        def over_covered(loss: Tensor) -> Tensor:
            return (weight * loss).sum()

        return torch.stack(
            [
                F.binary_cross_entropy_with_logits(there[..., 0], is_there),
                over_covered(_cross_entropy(shape, true_shape)),
                over_covered(_cross_entropy(colour, true_colour)),
                4 * over_covered(F.smooth_l1_loss(place, true_place, beta=0.1, reduction="none").mean(-1)),
                4 * over_covered(F.smooth_l1_loss(motion, true_motion, beta=0.1, reduction="none").mean(-1)),
            ]
        )


class _PastHead(nn.Module):
    """Reads from every visual token what the memory knows of the thing there: what came before it, and when it came.

    Without it, questions about the past are learned many times more slowly: an answer is one example, and every
    token of a stream is another.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden)
        self.out = nn.Linear(hidden, sum(PAST.values()))

    def forward(self, tokens: Tensor, past: Tensor) -> Tensor:
        """Its losses, one for each of PAST; tokens (..., hidden), past (..., len(PAST)) classes or IGNORE."""
        logits = self.out(self.norm(tokens)).float().split(list(PAST.values()), -1)
        return torch.stack([_over_known(*pair) for pair in zip(logits, past.unbind(-1), strict=True)])


def _over_known(logits: Tensor, classes: Tensor) -> Tensor:
    """Mean over all that is not IGNORE, 0 where nothing is left."""
    total = F.cross_entropy(logits.flatten(0, -2), classes.flatten(), ignore_index=IGNORE, reduction="sum")
    return total / (classes != IGNORE).sum().clamp(min=1)


def _cross_entropy(logits: Tensor, classes: Tensor) -> Tensor:
    return F.cross_entropy(logits.movedim(-1, 1), classes.long(), reduction="none")


@torch.no_grad()
def render(batch: Batch, device: torch.device, noise: torch.Generator) -> Tensor:
    """The frames of a batch, uint8 (num_frames, height, width, 3), with the sensor's noise.

    Half of the streams pass through a coarse JPEG-like quantisation, as cameras' pictures do.
    """
    height, width = (28 * side for side in batch.shape.grid)
    scenes = batch.scenes.mapped(lambda array: torch.from_numpy(array).to(device))
    y, x = (torch.from_numpy(pixel_grid(length)).to(device) for length in (height, width))
    with torch.autocast(device.type, enabled=False):
        clean = draw(torch, scenes, y, x)
        clean += scenes.noise[:, None, None, None] * torch.randn(clean.shape, device=device, generator=noise)
        frames = _compressed(clean, noise)
    frames = (frames.clamp(0, 1) * 255).round().to(torch.uint8)
    return frames.repeat_interleave(2, dim=0) if batch.shape.chunk_frames == 1 else frames


def _compressed(frames: Tensor, noise: torch.Generator) -> Tensor:
    """Quantise the cosine transform of blocks of 4x4 pixels, coarser at high frequencies, by a random amount.

    Frames' sides are multiples of 28, so the blocks fit; (num_frames, height, width, 3) in 0..1.
    """
    device = frames.device
    k = torch.arange(4, device=device, dtype=torch.float32)
    basis = torch.cos(math.pi * (k + 0.5) * k[:, None] / 4) * math.sqrt(0.5)
    basis[0] /= math.sqrt(2)
    blocks = frames.unflatten(2, (-1, 4)).unflatten(1, (-1, 4))  # (n, rows, 4, columns, 4, 3)
    waves = torch.einsum("ua,vb,nracbz->nrucvz", basis, basis, blocks)
    strength = torch.rand(len(frames), 1, 1, 1, 1, 1, device=device, generator=noise)
    step = (strength - 0.5).clamp(min=1e-4) * 0.12 * (1 + k[:, None] + k)[None, None, :, None, :, None]
    waves = (waves / step).round() * step
    return torch.einsum("ua,vb,nrucvz->nracbz", basis, basis, waves).flatten(3, 4).flatten(1, 2)


def visibility(batch: Batch, device: torch.device) -> Tensor:
    """Which token sees which: (b, 1, s, s) bool."""
    branch = torch.from_numpy(batch.branch).to(device)
    limit = torch.from_numpy(batch.limit).to(device)
    order = torch.arange(branch.shape[1], device=device)
    is_stream = branch == 0
    stream = is_stream[:, None, :] & (order < limit[..., None])
    own = (branch[:, :, None] == branch[:, None, :]) & ~is_stream[:, None, :] & (order[:, None] >= order)
    return (stream | own)[:, None]


def _vision_layer(block: Any, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    x = x + _attend(block.attn, block.norm1(x), rotary)
    return x + block.mlp(block.norm2(x))


def _text_layer(layer: Any, x: Tensor, mask: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    x = layer(x, attention_mask=mask, position_embeddings=cos_sin, use_cache=False)
    return x[0] if isinstance(x, tuple) else x


def _attend(attention: nn.Module, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Attention within each temporal patch, all of them as one batch; x (num_patches, length, hidden)."""
    q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).unbind(2)  # type: ignore[operator,arg-type]
    cos, sin = (r[None, :, None] for r in rotary)
    q, k = (t * cos + _rotate_half(t) * sin for t in (q.float(), k.float()))
    q, k, v = (t.to(v.dtype).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v)
    return attention.proj(out.transpose(1, 2).flatten(2))  # type: ignore[operator]


def _rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


class _Found(Exception):
    pass


def _rotary(visual: Any, grid: tuple[int, int], geometry: PatchGeometry, device: torch.device) -> tuple[Tensor, Tensor]:
    """The tower's own rotary table of one temporal patch, read off where its first block receives it."""
    cache = visual.__dict__.setdefault("_rotary_by_grid", {})
    if grid not in cache:

        def catch(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
            cache[grid] = tuple(t.detach() for t in kwargs["position_embeddings"])
            raise _Found

        hook = visual.blocks[0].register_forward_pre_hook(catch, with_kwargs=True)
        sides = [geometry.merge * side for side in grid]
        patches = torch.zeros(sides[0] * sides[1], 3 * geometry.temporal_patch * geometry.patch**2, device=device)
        try:
            with torch.inference_mode(False), torch.no_grad():
                visual(patches.clone(), grid_thw=torch.tensor([[1, *sides]], device=device))
        except _Found:
            pass
        finally:
            hook.remove()
    return cache[grid]


def _size(batch: Batch, geometry: PatchGeometry) -> tuple[int, int]:
    return batch.shape.grid[1] * geometry.factor, batch.shape.grid[0] * geometry.factor
