from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, Checkpoints
from torch import nn

from onlooker.node.language import after_attention, before_attention, fuse
from onlooker.node.passes import Prefill


@pytest.mark.parametrize("family", FAMILIES)
def test_visual_tokens_and_deepstack_equal_transformers_own_forward(checkpoints: Checkpoints, family: str):
    model = checkpoints.model(family)
    text = model._model.model.language_model
    random = torch.Generator().manual_seed(0)
    embeds = torch.randn(1, 9, text.config.hidden_size, generator=random)
    positions = torch.stack([torch.arange(9), torch.arange(9) // 2, torch.arange(9) % 3])[:, None]
    extra: dict[str, Any] = {}
    deepstack = []
    if family.startswith("qwen3"):
        visual = torch.arange(9) % 2 == 1
        features = torch.randn(2, 4, text.config.hidden_size, generator=random)
        extra = {"visual_pos_masks": visual[None], "deepstack_visual_embeds": list(features)}
        deepstack = [torch.zeros_like(embeds).index_put((torch.tensor(0), visual), part) for part in features]
    with torch.inference_mode():
        theirs = text(inputs_embeds=embeds, position_ids=positions, use_cache=False, **extra).last_hidden_state
        mine = model.language.run(embeds, positions, Prefill([]), deepstack)
    assert (mine - theirs).abs().max() <= 1e-5


def test_work_may_go_on_between_two_layers(checkpoints: Checkpoints):
    model = checkpoints.model("qwen2_vl")
    calls: list[int] = []
    with torch.inference_mode():
        model.language.run(
            torch.zeros(1, 2, 64), torch.zeros(3, 1, 2).long(), Prefill([]), between=lambda: calls.append(1)
        )
    assert len(calls) == model.kv_shape.num_layers


def test_fused_products_are_those_of_the_parts_and_take_no_memory_of_their_own():
    parts = [nn.Linear(8, num) for num in (6, 2, 2)]
    x = torch.randn(5, 8)
    before = [part(x) for part in parts]
    weight, bias = fuse(parts)
    assert torch.allclose(nn.functional.linear(x, weight, bias), torch.cat(before, dim=-1))
    assert all(torch.equal(part(x), then) for part, then in zip(parts, before, strict=True))
    assert {part.weight.untyped_storage().data_ptr() for part in parts} == {weight.untyped_storage().data_ptr()}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])  # before them, layers were those of the first
def test_all_layers_are_one_graph_for_the_compiler(checkpoints: Checkpoints, family: str):
    language = checkpoints.model(family).language
    graphs: list[Any] = []

    def count(graph, _inputs):  # type: ignore[no-untyped-def]
        graphs.append(graph)
        return graph.forward

    before: Any = torch.compile(before_attention, dynamic=True, fullgraph=True, backend=count)
    after: Any = torch.compile(after_attention, dynamic=True, fullgraph=True, backend=count)
    with torch.inference_mode():
        for num in (24, 40):
            for weights, rest in language._layers:
                x, table = torch.randn(num, 64), torch.ones(num, 1, 16)
                q, k, _ = before(x, table, table, weights)
                assert torch.equal(after(x, q.flatten(1), rest), after_attention(x, q.flatten(1), rest))
                assert k.shape == (num, 2, 16)
    assert len(graphs) == 2


def test_rows_of_a_batch_are_at_their_own_positions(checkpoints: Checkpoints):
    model = checkpoints.model("qwen3_vl")
    ids, positions = np.array([[20, 30], [20, 30]]), np.array([[0, 1], [7, 8]])
    both = model.read_batch(ids, positions, Prefill([]))
    alone = model.read_batch(ids[1:], positions[1:], Prefill([]))
    assert (both[1] - alone[0]).abs().max() <= 1e-5
