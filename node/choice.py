"""Multiple choice by likelihood: one prefill, all options as one batch on the shared prefix."""

import time
from collections.abc import Sequence

import numpy as np
import torch
from msgspec import UNSET
from torch import Tensor

from ..protocol.messages import AnswerTiming, AskChoice, Choice, OptionScore
from .branch import Branch
from .layout import LayoutState
from .model import VisionLanguageModel

END_OF_TURN = "<|im_end|>"


def choose(model: VisionLanguageModel, branch: Branch, request: AskChoice, *, arrived: float) -> Choice:
    """Score the options of a question against each other. Raises NodeError TOO_LARGE.

    An option is scored with the end of the turn after it, so that an option which begins another one competes
    with it fairly. The calibrated score takes away what the same words would score had nothing been seen
    (Holtzman et al. 2021, arXiv 2104.08315).
    """
    started = time.monotonic()
    snapshot, layout = branch.snapshot, branch.memory.layout
    options = [_option_ids(model, option) for option in request.options]
    branch.require_room(max(len(option) for option in options))
    prefix = branch.prefill(layout.question(snapshot.layout, request.question))
    first_token = time.monotonic()
    seen = _log_probs(branch, prefix, options)
    prefix = branch.prefill_unseen(layout.question(LayoutState(), request.question))
    unseen = _log_probs(branch, prefix, options)
    scores = _scores(request, seen, unseen)
    ranked = np.array([getattr(score, request.rank_by) for score in scores])
    best, *rest = np.argsort(-ranked, kind="stable").tolist()
    ended = time.monotonic()
    return Choice(
        index=best,
        option=request.options[best],
        margin=float(ranked[best] - ranked[rest[0]]) if rest else 0.0,
        rank_by=request.rank_by,
        scores=scores,
        memory=branch.provenance(snapshot),
        timing=AnswerTiming(
            queue_ms=(started - arrived) * 1e3,
            prefill_ms=(first_token - started) * 1e3,
            first_token_ms=(first_token - arrived) * 1e3,
            decode_ms=(ended - first_token) * 1e3,
            total_ms=(ended - arrived) * 1e3,
        ),
        notice=model.notice or UNSET,
    )


def _option_ids(model: VisionLanguageModel, option: str) -> list[int]:
    form = model.format
    return [*form.tokenize_plain(option), *form.tokenize(END_OF_TURN)]


def _log_probs(branch: Branch, prefix: Tensor, options: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Log-probability of each token of each option after the branch; prefix (vocabulary,) is its next logits."""
    longest = max(len(option) for option in options)
    ids = np.array([[*option, *[0] * (longest - len(option))] for option in options])
    later = branch.continuations(ids[:, :-1])  # (batch, longest - 1, vocabulary)
    first = prefix.expand(len(options), 1, -1)
    log_probs = torch.cat([first, later], dim=1).log_softmax(-1)
    chosen = log_probs.gather(-1, torch.from_numpy(ids).to(log_probs.device)[..., None])[..., 0].cpu().numpy()
    return [row[: len(option)] for row, option in zip(chosen, options, strict=True)]


def _scores(request: AskChoice, seen: list[np.ndarray], unseen: list[np.ndarray]) -> list[OptionScore]:
    raw = [float(row.sum()) for row in seen]
    normalized = [float(row.mean()) for row in seen]
    calibrated = [mean - float(row.mean()) for mean, row in zip(normalized, unseen, strict=True)]
    ranked = np.array({"raw": raw, "normalized": normalized, "calibrated": calibrated}[request.rank_by])
    odds = np.exp(ranked - ranked.max())
    return [
        OptionScore(
            option=option,
            num_tokens=len(seen[i]),
            raw=raw[i],
            normalized=normalized[i],
            calibrated=calibrated[i],
            probability=float(odds[i] / odds.sum()),
        )
        for i, option in enumerate(request.options)
    ]
