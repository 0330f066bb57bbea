"""Train the built-in model from nothing.

    python -m onlooker.training.train RUN --steps 6000         on a GPU; minutes on an H200
    python -m onlooker.training.train RUN --steps 6000         again: goes on where RUN/state.pt stands
    python -m onlooker.training.train RUN --export node/builtin

The curriculum widens the streams: RUN/log.jsonl keeps loss and accuracy by kind of question. Batches are made
on the CPU by worker processes and drawn on the device; the seed fixes them, though not the order in which
several workers deliver.
"""

import argparse
import itertools
import json
import logging
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.data import DataLoader

from ..node.adapter import FAMILIES
from ..node.layout import Format
from ..node.preprocess import PatchGeometry
from ..node.random_checkpoint import build_tokenizer, save_checkpoint
from ..tools.scene_questions import KINDS, corpus
from .batches import Batch, Plan, Streams, make_batch
from .network import SIZES, Trainee, build_config

logger = logging.getLogger(__name__)

MIN_PIXELS, MAX_PIXELS = 84 * 112, 112 * 112

# Up to which share of the steps streams stay below so many temporal patches.
CURRICULUM = ((0.12, 4), (0.3, 16), (0.65, 48), (1.0, 96))
EASY = ("colour_now", "shape_now", "where_now", "what_now", "motion_now", "first", "last", "seen_x", "visible_x")


def build(seed: int, size: str = "medium") -> tuple[Trainee, Any, Format]:
    """An untrained model, its tokenizer, and the format its prompts have."""
    tokenizer = build_tokenizer(vocab_size=768, corpus=corpus())
    config = build_config(tokenizer, SIZES[size])
    torch.manual_seed(seed)
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
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


def plan_at(progress: float, tokens: int, longest: int = CURRICULUM[-1][1]) -> Plan:
    """How hard streams may be at a share of the training, 0 to 1; tokens a batch, never over `longest` patches."""
    max_patches = min(longest, next(patches for until, patches in CURRICULUM if progress <= until))
    return Plan(tokens, max_patches, kinds=EASY if progress <= CURRICULUM[0][0] else tuple(KINDS))


def batches(form: Format, args: argparse.Namespace, start: int) -> Iterator[Batch]:
    """The batches of all steps from `start` on, stage by stage of the curriculum."""
    step = start
    for until, _ in CURRICULUM:
        stop = round(until * args.steps)
        if step >= stop:
            continue
        streams = Streams(form, args.seed + step, plan_at((step + 1) / args.steps, args.tokens, args.max_patches))
        loader = DataLoader(
            streams,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=args.workers,
            prefetch_factor=4 if args.workers else None,
        )
        yield from itertools.islice(loader, stop - step)
        step = stop


