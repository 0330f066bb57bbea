"""Compiling what lies between two attention calls: once for all layers, lengths and resolutions.

The pieces are functions of tokens by width. The number of tokens is left open, so that a new resolution or chunk
size is never compiled while a stream runs; one token alone is a case of its own.
"""

import logging
import os
import tempfile
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
MAX_VERSIONS = 64  # of one piece in one process
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
        self._tower = tower
        self._language = language
        self._sound = tower.before, tower.after
        self._sound_language = language.before, language.after, language.project, language.join
        self._backend = backend

    def use(self, warm_up: Callable[[], object]) -> bool:
        """Put compiled pieces in place and warm them up; False, with the log saying why, if they fail."""
        logger.info("compiling the model's layers; the first start takes a minute, later ones seconds")
        began = time.monotonic()
        try:
            _prepare()
            self._put_in_place()
            warm_up()
        except Exception:  # a compiler of this size fails in many ways; without it the model is only slower
            logger.warning("the layers cannot be compiled; they run as they are", exc_info=True)
            self.give_up()
            return False
        logger.info("compiled the model's layers in %.1f s", time.monotonic() - began)
        return True

    def _put_in_place(self) -> None:
        tower, language = self._tower, self._language
        tower.before, tower.after = (compiled(piece, self._backend) for piece in (tower.before, tower.after))
        language.before, language.project = (compiled(p, self._backend) for p in (language.before, language.project))
        if language.is_dense:  # experts are transformers' own code, made to be compiled or not
            language.after, language.join = (compiled(p, self._backend) for p in (language.after, language.join))

    def give_up(self) -> None:
        """Run the layers as they are."""
        self._tower.before, self._tower.after = self._sound
        language = self._language
        language.before, language.after, language.project, language.join = self._sound_language

    def finish(self) -> None:
        """From now on what would have to be compiled anew runs as it is, and no stream waits for a compiler."""
        torch.compiler.set_stance("eager_on_recompile")
        probe: Any = torch.compile(_negated, fullgraph=True, backend="eager")
        try:
            probe(torch.zeros(1))
        except RuntimeError:  # torch 2.12 takes a whole graph that is not compiled for an error
            torch.compiler.set_stance("default")


def _negated(x: Tensor) -> Tensor:
    return -x


def _prepare() -> None:
    """Let the compiler compile, and keep what it makes for the next start, where there is a place for it."""
    torch.compiler.set_stance("default")
    # Every model of a process adds its own entries for the same few functions, and the usual limit is 8.
    torch._dynamo.config.recompile_limit = max(MAX_VERSIONS, torch._dynamo.config.recompile_limit)
    if _CACHE_VARIABLE not in os.environ:
        os.environ[_CACHE_VARIABLE] = str(_cache_folder())


def _cache_folder() -> Path:
    try:
        folder = _CACHE_FOLDER.expanduser()  # RuntimeError: this user has no home
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError) as error:
        logger.info("what is compiled is not kept for the next start: %s", error)
        return Path(tempfile.mkdtemp(prefix="onlooker-inductor-"))
    return folder


def compiled(piece: Callable[..., Any], backend: Any = "inductor") -> Callable[..., Any]:
    """A piece compiled for any number of tokens, the first axis of its tensors.

    For one token the compiler makes kernels of its own of the products, and tries out how: they read the weights
    faster than the library's, and what follows a product is part of it.
    """
    fast: Any = torch.compile(piece, fullgraph=True, backend=backend)
    fast_for_one = fast
    if backend == "inductor":
        fast_for_one = torch.compile(piece, fullgraph=True, options={"coordinate_descent_tuning": True})

    def run(*args: Any) -> Any:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        for tensor in tensors:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return (fast_for_one if len(tensors[0]) == 1 else fast)(*args)

    return run
