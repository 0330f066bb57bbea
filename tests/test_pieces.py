import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, Checkpoints

from onlooker.node.arena import Arena
from onlooker.node.branch import Branch, Scratch
from onlooker.node.chunk import Chunk, Picture
from onlooker.node.memory import StreamMemory
from onlooker.node.options import StreamOptions
from onlooker.node.passes import Prefill
from onlooker.node.pieces import Pieces

DENSE = [family for family in FAMILIES if not family.endswith("moe")]


def inputs(model, n: int, first: int, num_deepstack: int = 0):
    random = torch.Generator().manual_seed(first)
    hidden = model.config.text_config.hidden_size
    embeds, *deepstack = torch.randn(1 + num_deepstack, 1, n, hidden, generator=random)
    positions = torch.stack([torch.arange(n), torch.arange(n) // 2, torch.arange(n) % 3])[:, None] + first
    return embeds, positions, list(deepstack)


@pytest.mark.parametrize("family", DENSE)
@torch.inference_mode()
def test_pieces_compute_what_the_layers_compute_in_one_go_and_write_the_same(checkpoints: Checkpoints, family: str):
    model = checkpoints.model(family)
    pieces = Pieces(model.language, is_recorded=False)
    arenas = [Arena(model.kv_shape, 200) for _ in range(2)]
    first = 0
    for n in (40, 40, 37, 5):  # the second finds the first one's numbers in the buffers, the others are padded
        embeds, positions, deepstack = inputs(model, n, first, 2 if family.startswith("qwen3") else 0)
        plain, mine = (
            run(embeds, positions, Prefill([arena.extent(0, first)], (arena, first)), deepstack, None)
            for run, arena in zip((model.language.run, pieces.run), arenas, strict=True)
        )
        assert mine is not None and plain is not None
        assert mine.shape == plain.shape
        assert (mine - plain).abs().max() <= 1e-5
        first += n
    for layer in range(model.kv_shape.num_layers):
        for mine, plain in zip(*(arena.extent(0, first).rows(layer) for arena in arenas), strict=True):
            assert (mine - plain).abs().max() <= 1e-5


@torch.inference_mode()
def test_work_may_go_on_between_two_layers_of_pieces(checkpoints: Checkpoints):
    model = checkpoints.model("qwen2_vl")
    calls: list[int] = []
    embeds, positions, _ = inputs(model, 20, 0)
    Pieces(model.language, is_recorded=False).run(embeds, positions, Prefill([]), (), lambda: calls.append(1))
    assert len(calls) == model.kv_shape.num_layers


@pytest.mark.parametrize("num_words", [5, 70, 100])
def test_a_question_in_the_middle_of_a_chunk_leaves_its_pieces_alone(checkpoints: Checkpoints, num_words: int):
    model = checkpoints.model("qwen2_5_vl")
    options = StreamOptions("cam", chunk_frames=4, memory_bytes=1000 * model.kv_shape.bytes_per_token)
    memories = [StreamMemory(model, options) for _ in range(2)]
    scratch = Scratch(model.kv_shape, 1, 256)
    asked: list[torch.Tensor] = []

    def ask() -> float:
        memory = memories[0]
        if memory.now.num_frames:
            branch = Branch(model, memory, memory.now, scratch)
            asked.append(branch.prefill(memory.layout.question(memory.now.layout, "What? " * num_words)))
            branch.close()
        return 0.0

    model.pieces = Pieces(model.language, is_recorded=False)
    try:
        for memory, between in zip(memories, (ask, None), strict=True):
            for number in range(3):
                memory.append(chunk(number), between=between)
    finally:
        model.pieces = None
    assert asked
    length = memories[0].now.num_tokens
    for layer in range(model.kv_shape.num_layers):
        rows, alone = (memory.extent(memory.now).rows(layer) for memory in memories)
        assert all(torch.equal(a, b) for a, b in zip(rows, alone, strict=True)), (layer, length)


def chunk(number: int) -> Chunk:
    random = np.random.default_rng(number)
    pixels = random.integers(0, 256, (4, 112, 112, 3), dtype=np.uint8)
    first = 4 * number
    return Chunk(tuple(Picture(p, first + i, first + i, "media", (first + i) * 10**9) for i, p in enumerate(pixels)))
