from typing import Any

import pytest
import torch
from checkpoints import FAMILIES, Checkpoints
from torch import Tensor

from onlooker.node.model import VisionLanguageModel
from onlooker.node.random_checkpoint import build_config, build_model, build_tokenizer
from onlooker.node.vision import MAX_PLANS, Vision, VisionTower, align_mlps, before_attention

# Patches: whole windows alone, ragged edges, several frames, one token.
GRIDS = [(1, 8, 8), (2, 8, 12), (3, 10, 6), (2, 14, 10), (1, 2, 2)]


def patches(model: VisionLanguageModel, grid: tuple[int, int, int]) -> Tensor:
    shape = (grid[0] * grid[1] * grid[2], 3 * 2 * model.geometry.patch**2)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def theirs(visual: Any, seen: Tensor, grid: tuple[int, int, int]) -> Vision:
    """What transformers' own forward makes of the patches."""
    out = visual(seen, grid_thw=torch.tensor([grid]), return_dict=True)
    return Vision(out.pooler_output, getattr(out, "deepstack_features", None))


def distance(mine: Vision, other: Vision) -> float:
    pairs = [(mine.embeds, other.embeds), *zip(mine.deepstack or (), other.deepstack or (), strict=True)]
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_tower_sees_what_transformers_own_forward_sees(
    checkpoints: Checkpoints, family: str, grid: tuple[int, int, int]
):
    model = checkpoints.model(family)
    seen = patches(model, grid)
    assert distance(model.see(seen, grid), theirs(model._model.model.visual, seen, grid)) <= 1e-5


def test_frames_seen_together_are_seen_as_each_by_itself(checkpoints: Checkpoints):
    model = checkpoints.model("qwen2_5_vl")
    seen = patches(model, (3, 10, 6))
    together = model.see(seen, (3, 10, 6)).embeds
    alone = torch.cat([model.see(frame, (1, 10, 6)).embeds for frame in seen.chunk(3)])
    assert (together - alone).abs().max() <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_widening_the_hidden_layers_leaves_the_function_as_it_is(checkpoints: Checkpoints, family: str):
    tokenizer = build_tokenizer()
    visual = build_model(build_config(family, tokenizer)).model.visual
    model = checkpoints.model(family)
    seen, grid = patches(model, (1, 4, 6)), (1, 4, 6)
    with torch.inference_mode():
        before = VisionTower(visual).see(seen, grid)
        num_before = sum(parameter.numel() for parameter in visual.parameters())
        align_mlps(visual, multiple=96)
        assert sum(parameter.numel() for parameter in visual.parameters()) > num_before
        assert distance(VisionTower(visual).see(seen, grid), before) <= 1e-6
        assert distance(before, theirs(visual, seen, grid)) <= 1e-5


def test_a_grid_seen_again_after_many_others_is_seen_the_same(checkpoints: Checkpoints):
    model = checkpoints.model("qwen2_5_vl")
    tower = VisionTower(model._model.model.visual)
    seen = patches(model, (1, 4, 4))
    with torch.inference_mode():
        first = tower.see(seen, (1, 4, 4)).embeds
        for width in range(MAX_PLANS + 2):
            tower.see(patches(model, (1, 4, 2 * width + 2)), (1, 4, 2 * width + 2))
        assert len(tower._plans) == MAX_PLANS
        assert torch.equal(tower.see(seen, (1, 4, 4)).embeds, first)


def test_work_may_go_on_between_two_layers(checkpoints: Checkpoints):
    model = checkpoints.model("qwen3_vl")
    calls: list[int] = []
    with torch.inference_mode():
        model.tower.see(patches(model, (1, 4, 4)), (1, 4, 4), lambda: calls.append(1))
    assert len(calls) == model.config.vision_config.depth


def test_all_layers_are_one_graph_for_the_compiler(checkpoints: Checkpoints):
    """Were a layer's own values in the graph, every layer of every resolution would be compiled anew."""
    model = checkpoints.model("qwen2_5_vl")
    num_graphs = 0

    def count(graph, _inputs):  # type: ignore[no-untyped-def]
        nonlocal num_graphs
        num_graphs += 1
        return graph.forward

    compiled = torch.compile(before_attention, dynamic=True, fullgraph=True, backend=count)
    with torch.inference_mode():
        for num in (24, 40):
            for block in model._model.model.visual.blocks:
                x, cos = torch.randn(num, 64), torch.ones(num, 1, 16)
                expected = before_attention(block, x, cos, cos)
                for a, b in zip(compiled(block, x, cos, cos), expected, strict=True):
                    assert torch.equal(a, b)
    assert num_graphs == 1
