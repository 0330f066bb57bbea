"""Multiple choice by likelihood: one prefill, the options as one batch on the shared prefix."""

import time
from collections.abc import Sequence

import numpy as np
import torch
from msgspec import UNSET
from torch import Tensor

from ..protocol.messages import AskChoice, Choice, OptionScore
from .answer import timed
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
    question, by_itself = (layout.question(state, request.question) for state in (snapshot.layout, LayoutState()))
    branch.require_room(max(len(tokens) for tokens in (question, by_itself, *options)))
    prefix = branch.prefill(question)
    first_token = time.monotonic()
    seen = _log_probs(branch, prefix, options)
    unseen = _log_probs(branch, branch.prefill_unseen(by_itself), options)
    scores = _scores(request, seen, unseen)
    ranked = np.array([getattr(score, request.rank_by) for score in scores])
    best, *rest = np.argsort(-ranked, kind="stable").tolist()
    return Choice(
        index=best,
        option=request.options[best],
        margin=float(ranked[best] - ranked[rest[0]]) if rest else 0.0,
        rank_by=request.rank_by,
        scores=scores,
        memory=branch.provenance(snapshot),
        timing=timed(arrived, started, first_token),
        notice=model.notice or UNSET,
    )


def _option_ids(model: VisionLanguageModel, option: str) -> list[int]:
    form = model.format
    return [*form.tokenize_plain(option), *form.tokenize(END_OF_TURN)]


def _log_probs(branch: Branch, prefix: Tensor, options: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Log-probability of each token of each option after the branch; prefix (vocabulary,) is its next logits."""
    first = prefix.log_softmax(-1)
    return [row for batch in _batches(options, branch.slot_tokens) for row in _score(branch, first, batch)]


def _batches(options: Sequence[Sequence[int]], max_tokens: int) -> list[list[Sequence[int]]]:
    """Options that are scored together: one that is very long must not make all the others as long as itself."""
    batches: list[list[Sequence[int]]] = []
    for option in options:
        longest = max(map(len, [*batches[-1], option])) if batches else 0
        if batches and longest * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(option)
        else:
            batches.append([option])
    return batches


def _score(branch: Branch, first: Tensor, options: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """See `_log_probs`; first (vocabulary,) is the log-probabilities of every first token."""
    longest = max(len(option) for option in options)
    ids = np.array([[*option, *[0] * (longest - len(option))] for option in options])
    targets = torch.from_numpy(ids).to(first.device)
    log_probs = first[targets[:, :1]]
    if longest > 1:
        later = branch.continuations(ids[:, :-1], ids[:, 1:])
        log_probs = torch.cat([log_probs, later.to(first.device)], dim=1)
    rows = log_probs.cpu().numpy()
    return [row[: len(option)] for row, option in zip(rows, options, strict=True)]


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
