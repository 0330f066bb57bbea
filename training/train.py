"""Train the built-in model from nothing, or further.

    python -m onlooker.training.train RUN --minutes 20        on a GPU: minutes, in which the curriculum is spread
    python -m onlooker.training.train RUN --minutes 20        again: goes on where RUN/state.pt stands
    python -m onlooker.training.train RUN --export FOLDER
    python -m onlooker.training.train NEXT --start FOLDER     from what was exported: looking is learned already

The curriculum widens the streams: RUN/log.jsonl keeps loss and accuracy by kind of question. Batches are made
on the CPU by worker processes and drawn on the device; the seed fixes them, though not the order in which
several workers deliver.
"""

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from torch.utils.data import DataLoader

from ..node.adapter import FAMILIES
from ..node.layout import Format
from ..node.preprocess import PatchGeometry
from ..node.random_checkpoint import build_tokenizer, save_checkpoint
from ..tools.scene_questions import KINDS, corpus
from .batches import Batch, Plan, Streams, make_batch
from .network import SIZES, Losses, Trainee, Verdict, build_config

logger = logging.getLogger(__name__)

MIN_PIXELS, MAX_PIXELS = 84 * 112, 112 * 112

EASY = ("colour_now", "shape_now", "where_now", "what_now", "motion_now", "first", "last", "seen_x", "visible_x")


