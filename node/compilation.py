"""Compiling what lies between two attention calls: once for all layers, lengths and resolutions.

The pieces are functions of tokens by width. The number of tokens is left open, so that a new resolution or chunk
size is never compiled while a stream runs; one token alone is a case of its own.
"""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .language import LanguageModel
from .vision import VisionTower

logger = logging.getLogger(__name__)

CompileSetting = Literal["auto", "on", "off"]

MIN_WEIGHTS_BYTES = 1 << 30  # below it a model is launched faster than it could be compiled
_CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
_CACHE_FOLDER = Path("~/.cache/onlooker/inductor")


def should_compile(setting: CompileSetting, device: torch.device, weights_bytes: int) -> bool:
    """What "auto" means: large models on a GPU."""
    if setting == "auto":
        return device.type == "cuda" and weights_bytes >= MIN_WEIGHTS_BYTES
    return setting == "on"


class Compilation:
    """The compiled pieces of a model; they are compiled at their first use, while `warm_up` runs."""

    def __init__(self, tower: VisionTower, language: LanguageModel, backend: Any = "inductor") -> None:
        self._models = (tower, language)
        self._sound = [(model.before, model.after) for model in self._models]
        self._backend = backend

    def use(self, warm_up: Callable[[], object]) -> bool:
        """Put compiled pieces in place and warm them up; False, with the log saying why, if they fail."""
        os.environ.setdefault(_CACHE_VARIABLE, str(_CACHE_FOLDER.expanduser()))
        logger.info("compiling the model's layers; the first start takes a minute, later ones seconds")
        began = time.monotonic()
        for model in self._models:
            model.before = compiled(model.before, self._backend)
            model.after = compiled(model.after, self._backend)
        try:
            warm_up()
        except Exception:  # a compiler of this size fails in many ways; without it the model is only slower
            logger.warning("the layers cannot be compiled; they run as they are", exc_info=True)
            for model, (before, after) in zip(self._models, self._sound, strict=True):
                model.before, model.after = before, after
            return False
        logger.info("compiled the model's layers in %.1f s", time.monotonic() - began)
        return True


def compiled(piece: Callable[..., Any], backend: Any = "inductor") -> Callable[..., Any]:
    """A piece compiled for any number of tokens, the first axis of its tensors."""
    fast: Any = torch.compile(piece, fullgraph=True, backend=backend)

    def run(*args: Any) -> Any:
        for arg in args:
            if isinstance(arg, Tensor):
                torch._dynamo.maybe_mark_dynamic(arg, 0)
        return fast(*args)

    return run
