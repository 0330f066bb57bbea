"""The plain way to do it, as the measure of every figure: transformers by itself.

A DynamicCache that grows by concatenation, transformers' own attention, frames made ready on the CPU; and, for those
who keep no cache at all, the whole video encoded anew for each question. Positions are made up: speed does not
depend on them.
"""

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor

from .bench_engine import Frames, Setting
from .bench_report import NAIVE, Case, Row
from .preprocess import PatchGeometry, encode_size, to_patches
from .stopwatch import time_ms, wait_for

QUESTION_TOKENS = 20


class NaiveBench:
    """Measures transformers' own model; every verb returns rows, and raises what torch raises."""

    def __init__(self, network: Any, name: str, geometry: PatchGeometry) -> None:
        self._network = network
        self._core = network.model
        self._name = name
        self._device = self._core.get_input_embeddings().weight.device
        self._geometry = geometry
        self._seen: set[Setting] = set()  # what does not depend on the history is reported once

    def num_chunk_tokens(self, setting: Setting) -> int:
        rows, columns = self._geometry.grid(self._size(setting))
        return rows * columns * -(-setting.chunk_frames // self._geometry.temporal_patch)

    def chunk(self, setting: Setting, history: int) -> list[Row]:
        """The stages of a chunk, and all of them together, over a history."""
        frames, num_tokens = self._pixels(setting, setting.chunk_frames), self.num_chunk_tokens(setting)
        patches = self._ready(frames, setting)
        vision = self._see(patches, setting)
        embeds = self._embeds(vision)
        cache = self._cache(history)

        def whole() -> None:
            seen = self._see(self._ready(frames, setting), setting)
            self._append(cache, self._embeds(seen), seen)

        def row(stage: str, over: int, call: Callable[[], object]) -> Row:
            ms = time_ms(self._device, call, num_calls=3)
            return Row(self._case(stage, setting, over), NAIVE, ms=ms, num_tokens=num_tokens)

        chunk = row("chunk", history, whole)
        assert chunk.ms is not None
        rows = [
            row("prefill", history, lambda: self._append(cache, embeds, vision)),
            replace(chunk, rate=setting.chunk_frames / chunk.ms * 1e3, unit="frames/s"),
        ]
        if setting in self._seen:
            return rows
        self._seen.add(setting)
        return [
            row("preprocess", 0, lambda: self._ready(frames, setting)),
            row("vision tower", 0, lambda: self._see(patches, setting)),
            *rows,
        ]

    def token(self, history: int, num_answers: int) -> list[Row]:
        """One more token; several answers are a batch, each with a copy of the whole history."""
        cache = self._cache(history, num_answers)
        embeds = self._noise(num_answers, 1)
        ms = time_ms(self._device, lambda: self._logits(cache, embeds))
        case = Case(self._name, "decoded token", history=history, num_answers=num_answers)
        return [Row(case, NAIVE, ms=ms, rate=num_answers / ms * 1e3, unit="tokens/s", num_tokens=num_answers)]

    def first_token(self, history: int) -> list[Row]:
        """A question read over the cache."""
        cache, embeds = self._cache(history), self._noise(1, QUESTION_TOKENS)
        ms = time_ms(self._device, lambda: self._logits(cache, embeds))
        case = Case(self._name, "first token", history=history, num_answers=1)
        return [Row(case, NAIVE, ms=ms, num_tokens=QUESTION_TOKENS)]

    def snapshot(self, history: int) -> list[Row]:
        """A deep copy of the cache, so that a question can be taken back."""
        cache = self._cache(history)
        ms = time_ms(self._device, lambda: copy.deepcopy(cache), num_calls=3)
        num_bytes = sum(t.nbytes for key, value, *_ in cache for t in (key, value) if t is not None)
        case = Case(self._name, "snapshot + restore", history=history)
        return [Row(case, NAIVE, ms=ms, num_bytes=num_bytes, note=f"copies {num_bytes} bytes")]

    def whole_video(self, setting: Setting, history: int) -> list[Row]:
        """First token of a question for which the whole video that made the history is encoded anew."""
        num_chunks = max(1, history // self.num_chunk_tokens(setting))
        num_frames = num_chunks * setting.chunk_frames

        def ask() -> None:
            frames = self._pixels(setting, setting.chunk_frames)
            patches = torch.cat([self._ready(frames, setting) for _ in range(num_chunks)])
            seen = self._see(patches, setting, num_chunks)
            video = self._embeds(seen)
            self._logits(transformers.DynamicCache(), torch.cat([video, self._noise(1, QUESTION_TOKENS)], dim=1), seen)

        ms = time_ms(self._device, ask, num_calls=1)
        case = self._case("first token, whole video anew", setting, history)
        num_tokens = num_chunks * self.num_chunk_tokens(setting)
        return [Row(case, NAIVE, ms=ms, num_tokens=num_tokens, note=f"{num_frames} frames")]

    def _size(self, setting: Setting) -> tuple[int, int]:
        return encode_size(setting.received, self._geometry, explicit=setting.encode_size)

    def _case(self, stage: str, setting: Setting, history: int) -> Case:
        encoded = "x".join(map(str, self._size(setting)))
        return Case(self._name, stage, encoded, setting.chunk_frames, history)

    def _pixels(self, setting: Setting, num: int) -> Tensor:
        pictures = Frames(Setting(setting.received, setting.encode_size, num)).chunk().pictures
        return torch.stack([torch.from_numpy(picture.pixels) for picture in pictures])

    def _ready(self, frames: Tensor, setting: Setting) -> Tensor:
        """As a processor does: resized, normalised and cut up on the CPU, then moved as floating point."""
        return to_patches(frames, self._size(setting), self._geometry).to(self._device)

    @torch.inference_mode()
    def _see(self, patches: Tensor, setting: Setting, num_chunks: int = 1) -> Any:
        width, height = self._size(setting)
        temporal = num_chunks * -(-setting.chunk_frames // self._geometry.temporal_patch)
        grid = torch.tensor(
            [[temporal, height // self._geometry.patch, width // self._geometry.patch]], device=self._device
        )
        return self._core.visual(patches.to(self._core.visual.dtype), grid_thw=grid, return_dict=True)

    def _embeds(self, seen: Any) -> Tensor:
        return seen.pooler_output[None].to(self._network.dtype)

    def _noise(self, num_rows: int, num_tokens: int) -> Tensor:
        hidden = self._network.config.text_config.hidden_size
        return torch.randn(num_rows, num_tokens, hidden, device=self._device).to(self._network.dtype)

    def _cache(self, history: int, num_rows: int = 1) -> transformers.DynamicCache:
        """As many keys and values of noise."""
        text, cache = self._network.config.text_config, transformers.DynamicCache()
        if history == 0:
            return cache
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        shape = (num_rows, text.num_key_value_heads, history, head_dim)
        for layer in range(text.num_hidden_layers):
            key, value = (torch.randn(shape, device=self._device, dtype=self._network.dtype) for _ in range(2))
            cache.update(key, value, layer)
        return cache

    @torch.inference_mode()
    def _append(self, cache: transformers.DynamicCache, embeds: Tensor, seen: Any = None) -> Tensor:
        """Read tokens over a cache, and take them out of it again."""
        num_rows, num_tokens, _ = embeds.shape
        start = cache.get_seq_length()
        positions = torch.arange(start, start + num_tokens, device=self._device).expand(3, num_rows, -1)
        deepstack = getattr(seen, "deepstack_features", None)
        extra: dict[str, Any] = {}
        if deepstack:
            mask = torch.zeros(1, num_tokens, dtype=torch.bool, device=self._device)
            mask[:, : len(deepstack[0])] = True
            extra = {"visual_pos_masks": mask, "deepstack_visual_embeds": list(deepstack)}
        out = self._core.language_model(
            inputs_embeds=embeds, position_ids=positions, past_key_values=cache, use_cache=True, **extra
        )
        cache.crop(-num_tokens)
        return out.last_hidden_state

    @torch.inference_mode()
    def _logits(self, cache: transformers.DynamicCache, embeds: Tensor, seen: Any = None) -> Tensor:
        return self._network.lm_head(self._append(cache, embeds, seen)[:, -1:])


@contextmanager
def released(device: torch.device) -> Iterator[None]:
    """Give the device its memory back afterwards."""
    try:
        yield
    finally:
        gc.collect()
        wait_for(device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