class Stage(NamedTuple):
    """A part of the training; in the first one the vision tower learns alone, of many more pictures a second."""

    until: float  # share of the whole time
    max_patches: int  # of a stream
    num_questions: int = 16  # of a stream
    kinds: tuple[str, ...] = tuple(KINDS)

    @property
    def only_looks(self) -> bool:
        return self.num_questions == 0

    def plan(self, tokens: int) -> Plan:
        if self.only_looks:
            return Plan(tokens, self.max_patches, self.max_patches // 2, 0, max_rows=384)
        return Plan(tokens, self.max_patches, num_questions=self.num_questions, kinds=self.kinds, max_rows=160)


CURRICULUM = (
    Stage(0.08, 8, num_questions=0),
    Stage(0.13, 4, kinds=EASY),
    Stage(0.38, 16),
    Stage(0.65, 48, num_questions=24),
    Stage(1.0, 96, num_questions=24),
)
PAST_WEIGHT = 0.1
NUM_FIRST = 3  # stages that a trained model need not go through again


def build(seed: int, size: str = "medium", start: Path | None = None) -> tuple[Trainee, Any, Format]:
    """A model, its tokenizer, and the format its prompts have: untrained, or the checkpoint in the folder `start`."""
    torch.manual_seed(seed)
    if start is None:
        tokenizer = build_tokenizer(vocab_size=768, corpus=corpus())
        config = build_config(tokenizer, SIZES[size])
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    else:
        tokenizer = Tokenizer.from_file(str(start / "tokenizer.json"))
        model = transformers.AutoModelForImageTextToText.from_pretrained(start, dtype=torch.float32)
        config = model.config
    model.set_attn_implementation("sdpa")
    family = FAMILIES["qwen2_5_vl"]
    vision = config.vision_config
    geometry = PatchGeometry(
        vision.patch_size,
        vision.spatial_merge_size,
        vision.temporal_patch_size,
        family.image_mean,
        family.image_std,
        MIN_PIXELS,
        MAX_PIXELS,
    )
    form = Format(
        style=family.style,
        tokens_per_second=vision.tokens_per_second,
        system=family.system,
        video_pad=config.video_token_id,
        image_pad=config.image_token_id,
        tokenize=Tokenize(tokenizer, plain=False),
        tokenize_plain=Tokenize(tokenizer, plain=True),
    )
    return Trainee(model, geometry), tokenizer, form


class Tokenize:
    """A tokenizer call that worker processes can be handed; ids of equal texts are remembered."""

    def __init__(self, tokenizer: Any, *, plain: bool) -> None:
        self._tokenizer = tokenizer
        self._plain = plain
        self._known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        if text not in self._known:
            if len(self._known) > 4096:
                self._known.clear()
            # The questions of the corpus hold no special tokens, so both ways of reading are one.
            assert not self._plain or "<|" not in text
            self._known[text] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return self._known[text]


class Schedule:
    """How far the curriculum is in the time that training may take, over all the times it was resumed."""

    def __init__(self, seconds: float, spent_s: float, first: float = 0.0) -> None:
        """`first` is where in the curriculum the time begins, from 0 to 1."""
        self._seconds = seconds
        self._first = first
        self._began = time.monotonic() - spent_s

    @property
    def spent_s(self) -> float:
        return time.monotonic() - self._began

    @property
    def progress(self) -> float:
        """From 0 to 1."""
        return min(1.0, self._first + (1 - self._first) * self.spent_s / self._seconds)


def batches(streams: Streams, workers: int, schedule: Schedule) -> Iterator[tuple[Stage, Batch]]:
    """Batches until the time is up, stage by stage of the curriculum."""
    streams.current.value = stage_at(schedule.progress)
    loader = DataLoader(
        streams,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        prefetch_factor=3 if workers else None,
    )
    for number, batch in loader:
        if schedule.progress >= 1:
            return
        streams.current.value = stage_at(schedule.progress)
        yield CURRICULUM[number], batch


def stage_at(progress: float) -> int:
    """The number of the curriculum's stage at a share of the whole time."""
    return next((i for i, stage in enumerate(CURRICULUM) if progress < stage.until), len(CURRICULUM) - 1)


def _as_it_is(item: Any) -> Any:
    """Torch would turn every array and tuple of a batch into something else."""
    return item


def learning_rate(step: int, progress: float, peak: float) -> float:
    """Linear warm-up, then a cosine to a fiftieth."""
    warm = min(1.0, (step + 1) / 200)
    return peak * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(args: argparse.Namespace) -> None:
    """Train until the time is up, saving state on the way."""
    device = torch.device(args.device)
    trainee, _, form = build(args.seed, args.size, args.start)
    trainee.to(device)
    if args.compile:
        trainee.compile()
    logger.info("%.2f million parameters", sum(p.numel() for p in trainee.model.parameters()) / 1e6)
    optimizer = torch.optim.AdamW(trainee.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    step, spent_s = _resume(args.run, trainee, optimizer, device)
    schedule = Schedule(60 * args.minutes, spent_s, CURRICULUM[NUM_FIRST - 1].until if args.start else 0.0)
    noise = torch.Generator(device).manual_seed(args.seed + step)
    tally = Tally()
    streams = Streams(form, args.seed + step, [stage.plan(args.tokens) for stage in CURRICULUM])
    for stage, batch in tally.waiting(batches(streams, args.workers, schedule)):
        progress = schedule.progress
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, progress, args.lr)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            losses = trainee.look(batch, device, noise) if stage.only_looks else trainee(batch, device, noise)
        sight_weight = 0.5 * max(0.1, 1 - progress / 0.6)
        (losses.answers + sight_weight * losses.sight.sum() + PAST_WEIGHT * losses.past.sum()).backward()
        torch.nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        tally.add(losses)
        if step % args.log_every == 0:
            _log(args.run, step, schedule.spent_s, tally, stage)
            streams.odds[:] = tally.odds()
            tally.clear()
        if step % args.save_every == 0:
            _save(args.run, step, schedule.spent_s, trainee, optimizer)
    _save(args.run, step, schedule.spent_s, trainee, optimizer)
    test = evaluate(trainee, form, device, CURRICULUM[-1].plan(args.tokens), args.seed)
    logger.info("held out, after %d steps: %s", step, json.dumps(test))
    _append(args.run / "log.jsonl", {"held_out": test})


@torch.inference_mode()
def evaluate(
    trainee: Trainee, form: Format, device: torch.device, plan: Plan, seed: int, num_batches: int = 8
) -> dict[str, Any]:
    """Share of answers that are right to the last token, by kind, on held-out stories at full length."""
    rng, noise, tally = np.random.default_rng(seed + 1), torch.Generator(device).manual_seed(seed), Tally()
    for _ in range(num_batches):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            tally.add(trainee(make_batch(form, rng, plan, split="test"), device, noise))
    return tally.shares()


class Tally:
    """Losses and right answers since the last line of the log."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.waited_s = 0.0
        self._losses: list[Losses] = []
        self._verdicts: list[Verdict] = []

    def waiting(self, batches: Iterator[tuple[Stage, Batch]]) -> Iterator[tuple[Stage, Batch]]:
        """The same batches; the time spent waiting for them is noted."""
        while True:
            began = time.monotonic()
            batch = next(batches, None)
            self.waited_s += time.monotonic() - began
            if batch is None:
                return
            yield batch

    def add(self, losses: Losses) -> None:
        self._losses.append(Losses(losses.answers.detach(), losses.sight.detach(), losses.past.detach(), None))
        if losses.verdict is not None:
            self._verdicts.append(losses.verdict)

    def losses(self) -> dict[str, Any]:
        """Their means; `sight` and `past` hold those of the auxiliary heads, in the order of SIGHTS and PAST."""
        answers = torch.stack([losses.answers for losses in self._losses]).mean().item()
        sight = torch.stack([losses.sight for losses in self._losses]).mean(0).tolist()
        past = torch.stack([losses.past for losses in self._losses]).mean(0).tolist()
        return {
            "answers": round(answers, 4),
            "sight": [[round(loss, 3) for loss in head] for head in sight],
            "past": [round(loss, 3) for loss in past],
        }

    def odds(self) -> list[float]:
        """How often to ask each kind from now on: the more often it is answered wrongly."""
        shares = self.shares()
        return [0.2 + 1 - shares.get(kind, 0.0) for kind in KINDS]

    def shares(self) -> dict[str, float]:
        num_right, num_asked = np.zeros(len(KINDS), int), np.zeros(len(KINDS), int)
        for verdict in self._verdicts:
            right, kinds = verdict.by_answer()
            np.add.at(num_right, kinds, right)
            np.add.at(num_asked, kinds, 1)
        shares = {kind: round(r / n, 4) for kind, r, n in zip(KINDS, num_right, num_asked, strict=True) if n}
        return shares | {"all": round(num_right.sum() / max(1, num_asked.sum()), 4)}


def export(run: Path, folder: Path, seed: int, size: str, start: Path | None = None) -> None:
    """Write the trained model as a checkpoint folder: stored in bfloat16, to be run in float32."""
    trainee, tokenizer, _ = build(seed, size, start)
    state = torch.load(run / "state.pt", map_location="cpu", weights_only=True)
    trainee.load_state_dict(state["trainee"])
    save_checkpoint(
        folder, trainee.model, tokenizer, "qwen2_5_vl", pixels=(MIN_PIXELS, MAX_PIXELS), dtype=torch.bfloat16
    )
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


def _resume(run: Path, trainee: Trainee, optimizer: torch.optim.Optimizer, device: torch.device) -> tuple[int, float]:
    """Load the newest state, if there is one; returns the step to go on from and the seconds spent so far."""
    run.mkdir(parents=True, exist_ok=True)
    path = run / "state.pt"
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, map_location=device, weights_only=True)
    trainee.load_state_dict(state["trainee"])
    optimizer.load_state_dict(state["optimizer"])
    logger.info("going on from step %d", state["step"])
    return state["step"], state["spent_s"]


def _save(run: Path, step: int, spent_s: float, trainee: Trainee, optimizer: torch.optim.Optimizer) -> None:
    states = {"trainee": trainee.state_dict(), "optimizer": optimizer.state_dict()}
    state = {"step": step, "spent_s": spent_s, **states}
    torch.save(state, run / "state.tmp")
    (run / "state.tmp").replace(run / "state.pt")


def _log(run: Path, step: int, seconds: float, tally: Tally, stage: Stage) -> None:
    row: dict[str, Any] = {"step": step, "seconds": round(seconds, 1), "waited_s": round(tally.waited_s, 1)}
    row["max_patches"] = stage.max_patches
    row |= tally.losses() | tally.shares()
    logger.info(json.dumps(row))
    _append(run / "log.jsonl", row)


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def main(argv: Iterable[str] | None = None) -> int:
    """Train, or export what is trained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the state and the log")
    parser.add_argument("--minutes", type=float, default=20.0, help="of the whole training, however often resumed")
    parser.add_argument("--tokens", type=int, default=96_000, help="in a batch; less on a small device")
    parser.add_argument("--size", choices=sorted(SIZES), default="medium")
    parser.add_argument("--start", type=Path, metavar="FOLDER", help="the checkpoint to train further; no --size then")
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--save-every", type=int, default=1000)
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="write the checkpoint, train no more")
    args = parser.parse_args(None if argv is None else list(argv))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.export:
        export(args.run, args.export, args.seed, args.size, args.start)
    else:
        train(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