def _as_it_is(batch: Any) -> Batch:
    """Torch would turn every array and tuple of a batch into something else."""
    return batch


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine to a twentieth."""
    warm = min(1.0, (step + 1) / 200)
    return args.lr * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))


def train(args: argparse.Namespace) -> None:
    """Train to the last step, saving state on the way."""
    device = torch.device(args.device)
    trainee, _, form = build(args.seed, args.size)
    trainee.to(device)
    logger.info("%.2f million parameters", sum(p.numel() for p in trainee.model.parameters()) / 1e6)
    optimizer = torch.optim.AdamW(trainee.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.02)
    start = _resume(args.run, trainee, optimizer, device)
    noise = torch.Generator(device).manual_seed(args.seed)
    tally, began = Tally(), time.monotonic()
    for step, batch in enumerate(tally.waiting(batches(form, args, start)), start):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            losses = trainee(batch, device, noise)
        sight_weight = 0.5 * max(0.1, 1 - step / (0.5 * args.steps))
        (losses.answers + sight_weight * losses.sight).backward()
        torch.nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tally.add(losses)
        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            _log(
                args.run,
                step + 1,
                time.monotonic() - began,
                tally,
                plan_at((step + 1) / args.steps, args.tokens, args.max_patches),
            )
            tally.clear()
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps or time.monotonic() - began > args.seconds:
            _save(args.run, step + 1, trainee, optimizer)
        if time.monotonic() - began > args.seconds:
            logger.info("stopped at step %d, the time is up", step + 1)
            break
    test = evaluate(trainee, form, device, plan_at(1.0, args.tokens, args.max_patches), args.seed)
    logger.info("held out: %s", json.dumps(test))
    _append(args.run / "log.jsonl", {"held_out": test})


@torch.inference_mode()
def evaluate(
    trainee: Trainee, form: Format, device: torch.device, plan: Plan, seed: int, num_batches: int = 24
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
        self._losses: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._right = np.zeros(len(KINDS), int)
        self._asked = np.zeros(len(KINDS), int)

    def waiting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; the time spent waiting for them is noted."""
        while True:
            began = time.monotonic()
            batch = next(batches, None)
            self.waited_s += time.monotonic() - began
            if batch is None:
                return
            yield batch

    def add(self, losses: Any) -> None:
        self._losses.append((losses.answers.detach(), losses.sight.detach()))
        np.add.at(self._right, losses.kinds, losses.right)
        np.add.at(self._asked, losses.kinds, 1)

    def losses(self) -> dict[str, float]:
        answers, sight = (torch.stack(column).mean().item() for column in zip(*self._losses, strict=True))
        return {"answers": round(answers, 4), "sight": round(sight, 4)}

    def shares(self) -> dict[str, float]:
        shares = {k: round(r / n, 4) for k, r, n in zip(KINDS, self._right, self._asked, strict=True) if n}
        return shares | {"all": round(self._right.sum() / max(1, self._asked.sum()), 4)}


def export(run: Path, folder: Path, seed: int, size: str) -> None:
    """Write the trained model as a checkpoint folder, bfloat16."""
    trainee, tokenizer, _ = build(seed, size)
    state = torch.load(run / "state.pt", map_location="cpu", weights_only=True)
    trainee.load_state_dict(state["trainee"])
    save_checkpoint(
        folder, trainee.model, tokenizer, "qwen2_5_vl", pixels=(MIN_PIXELS, MAX_PIXELS), dtype=torch.bfloat16
    )


def _resume(run: Path, trainee: Trainee, optimizer: torch.optim.Optimizer, device: torch.device) -> int:
    """Load the newest state, if there is one; returns the step to go on from."""
    run.mkdir(parents=True, exist_ok=True)
    path = run / "state.pt"
    if not path.exists():
        return 0
    state = torch.load(path, map_location=device, weights_only=True)
    trainee.load_state_dict(state["trainee"])
    optimizer.load_state_dict(state["optimizer"])
    logger.info("going on from step %d", state["step"])
    return state["step"]


def _save(run: Path, step: int, trainee: Trainee, optimizer: torch.optim.Optimizer) -> None:
    state = {"step": step, "trainee": trainee.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, run / "state.tmp")
    (run / "state.tmp").replace(run / "state.pt")


def _log(run: Path, step: int, seconds: float, tally: Tally, plan: Plan) -> None:
    row: dict[str, Any] = {"step": step, "seconds": round(seconds, 1), "waited_s": round(tally.waited_s, 1)}
    row["max_patches"] = plan.max_patches
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
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop, saved, after so long")
    parser.add_argument("--tokens", type=int, default=96_000, help="in a batch; less on a small device")
    parser.add_argument("--size", choices=sorted(SIZES), default="medium")
    parser.add_argument("--max-patches", type=int, default=CURRICULUM[-1][1], help="the longest streams")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--save-every", type=int, default=1000)
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="write the checkpoint, train no more")
    args = parser.parse_args(None if argv is None else list(argv))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.export:
        export(args.run, args.export, args.seed, args.size)
    else:
        train(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
