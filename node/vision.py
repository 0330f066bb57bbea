"""The vision tower: a forward pass of our own over the weights that transformers loaded.

It computes what transformers' forward computes (`onlooker verify` measures it against that one), in fewer and
larger steps: all windows of one size are one attention call, everything that depends on the grid alone is made
once for a grid, and what lies between two attention calls is one function that can be compiled.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import vision_utils

from .graphs import Recorded, Recorder

MAX_PLANS = 8  # grids remembered: streams of one size have up to three, by how many are encoded together
ALIGNED_WIDTH = 128  # of a matrix product; others fall to kernels of half the speed
MAX_RECORDED = 4096  # patches; more of them keep a GPU busy for longer than the host needs

# (products into the hidden width, product out of it), by family
_MLP_PARTS = ((("gate_proj", "up_proj"), "down_proj"), (("fc1",), "fc2"), (("linear_fc1",), "linear_fc2"))


class Vision(NamedTuple):
    """What the vision tower makes of a chunk."""

    embeds: Tensor  # (num_tokens, hidden)
    deepstack: list[Tensor] | None  # one (num_tokens, hidden) for each of the first language layers
    is_whole: bool = True  # False: tokens were left out, another number of every chunk

    def split(self, nums: Sequence[int]) -> "list[Vision]":
        """The tokens of several chunks, chunk by chunk."""
        layers = [layer.split(list(nums)) for layer in self.deepstack or ()]
        parts = enumerate(self.embeds.split(list(nums)))
        return [Vision(embeds, [layer[i] for layer in layers] or None, self.is_whole) for i, embeds in parts]

    @staticmethod
    def joined(parts: "Sequence[Vision]") -> "Vision":
        """The tokens of several chunks, one after the other."""
        if len(parts) == 1:
            return parts[0]
        layers = zip(*(part.deepstack or () for part in parts), strict=True)
        return Vision(
            torch.cat([part.embeds for part in parts]),
            [torch.cat(layer) for layer in layers] or None,
            all(part.is_whole for part in parts),
        )


class Segments(NamedTuple):
    """`num` stretches of `length` patches, one after the other: attention stays within a stretch."""

    length: int
    num: int


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """What a grid alone decides. Windows come in the order of their sizes, the largest first."""

    cos: Tensor  # (num_patches, 1, head_dim), float32, in the order of the windows
    sin: Tensor
    positions: Tensor | None  # (num_patches, hidden): learned position embeddings, in reading order
    frames: list[Segments]
    windows: list[Segments]
    order: Tensor | None  # (num_tokens,): the token at each place of the window order; None: as they are read
    inverse: Tensor | None
    frame_order: Tensor | None  # (num_patches,): from window order to patches that lie frame by frame
    frame_inverse: Tensor | None


class VisionTower:
    """Runs the tower over one chunk's patches. `before` and `after` are what may be compiled."""

    def __init__(self, visual: Any) -> None:
        self._visual = visual
        self._blocks = list(visual.blocks)
        self._unit = visual.spatial_merge_size**2  # patches of a token
        self._windowed = set(range(len(self._blocks))) - set(getattr(visual, "fullatt_block_indexes", range(10**6)))
        self._deepstack = list(getattr(visual, "deepstack_visual_indexes", ()))
        self._plans: OrderedDict[tuple[int, int, int], _Plan] = OrderedDict()
        self.before: Callable[..., tuple[Tensor, Tensor, Tensor]] = before_attention
        self.after: Callable[..., Tensor] = after_attention
        self.recorded: Recorded[_RecordedTower] | None = None  # of small grids, where there are CUDA graphs

    @property
    def is_whole(self) -> bool:
        """Whether all of it lies on one device; a tower that accelerate has spread is run by its own forward."""
        return len({parameter.device for parameter in self._visual.parameters()}) == 1

    def see(self, patches: Tensor, grid: tuple[int, int, int], between: Callable[[], None] | None = None) -> Vision:
        """Run the tower over patches of one chunk; grid is (temporal, height, width) in patches.

        `between` is called between two layers, or once after all if they are one graph.
        """
        if self.recorded is not None and len(patches) <= MAX_RECORDED:
            tower = self.recorded.get(grid, lambda: _RecordedTower(self, patches, grid))
            if tower is not None:
                seen = tower.see(patches)
                if between is not None:
                    between()
                return seen
        return self.see_by_layers(patches, grid, between)

    def see_by_layers(
        self, patches: Tensor, grid: tuple[int, int, int], between: Callable[[], None] | None = None
    ) -> Vision:
        """`see`, launched kernel by kernel."""
        plan = self._plan(grid)
        x = self._embed(patches, plan)
        deepstack: list[Tensor] = []
        for number, block in enumerate(self._blocks):
            q, k, v = self.before(block, x, plan.cos, plan.sin)
            if number in self._windowed:
                attended = self._attend(q, k, v, plan.windows)
            else:
                attended = self._attend_frames(q, k, v, plan)
            x = self.after(block, x, attended)
            if number in self._deepstack:
                merger = self._visual.deepstack_merger_list[self._deepstack.index(number)]
                deepstack.append(merger(x))
            if between is not None:
                between()
        merged = self._visual.merger(x)
        return Vision(merged if plan.inverse is None else merged[plan.inverse], deepstack or None)

    def _embed(self, patches: Tensor, plan: _Plan) -> Tensor:
        """Patches to (num_patches, hidden), in the order of the windows."""
        # A convolution whose stride is its kernel is one matrix product.
        proj = self._visual.patch_embed.proj
        x = F.linear(patches.to(proj.weight.dtype), proj.weight.flatten(1), proj.bias)
        if plan.positions is not None:
            x = x + plan.positions
        return x if plan.order is None else x.unflatten(0, (-1, self._unit))[plan.order].flatten(0, 1)

    def _attend_frames(self, q: Tensor, k: Tensor, v: Tensor, plan: _Plan) -> Tensor:
        if plan.frame_order is None:
            return self._attend(q, k, v, plan.frames)
        out = self._attend(q[plan.frame_order], k[plan.frame_order], v[plan.frame_order], plan.frames)
        return out[plan.frame_inverse]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, segments: list[Segments]) -> Tensor:
        """Attention within segments; q, k, v (num_patches, heads, head_dim). Returns (num_patches, hidden)."""
        outs, at = [], 0
        for length, num in segments:
            rows = slice(at, at + length * num)
            query, key, value = (x[rows].unflatten(0, (num, length)).transpose(1, 2) for x in (q, k, v))
            attended = F.scaled_dot_product_attention(query, key, value)
            outs.append(attended.transpose(1, 2).flatten(2).flatten(0, 1))
            at = rows.stop
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _plan(self, grid: tuple[int, int, int]) -> _Plan:
        plan = self._plans.get(grid)
        if plan is None:
            plan = self._plans[grid] = self._make_plan(grid)
            while len(self._plans) > MAX_PLANS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(grid)
        return plan

    def _make_plan(self, grid: tuple[int, int, int]) -> _Plan:
        visual, device = self._visual, self._visual.patch_embed.proj.weight.device
        temporal, num_patches = grid[0], grid[1] * grid[2]
        grid_thw = torch.tensor([grid])
        axes = vision_utils.get_vision_position_ids(grid_thw, visual.spatial_merge_size).to(device)
        cos, sin = visual.rotary_pos_emb(torch.empty(0, device=device), axes)
        frames = [Segments(num_patches, temporal)]
        order, windows = self._window_order(grid_thw) if self._windowed else (None, frames)
        frame_order = None
        if order is not None:
            patch_order = (order[:, None] * self._unit + torch.arange(self._unit)).flatten()
            cos, sin = (table[patch_order.to(device)] for table in (cos, sin))
            if temporal > 1:  # a frame's patches may come in any order, but together
                frame_order = (patch_order // num_patches).argsort(stable=True)
        return _Plan(
            cos=cos[:, None].float().contiguous(),
            sin=sin[:, None].float().contiguous(),
            positions=self._learned_positions(grid_thw),
            frames=frames,
            windows=windows,
            order=_on(device, order),
            inverse=_on(device, None if order is None else order.argsort()),
            frame_order=_on(device, frame_order),
            frame_inverse=_on(device, None if frame_order is None else frame_order.argsort()),
        )

    def _window_order(self, grid_thw: Tensor) -> tuple[Tensor, list[Segments]]:
        """Tokens window by window, the windows by falling size, so that those of one size are one batch."""
        visual = self._visual
        index, bounds = vision_utils.get_vision_window_index(
            grid_thw,
            spatial_merge_size=visual.spatial_merge_size,
            window_size=visual.window_size,
            patch_size=visual.patch_size,
        )
        sizes = (bounds.diff() // self._unit).tolist()  # in tokens
        windows = index.split(sizes)
        by_size = sorted(range(len(sizes)), key=lambda window: -sizes[window])
        order = torch.cat([windows[window] for window in by_size])
        return order, [Segments(size * self._unit, sizes.count(size)) for size in sorted(set(sizes), reverse=True)]

    def _learned_positions(self, grid_thw: Tensor) -> Tensor | None:
        visual = self._visual
        if not hasattr(visual, "pos_embed"):
            return None
        table = visual.pos_embed.weight
        indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
            grid_thw,
            num_grid_per_side=visual.num_grid_per_side,
            mode=visual.interpolation_mode,
            align_corners=visual.interpolation_align_corners,
            spatial_merge_size=visual.spatial_merge_size,
        )
        weights = weights.to(table.device)[:, :, None]
        return (visual.pos_embed(indices.to(table.device)) * weights).sum(1).to(table.dtype)


class _RecordedTower:
    """The tower over one grid as a CUDA graph: few patches keep a GPU busy for less time than their launches take."""

    def __init__(self, tower: VisionTower, patches: Tensor, grid: tuple[int, int, int]) -> None:
        """Raises what CUDA raises."""
        self._patches = patches.clone()
        self._recording = Recorder().record(lambda: tower.see_by_layers(self._patches, grid))

    def see(self, patches: Tensor) -> Vision:
        self._patches.copy_(patches)
        embeds, deepstack, _ = self._recording.replay()
        return Vision(embeds.clone(), None if deepstack is None else [features.clone() for features in deepstack])


def before_attention(block: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise, project and rotate: q, k, v (num_patches, heads, head_dim) of x (num_patches, hidden)."""
    attention: Any = block.attn
    qkv = attention.qkv(block.norm1(x)).unflatten(-1, (3, attention.num_heads, -1))  # type: ignore[operator]
    q, k, v = qkv.unbind(1)
    return _rotated(q, cos, sin), _rotated(k, cos, sin), v


def after_attention(block: nn.Module, x: Tensor, attended: Tensor) -> Tensor:
    """The rest of a block; x and attended (num_patches, hidden)."""
    x = x + block.attn.proj(attended)  # type: ignore[operator,union-attr]
    return x + block.mlp(block.norm2(x))  # type: ignore[operator]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in float32."""
    wide = x.float()
    a, b = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-b, a], dim=-1) * sin).to(x.dtype)


def align_mlps(visual: Any, multiple: int = ALIGNED_WIDTH) -> None:
    """Widen the hidden layers of all blocks with zeros to a multiple; the function stays the same.

    The added units have weight and bias zero, so they give act(0) = 0, and nothing of them goes on.
    """
    for block in visual.blocks:
        into, out = next(parts for parts in _MLP_PARTS if hasattr(block.mlp, parts[1]))
        for name in into:
            _widen(getattr(block.mlp, name), multiple, dim=0)
        _widen(getattr(block.mlp, out), multiple, dim=1)


@torch.no_grad()
def _widen(linear: nn.Linear, multiple: int, *, dim: int) -> None:
    missing = -linear.weight.shape[dim] % multiple
    if not missing:
        return
    linear.weight = nn.Parameter(F.pad(linear.weight, (0, missing) if dim else (0, 0, 0, missing)), False)
    if dim == 0:
        linear.out_features += missing
        if linear.bias is not None:
            linear.bias = nn.Parameter(F.pad(linear.bias, (0, missing)), False)
    else:
        linear.in_features += missing


def _on(device: torch.device, index: Tensor | None) -> Tensor | None:
    return None if index is None else index.to(device)
