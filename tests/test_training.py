"""Training sees what the engine sees: the same tokens, the same positions, the same hidden states."""

import numpy as np
import pytest
import torch

from onlooker.node.arena import Arena
from onlooker.node.layout import Span
from onlooker.node.model import VisionLanguageModel, load_model
from onlooker.node.passes import Prefill
from onlooker.node.preprocess import to_patches
from onlooker.node.random_checkpoint import save_checkpoint
from onlooker.tools.scene_questions import KINDS
from onlooker.tools.story import COLOURS, SHAPES, make_plain_story
from onlooker.training.batches import IGNORE, PAST, Batch, Plan, Shape, make_batch, past_of
from onlooker.training.network import Trainee, render, visibility
from onlooker.training.train import CURRICULUM, MAX_PIXELS, MIN_PIXELS, build

CPU = torch.device("cpu")
PLAN = Plan(tokens=1500, max_patches=6, num_questions=4)


@pytest.fixture(scope="module")
def trained():
    return build(seed=0)


@pytest.fixture(scope="module")
def engine_model(trained, tmp_path_factory) -> VisionLanguageModel:
    trainee, tokenizer, _ = trained
    folder = tmp_path_factory.mktemp("trained")
    pixels = (MIN_PIXELS, MAX_PIXELS)
    save_checkpoint(folder, trainee.model, tokenizer, "qwen2_5_vl", pixels=pixels, dtype=torch.float32)
    return load_model(str(folder), device="cpu", dtype="float32")


def batches(form, num: int) -> list[Batch]:
    rng = np.random.default_rng(1)
    return [make_batch(form, rng, PLAN) for _ in range(num)]


@torch.inference_mode()
def test_the_wide_forward_pass_gives_the_engines_hidden_states(trained, engine_model):
    trainee, _, form = trained
    for batch in batches(form, 5):
        pixels = render(batch, CPU, torch.Generator().manual_seed(0))
        mine = hidden_states(trainee, batch, pixels)
        theirs, branch = engine_states(engine_model, batch, pixels)
        num_stream = len(theirs)
        assert float((mine[0, :num_stream] - theirs).abs().max()) < 1e-5, batch.shape
        if branch is not None:
            where = np.nonzero(batch.branch[0] == 1)[0]
            assert float((mine[0, where] - branch).abs().max()) < 1e-5, batch.shape


def hidden_states(trainee: Trainee, batch: Batch, pixels: torch.Tensor) -> torch.Tensor:
    size = batch.shape.grid[1] * trainee.geometry.factor, batch.shape.grid[0] * trainee.geometry.factor
    seen = trainee._see(to_patches(pixels, size, trainee.geometry), batch)
    return trainee._read(seen, batch, CPU)[1]


def engine_states(model: VisionLanguageModel, batch: Batch, pixels: torch.Tensor):
    """The first row's stream, and its first question if it has one, as the engine computes them."""
    rows, columns = batch.shape.grid
    per_row = len(pixels) // len(batch.ids)
    geometry = model.geometry
    patches = to_patches(pixels[:per_row], (columns * geometry.factor, rows * geometry.factor), geometry)
    vision = model.see(patches, (per_row // 2, rows * geometry.merge, columns * geometry.merge))
    num_stream = int((batch.branch[0] == 0).sum())
    arena = Arena(model.kv_shape, num_stream)
    stream = span_of(batch, np.arange(num_stream))
    hidden = model.read(stream, Prefill([], (arena, 0)), vision)
    where = np.nonzero(batch.branch[0] == 1)[0]
    if not len(where):
        return hidden, None
    limit = int(batch.limit[0, where[0]])
    return hidden, model.read(span_of(batch, where), Prefill([arena.extent(0, limit)]))


def span_of(batch: Batch, where: np.ndarray) -> Span:
    return Span(batch.ids[0, where], batch.positions[:, 0, where], batch.visual[where], 0)


def test_a_question_sees_the_stream_up_to_its_chunk_and_itself(trained):
    for batch in batches(trained[2], 3):
        mask = visibility(batch, CPU)[:, 0].numpy()
        order = np.arange(mask.shape[1])
        for row, branch in enumerate(batch.branch):
            for i in np.nonzero(branch > 0)[0]:
                own = (branch == branch[i]) & (order <= i)
                stream = (branch == 0) & (order < batch.limit[row, i])
                assert (mask[row, i] == (own | stream)).all()


def test_an_answer_is_learned_whole_with_the_end_of_its_turn(trained):
    _, tokenizer, form = trained
    end = tokenizer.token_to_id("<|im_end|>")
    batch = batches(form, 1)[0]
    for row in range(len(batch.ids)):
        for number in set(batch.branch[row]) - {0, -1}:
            labels = batch.labels[row, batch.branch[row] == number]
            answer = labels[labels != IGNORE]
            assert answer[-1] == end and end not in answer[:-1]
            assert tokenizer.decode(list(answer[:-1])).strip()


def test_batches_follow_the_seed(trained):
    first, second = (batches(trained[2], 1)[0] for _ in range(2))
    assert (first.ids == second.ids).all() and (first.positions == second.positions).all()


def test_the_curriculum_ends_with_every_kind_and_the_longest_streams():
    last = CURRICULUM[-1]
    assert last.until == 1.0 and last.kinds == tuple(KINDS)
    assert last.max_patches == max(stage.max_patches for stage in CURRICULUM)


def test_losses_reach_every_weight_of_the_model(trained):
    trainee, _, form = trained
    losses = trainee(batches(form, 1)[0], CPU, torch.Generator().manual_seed(0))
    (losses.answers + losses.sight.sum() + losses.past.sum()).backward()
    unused = [name for name, p in trainee.model.named_parameters() if p.grad is None or not p.grad.any()]
    trainee.zero_grad()
    assert not unused
    right, kinds = losses.verdict.by_answer()
    assert len(right) == len(kinds) > 0


def test_every_visual_token_is_to_know_what_came_before_its_thing_and_when_that_came():
    shape = Shape("native", chunk_frames=2, num_chunks=9, grid=(4, 4))
    story = make_plain_story(0, ("red circle", "blue square", "red circle"), show_s=6.0)
    past = past_of(story, np.arange(18.0), shape)
    nothing = len(SHAPES), len(COLOURS)
    circle, square = (
        (SHAPES.index(name.split()[1]), list(COLOURS).index(name.split()[0])) for name in ("red circle", "blue square")
    )
    for patches, said in (
        (slice(0, 3), (*nothing, 0, 0, 0)),
        (slice(3, 6), (*circle, 0, 6, 1)),
        (slice(6, 9), (*square, 1, 2, 0)),
    ):
        for patch in past[patches]:
            known = patch[patch[:, -1] != IGNORE]
            assert 0 < len(known) < 16
            assert known.tolist() == [list(said)] * len(known)


def test_without_a_clock_no_token_is_to_know_a_second():
    shape = Shape("turns", chunk_frames=2, num_chunks=3, grid=(4, 4))
    past = past_of(make_plain_story(0, ("red circle",), show_s=6.0), np.arange(6.0), shape)
    clock = [list(PAST).index(name) for name in ("tens", "ones")]
    assert (past[..., clock] == IGNORE).all() and (past[..., -1] == 0).any()
