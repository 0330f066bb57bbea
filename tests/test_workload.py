"""What is counted is what torch counts, for every family."""

import pytest
import torch
from checkpoints import FAMILIES
from torch.utils.flop_counter import FlopCounterMode

from onlooker.node.random_checkpoint import build_config, build_model, build_tokenizer
from onlooker.node.workload import (
    Grid,
    TextSizes,
    VisionSizes,
    Work,
    decode_work,
    history_work,
    prefill_work,
    vision_work,
)

# Not a multiple of the window (two merged tokens on a side), so that windows are cut off at the edges.
GRID = Grid(num_temporal=2, rows=3, columns=5)


@pytest.fixture(scope="module", params=FAMILIES)
def network(request: pytest.FixtureRequest):
    config = build_config(request.param, build_tokenizer())
    config._experts_implementation = "eager"
    model = build_model(config)
    model.set_attn_implementation("eager")
    return model


def counted(call) -> int:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        call()
    return counter.get_total_flops()


def num_matrix_weights(module: torch.nn.Module, *left_out: str) -> int:
    named = module.named_parameters()
    return sum(p.numel() for name, p in named if p.dim() > 1 and not name.startswith(left_out))


def test_the_vision_tower_computes_what_is_counted(network):
    vision = network.config.vision_config
    sizes = VisionSizes.of(vision)
    grid = torch.tensor([[GRID.num_temporal, GRID.rows * sizes.merge, GRID.columns * sizes.merge]])
    patches = torch.zeros(GRID.num_tokens * sizes.merge**2, sizes.patch_values)
    assert vision_work(sizes, GRID, 4).flops == counted(lambda: network.model.visual(patches, grid_thw=grid))


def test_the_weights_are_those_of_the_model(network):
    text = TextSizes.of(network.config.text_config)
    experts = text.num_sparse_layers * text.num_experts * text.expert_weights
    language_model = network.model.language_model
    assert VisionSizes.of(network.config.vision_config).weights == num_matrix_weights(network.model.visual, "pos_embed")
    assert text.dense_weights + experts == num_matrix_weights(language_model, "embed_tokens")
    assert text.head_weights == network.lm_head.weight.numel()


def test_the_language_model_computes_what_is_counted(network):
    """Eager attention also computes what is masked: the pairs of a query and a later key."""
    sizes, n = TextSizes.of(network.config.text_config), 7
    embeds, positions = torch.zeros(1, n, sizes.hidden), torch.arange(n).expand(3, 1, n)

    def read() -> None:
        out = network.model.language_model(inputs_embeds=embeds, position_ids=positions, use_cache=False)
        network.lm_head(out.last_hidden_state[:, -1:])

    masked = 4 * n * (n - 1) // 2 * sizes.num_heads * sizes.head_dim * sizes.num_layers
    assert prefill_work(sizes, n, 4, num_logits=1).flops + masked == counted(read) - counted_rotary(network, n)


def test_a_decoded_token_is_a_prefill_of_one_over_its_history(network):
    sizes = TextSizes.of(network.config.text_config)
    step = decode_work(sizes, 1, 100, 1, 4)
    assert step.flops == (prefill_work(sizes, 1, 4, num_logits=1) + history_work(sizes, 1, 100, 4)).flops


def counted_rotary(network, n: int) -> int:
    """The rotary frequencies are made by a matrix product of their own, which is no work of the model's."""
    positions = torch.arange(n).expand(3, 1, n)
    return counted(lambda: network.model.language_model.rotary_emb(torch.zeros(1, n, 1), positions))


TEXT = TextSizes(
    hidden=2048,
    intermediate=11008,
    num_layers=36,
    num_heads=16,
    num_kv_heads=2,
    head_dim=128,
    vocab_size=151936,
)


def test_a_decoded_token_reads_weights_and_history_once_however_many_ask():
    one, eight = (decode_work(TEXT, n, 28_500, 0, 2) for n in (1, 8))
    assert one.num_bytes == eight.num_bytes == 2 * (TEXT.dense_weights + TEXT.head_weights) + 28_500 * 36_864
    assert eight.flops == 8 * one.flops


def test_a_chunk_of_full_hd_over_a_history_takes_the_operations_that_the_sizes_say():
    prefill, past = prefill_work(TEXT, 5382, 2), history_work(TEXT, 5382, 28_500, 2)
    assert prefill.flops == pytest.approx(33.2e12, rel=0.05)
    assert past.flops == 4 * 5382 * 28_500 * 2048 * 36
    assert prefill.num_bytes == pytest.approx(2 * TEXT.dense_weights, rel=0.1)


def test_few_tokens_read_only_the_experts_they_call():
    sparse = TextSizes(64, 0, 2, 4, 2, 16, 512, 2, num_experts=8, num_experts_per_token=2, expert_intermediate=32)
    few, many = (prefill_work(sparse, n, 1).num_bytes - n * (2 * 64 + sparse.kv_values_per_token) for n in (1, 100))
    assert (few - sparse.dense_weights, many - sparse.dense_weights) == (
        2 * 2 * sparse.expert_weights,
        2 * 8 * sparse.expert_weights,
    )


def test_work_adds_up():
    assert Work(1, 2) + Work(10, 20) == Work(11, 22)
