"""What a model has to compute and to move for a chunk or a token, counted from its configuration alone.

Pure arithmetic: a multiplication and an addition are two operations. Counted are matrix products and attention;
norms, rotations and activations are less than a hundredth of them. Bytes are those that must move at least once:
weights, inputs, results, and the keys and values that are read or written.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Work:
    """Operations, and bytes to move."""

    flops: int = 0
    num_bytes: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.num_bytes + other.num_bytes)


@dataclass(frozen=True, slots=True)
class Grid:
    """What the vision tower sees of a chunk, in merged tokens a temporal patch."""

    num_temporal: int
    rows: int
    columns: int

    @property
    def num_tokens(self) -> int:
        return self.num_temporal * self.rows * self.columns


@dataclass(frozen=True, slots=True)
class VisionSizes:
    """The widths of a vision tower that its work depends on."""

    num_layers: int
    hidden: int
    intermediate: int
    num_mlp_matrices: int
    out_hidden: int
    patch_values: int  # numbers in one patch: channels x frames x pixels
    merge: int
    num_mergers: int  # one, and one for each layer that feeds the language model directly
    window: int | None  # merged tokens on a side of an attention window; None: a whole temporal patch
    num_full_layers: int  # layers that attend to a whole temporal patch

    @classmethod
    def of(cls, vision: Any) -> "VisionSizes":
        """Read a `vision_config`. Qwen2-VL alone calls its width embed_dim, and states its MLP as a ratio."""
        is_first = hasattr(vision, "embed_dim")
        hidden = vision.embed_dim if is_first else vision.hidden_size
        full_layers = getattr(vision, "fullatt_block_indexes", None)
        has_windows = full_layers is not None
        return cls(
            num_layers=vision.depth,
            hidden=hidden,
            intermediate=hidden * vision.mlp_ratio if is_first else vision.intermediate_size,
            num_mlp_matrices=3 if has_windows else 2,  # Qwen2.5-VL has a gate
            out_hidden=vision.hidden_size if is_first else vision.out_hidden_size,
            patch_values=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
            merge=vision.spatial_merge_size,
            num_mergers=1 + len(getattr(vision, "deepstack_visual_indexes", ())),
            window=vision.window_size // vision.patch_size // vision.spatial_merge_size if has_windows else None,
            num_full_layers=len(full_layers) if full_layers is not None else vision.depth,
        )

    @property
    def block_weights(self) -> int:
        """Weights of the matrices of all blocks."""
        return self.num_layers * (4 * self.hidden**2 + self.num_mlp_matrices * self.hidden * self.intermediate)

    @property
    def merger_weights(self) -> int:
        merged = self.hidden * self.merge**2
        return self.num_mergers * (merged * merged + merged * self.out_hidden)

    @property
    def weights(self) -> int:
        return self.patch_values * self.hidden + self.block_weights + self.merger_weights


@dataclass(frozen=True, slots=True)
class TextSizes:
    """The widths of a language model that its work depends on."""

    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    num_sparse_layers: int = 0
    num_experts: int = 0
    num_experts_per_token: int = 0
    expert_intermediate: int = 0

    @classmethod
    def of(cls, text: Any) -> "TextSizes":
        """Read a `text_config`."""
        num_experts = getattr(text, "num_experts", 0) or 0
        return cls(
            hidden=text.hidden_size,
            intermediate=text.intermediate_size,
            num_layers=text.num_hidden_layers,
            num_heads=text.num_attention_heads,
            num_kv_heads=text.num_key_value_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            vocab_size=text.vocab_size,
            num_sparse_layers=_num_sparse_layers(text) if num_experts else 0,
            num_experts=num_experts,
            num_experts_per_token=text.num_experts_per_tok if num_experts else 0,
            expert_intermediate=text.moe_intermediate_size if num_experts else 0,
        )

    @property
    def attention_weights(self) -> int:
        """Of the projections of one layer."""
        return 2 * self.hidden * self.head_dim * (self.num_heads + self.num_kv_heads)

    @property
    def expert_weights(self) -> int:
        """Of one expert."""
        return 3 * self.hidden * self.expert_intermediate

    @property
    def dense_weights(self) -> int:
        """What every token passes through in all layers: all but the experts."""
        num_dense = self.num_layers - self.num_sparse_layers
        routers = self.num_sparse_layers * self.hidden * self.num_experts
        return self.num_layers * self.attention_weights + num_dense * 3 * self.hidden * self.intermediate + routers

    @property
    def head_weights(self) -> int:
        return self.hidden * self.vocab_size

    @property
    def kv_values_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


def vision_work(sizes: VisionSizes, grid: Grid, itemsize: int) -> Work:
    """The vision tower over one chunk."""
    num_patches = grid.num_tokens * sizes.merge**2
    through = sizes.patch_values * sizes.hidden + sizes.block_weights
    merged = grid.num_tokens * sizes.merger_weights
    flops = 2 * (num_patches * through + merged) + _vision_attention_flops(sizes, grid)
    embeddings = grid.num_tokens * sizes.out_hidden * sizes.num_mergers
    return Work(flops, (sizes.weights + num_patches * sizes.patch_values + embeddings) * itemsize)


def prefill_work(sizes: TextSizes, num_tokens: int, itemsize: int, *, num_logits: int = 0) -> Work:
    """The language model over so many new tokens that see one another causally; their history comes on top."""
    flops = 2 * num_tokens * _weights_per_token(sizes) + _attention_flops(sizes, num_tokens * (num_tokens + 1) // 2)
    weights = sizes.dense_weights + _experts_read(sizes, num_tokens)
    moved = weights + num_tokens * (2 * sizes.hidden + sizes.kv_values_per_token)
    head = Work(2 * num_logits * sizes.head_weights, itemsize * sizes.head_weights if num_logits else 0)
    return Work(flops, moved * itemsize) + head


def history_work(sizes: TextSizes, num_tokens: int, history: int, itemsize: int) -> Work:
    """Attention from so many tokens to the whole of a history, which is read once for all of them."""
    return Work(_attention_flops(sizes, num_tokens * history), history * sizes.kv_values_per_token * itemsize)


def decode_work(sizes: TextSizes, num_answers: int, history: int, own: int, itemsize: int) -> Work:
    """One more token for each of several answers over one shared history, each with so many tokens of its own."""
    own_attention = Work(
        _attention_flops(sizes, num_answers * own), num_answers * own * sizes.kv_values_per_token * itemsize
    )
    linear = Work(
        2 * num_answers * (_weights_per_token(sizes) + sizes.head_weights),
        (sizes.dense_weights + _experts_read(sizes, num_answers) + sizes.head_weights) * itemsize,
    )
    return linear + own_attention + history_work(sizes, num_answers, history, itemsize)


def _weights_per_token(sizes: TextSizes) -> int:
    """Weights that one token is multiplied with in all layers."""
    return sizes.dense_weights + sizes.num_sparse_layers * sizes.num_experts_per_token * sizes.expert_weights


def _experts_read(sizes: TextSizes, num_tokens: int) -> int:
    """Weights of the experts that so many tokens call at most."""
    num_called = min(sizes.num_experts, num_tokens * sizes.num_experts_per_token)
    return sizes.num_sparse_layers * num_called * sizes.expert_weights


def _attention_flops(sizes: TextSizes, num_pairs: int) -> int:
    """Scores and weighted sums in all layers of so many pairs of a query and a key."""
    return 4 * num_pairs * sizes.num_heads * sizes.head_dim * sizes.num_layers


def _vision_attention_flops(sizes: VisionSizes, grid: Grid) -> int:
    whole = [grid.rows * grid.columns]
    windows = whole if sizes.window is None else _window_tokens(grid, sizes.window)
    num_window_layers = sizes.num_layers - sizes.num_full_layers
    squares = sizes.num_full_layers * _squares(whole) + num_window_layers * _squares(windows)
    return 4 * grid.num_temporal * squares * sizes.merge**4 * sizes.hidden


def _window_tokens(grid: Grid, window: int) -> list[int]:
    """Merged tokens of each window of a temporal patch; those at the edges are cut off."""
    return [rows * columns for rows in _cuts(grid.rows, window) for columns in _cuts(grid.columns, window)]


def _cuts(length: int, window: int) -> list[int]:
    return [min(window, length - window * i) for i in range(math.ceil(length / window))]


def _squares(counts: Iterable[int]) -> int:
    return sum(count * count for count in counts)


def _num_sparse_layers(text: Any) -> int:
    dense = set(getattr(text, "mlp_only_layers", None) or ())
    step = getattr(text, "decoder_sparse_step", 1)
    return sum(i not in dense and (i + 1) % step == 0 for i in range(text.num_hidden_layers))
