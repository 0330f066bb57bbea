"""A vision-language model of transformers, reduced to what a memory needs of it."""

import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from .adapter import Family, family_of, require_known
from .arena import KVShape, Turn
from .attention import MemoryPass, long_kernel
from .graphs import Recorded
from .language import LanguageModel
from .layout import Format, Span
from .pace import Pace
from .passes import Together
from .pieces import MAX_TOKENS, Pieces
from .preprocess import PatchGeometry, to_patches
from .token_drop import Sifted
from .upload import upload
from .vision import Vision, VisionTower, align_mlps

MAX_GRIDS = 6  # of small chunks, recorded at a time: two of streams, alone, in twos and in fours

BUILTIN = Path(__file__).parent / "builtin"
NOTICE_FILE = "notice.txt"
SMALL_MODEL_BYTES = 64 << 20
DTYPES = ("auto", "float32", "bfloat16", "float16")


# Called between two layers of a chunk; returns the seconds in which the device worked for others.
Between = Callable[[], float]

# Chooses what the language model reads of a chunk.
Sift = Callable[[Span, Vision], Sifted]


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Milliseconds that the stages of one chunk took."""

    preprocess_ms: float
    vision_ms: float
    prefill_ms: float


class Part(NamedTuple):
    """One memory's chunk: its frames, its tokens, what these see and where they go."""

    frames: Sequence[np.ndarray] | Tensor  # (height, width, 3) each, uint8, or all of them as one on the device
    span: Span
    memory: MemoryPass
    sift: Sift | None = None  # chooses the tokens that the language model reads


class Encoding(NamedTuple):
    """What encoding a chunk took, and what the tower made of its pictures."""

    times: StageTimes
    vision: Vision  # with the tokens that were not read


class VisionLanguageModel:
    """The model, its tokenizer, and calls that take explicit positions and an explicit pass.

    Positions are never derived by transformers, nor does it keep any cache: a `MemoryPass` decides what each
    call sees and writes. Not thread-safe: one thread may use it.
    """

    def __init__(self, model: Any, tokenizer: Any, *, name: str, processor: dict[str, Any], notice: str | None):
        self._model = model.eval()
        self._core = model.model
        self.config = model.config
        self.family: Family = family_of(self.config)
        self.tokenizer = tokenizer
        self.name = name
        self.notice = notice
        self.geometry = _geometry(self.config.vision_config, self.family, processor)
        self.kv_shape = self._kv_shape()
        self.tower = VisionTower(self._core.visual)
        self._is_tower_whole = self.tower.is_whole  # if not, transformers' own forward finds its way over devices
        if self.device.type == "cuda" and self._is_tower_whole:
            align_mlps(self._core.visual)
        self.language = LanguageModel(self._core.language_model, self.config.text_config)
        self.pieces: Pieces | None = None  # what reads small chunks, where there are CUDA graphs

    @property
    def dtype(self) -> torch.dtype:
        return self._model.dtype

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the embeddings."""
        return self._core.get_input_embeddings().weight.device

    @property
    def generation_config(self) -> Any:
        return self._model.generation_config

    @property
    def max_positions(self) -> int:
        """The context length that the checkpoint states."""
        return self.config.text_config.max_position_embeddings

    @property
    def weights_bytes(self) -> int:
        tensors = [*self._model.parameters(), *self._model.buffers()]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())

    @property
    def format(self) -> Format:
        """How prompts of this model look: see `layout`."""
        vision = self.config.vision_config
        return Format(
            style=self.family.style,
            tokens_per_second=vision.tokens_per_second if self.family.clocked else None,
            system=self.family.system,
            video_pad=self.config.video_token_id,
            image_pad=self.config.image_token_id,
            tokenize=lambda text: self.tokenizer.encode(text, add_special_tokens=False),
            tokenize_plain=lambda text: self.tokenizer.encode(
                text, add_special_tokens=False, split_special_tokens=True
            ),
        )

    @torch.inference_mode()
    def see(self, patches: Tensor, grid: tuple[int, int, int], between: Callable[[], None] | None = None) -> Vision:
        """Run the vision tower over patches of one chunk; grid is (temporal, height, width) in patches.

        `between` is called between two layers, if the tower lies on one device.
        """
        if not self._is_tower_whole:
            grid_thw = torch.tensor([grid], device=patches.device)
            out = self._core.visual(patches.to(self._core.visual.dtype), grid_thw=grid_thw, return_dict=True)
            return Vision(out.pooler_output, getattr(out, "deepstack_features", None))
        return self.tower.see(patches, grid, between)

    @torch.inference_mode()
    def read(
        self,
        span: Span,
        memory: MemoryPass,
        vision: Vision | None = None,
        between: Callable[[], None] | None = None,
    ) -> Tensor:
        """Run the language model over one span; returns its hidden states (n, hidden).

        `between` is called between two layers.
        """
        embeds = self.embed(torch.from_numpy(span.ids).to(self.device))[None]
        deepstack: list[Tensor] = []
        if vision is not None:
            rows = torch.from_numpy(np.flatnonzero(span.visual)).to(self.device)
            embeds[0, rows] = vision.embeds.to(embeds)
            for features in vision.deepstack or ():
                added = torch.zeros_like(embeds)
                added[0, rows] = features.to(embeds)
                deepstack.append(added)
        positions = torch.from_numpy(span.positions).to(self.device)[:, None]
        # Chunks come one after the other. A question may come in the middle of one, whose buffers the pieces hold.
        is_recorded = vision is not None and vision.is_whole  # a size that seldom comes again is not worth a graph
        if is_recorded and self.pieces is not None and len(span) <= MAX_TOKENS:
            hidden = self.pieces.run(embeds, positions, memory, deepstack, between)
            if hidden is not None:
                return hidden[0]
        return self.language.run(embeds, positions, memory, deepstack, between)[0]

    @torch.inference_mode()
    def read_batch(self, ids: np.ndarray, positions: np.ndarray, memory: MemoryPass) -> Tensor:
        """Run the language model over rows of text: ids and positions (batch, n).

        Text has one position on all three axes. Returns hidden states (batch, n, hidden).
        """
        embeds = self.embed(torch.from_numpy(ids).to(self.device))
        axes = torch.from_numpy(positions).to(self.device).expand(3, -1, -1)
        return self.language.run(embeds, axes, memory)

    @torch.inference_mode()
    def turn(self, start: int, stop: int, positions: tuple[int, int, int]) -> Turn:
        """What turns the keys of some rows of a memory on by so many positions on each axis."""
        return Turn(start, stop, *self.language.rotation(positions))

    @torch.inference_mode()
    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings (..., hidden) of token ids on the device."""
        return self._core.get_input_embeddings()(ids)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits (..., vocabulary), float32."""
        return self._model.lm_head(hidden).float()

    @torch.inference_mode()
    def encode(self, parts: Sequence[Part], size: tuple[int, int], between: Between | None = None) -> list[Encoding]:
        """Pixels to memories: preprocess, vision tower, prefill, of chunks of several memories at once.

        All are encoded at one size, (width, height). What runs in `between` is no part of the times, of which each
        part has its share.
        """
        watch, pause = self._watched(between)
        patches = [to_patches(self._uploaded(part.frames), size, self.geometry) for part in parts]
        watch.lap()
        height, width = (side // self.geometry.patch for side in reversed(size))
        num_patches = sum(map(len, patches))
        # To the tower, temporal patches are apart in any case: whose they are is nothing to it.
        seen = self.see(_joined(patches), (num_patches // (height * width), height, width), pause)
        visions = seen.split([int(part.span.visual.sum()) for part in parts]) if len(parts) > 1 else [seen]
        sifted = [
            Sifted(part.span, vision) if part.sift is None else part.sift(part.span, vision)
            for part, vision in zip(parts, visions, strict=True)
        ]
        watch.lap()
        memories = [(part.memory, len(span)) for part, (span, _) in zip(parts, sifted, strict=True)]
        self.read(
            Span.joined([span for span, _ in sifted]),
            memories[0][0] if len(parts) == 1 else Together(memories),
            Vision.joined([vision for _, vision in sifted]),
            pause,
        )
        watch.lap()
        times = StageTimes(*(lap_ms / len(parts) for lap_ms in watch.laps_ms()))
        return [Encoding(times, vision) for vision in visions]

    def encode_again(self, vision: Vision, span: Span, memory: MemoryPass, between: Between | None = None) -> float:
        """`encode` of what the tower has seen before; returns the milliseconds of the prefill."""
        watch, pause = self._watched(between)
        self.read(span, memory, vision, pause)
        watch.lap()
        return watch.laps_ms()[0]

    def _uploaded(self, frames: Sequence[np.ndarray] | Tensor) -> Tensor:
        return frames if isinstance(frames, Tensor) else upload(frames, self.device)

    def _watched(self, between: Between | None) -> tuple["_Stopwatch", "_Pause | None"]:
        """A watch that was started, and what comes between two layers."""
        watch = _Stopwatch({self.device, *self.kv_shape.layer_devices})
        return watch, None if between is None else _Pause(between, Pace(self.device), watch)

    def choose_kernels(self) -> None:
        """Measure now what is measured at its first use."""
        shape = self.kv_shape
        group = self.language.num_heads // shape.num_kv_heads
        long_kernel(self.device, shape.dtype, shape.num_kv_heads, group, shape.head_dim)

    def record_chunks(self) -> bool:
        """Have small chunks run as CUDA graphs, recorded when the first of a size comes; False where it can't be."""
        if self.device.type != "cuda" or not (self._is_tower_whole and self.language.is_whole):
            return False
        self.tower.recorded = Recorded("chunks of the grid", MAX_GRIDS)
        if self.language.is_dense:  # experts wait for the device
            self.pieces = Pieces(self.language)
        return True

    def launch_chunks(self) -> None:
        """Have all chunks run kernel by kernel."""
        self.tower.recorded, self.pieces = None, None

    def wait(self) -> None:
        """Wait until its GPUs have done all that this thread gave them."""
        for device in {self.device, *self.kv_shape.layer_devices}:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()

    def _kv_shape(self) -> KVShape:
        text = self.config.text_config
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        layers = self._core.language_model.layers
        devices = tuple(layer.self_attn.k_proj.weight.device for layer in layers)
        return KVShape(text.num_key_value_heads, head_dim, self.dtype, devices)


def _joined(patches: Sequence[Tensor]) -> Tensor:
    return patches[0] if len(patches) == 1 else torch.cat(list(patches))


class _Stopwatch:
    """Laps on a GPU's own clock; on the CPU, or over several GPUs, on the host's with the devices waited for."""

    def __init__(self, devices: set[torch.device]) -> None:
        self._gpus = [device for device in devices if device.type == "cuda"]
        self._has_events = len(self._gpus) == 1
        self._marks = [self._mark()]
        self._left_out_ms = [0.0]  # of each lap

    def lap(self) -> None:
        self._marks.append(self._mark())
        self._left_out_ms.append(0.0)

    def leave_out(self, seconds: float) -> None:
        """Take a time off the present lap in which the devices worked for others."""
        self._left_out_ms[-1] += seconds * 1e3

    def laps_ms(self) -> list[float]:
        """Milliseconds of each lap; waits for the device."""
        if self._has_events:
            self._marks[-1].synchronize()
            laps = [a.elapsed_time(b) for a, b in zip(self._marks, self._marks[1:], strict=False)]
        else:
            laps = [(b - a) * 1e3 for a, b in zip(self._marks, self._marks[1:], strict=False)]
        return [lap - left_out for lap, left_out in zip(laps, self._left_out_ms, strict=False)]

    def _mark(self) -> Any:
        if not self._has_events:
            for gpu in self._gpus:
                torch.cuda.synchronize(gpu)
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._gpus[0]))
        return event


class _Pause:
    """What a chunk does between two of its layers: keep the host's pace, and let others work."""

    def __init__(self, between: Between, pace: Pace, watch: _Stopwatch) -> None:
        self._between = between
        self._pace = pace
        self._watch = watch

    def __call__(self) -> None:
        self._pace.keep()
        self._watch.leave_out(self._between())


def load_model(name: str, *, dtype: str = "auto", device: str = "auto") -> VisionLanguageModel:
    """Load a checkpoint: "builtin", a local folder, or a hub id.

    device is "auto" (CUDA if there is one), "cpu", "cuda", "cuda:N", or "balanced", which lets accelerate
    spread the layers over all GPUs. Raises UnsupportedModelError before any weight is read, OSError when there
    is no such checkpoint or it lacks weights, ValueError for a dtype or device that cannot be had.
    """
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # it would tear the lines of a log
    path = _checkpoint(name)
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    stated, _ = transformers.PreTrainedConfig.get_config_dict(path)
    if not stated:
        raise FileNotFoundError(f"{name} has no config.json")
    # Before transformers, which refuses a type that it does not know without a word on what is supported here.
    require_known(stated.get("model_type"))
    family_of(transformers.AutoConfig.from_pretrained(path))
    device = resolve_device(device)
    placement = device if device == "balanced" else {"": device}
    loaded: Any = transformers.AutoModelForImageTextToText.from_pretrained(
        path,
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        device_map=placement,
        output_loading_info=True,
    )
    model, loading = loaded
    if num_meta := sum(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(f"{name} does not fit: accelerate would keep {num_meta} of its weights off the GPUs")
    if missing := sorted(loading["missing_keys"]):  # transformers would go on with random values
        raise OSError(f"{name} lacks {len(missing)} weights, such as {missing[0]}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    return VisionLanguageModel(model, tokenizer, name=name, processor=_processor_config(path), notice=_notice(path))


def use_few_threads(model: VisionLanguageModel) -> None:
    """Run a very small model on one CPU thread, in the whole process.

    Its operations are over before other threads have woken up; on a busy machine, waiting for them costs ten times
    the work itself (measured: 165 s against 15.5 s for the exactness gate).
    """
    if model.device.type == "cpu" and model.weights_bytes < SMALL_MODEL_BYTES:
        torch.set_num_threads(1)


def _checkpoint(name: str) -> str:
    """Folder or hub id of a checkpoint. A path that is not there is not looked for on the hub."""
    if name == "builtin":
        return str(BUILTIN)
    # A hub id is owner/name; anything else can only be a folder.
    is_path = name.startswith((".", "/", "~")) or name.count("/") != 1
    folder = Path(name).expanduser()
    if is_path and not folder.is_dir():
        raise FileNotFoundError(f'there is no checkpoint folder {name}; a model is a folder, owner/name, or "builtin"')
    return str(folder) if is_path else name


def resolve_device(device: str) -> str:
    """What a setting names; "auto" is CUDA, if there is any. Raises ValueError for a device that cannot be had."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|balanced|cuda(:[0-9]+)?", device):
        raise ValueError(f"a device is auto, cpu, cuda, cuda:N or balanced, got {device}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {device}: torch {torch.__version__} finds no CUDA device")
    return device


def _processor_config(path: str) -> dict[str, Any]:
    """The checkpoint's preprocessor_config.json, {} if it has none."""
    file = cached_file(path, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    return json.loads(Path(file).read_text()) if file else {}


def _notice(path: str) -> str | None:
    """What a checkpoint folder wants said with every answer."""
    file = Path(path) / NOTICE_FILE
    return file.read_text().strip() if file.is_file() else None


def _geometry(vision: Any, family: Family, processor: dict[str, Any]) -> PatchGeometry:
    size = processor.get("size") or {}
    return PatchGeometry(
        patch=vision.patch_size,
        merge=vision.spatial_merge_size,
        temporal_patch=vision.temporal_patch_size,
        mean=tuple(processor.get("image_mean", family.image_mean)),
        std=tuple(processor.get("image_std", family.image_std)),
        min_pixels=processor.get("min_pixels") or size.get("shortest_edge") or 56 * 56,
        max_pixels=processor.get("max_pixels") or size.get("longest_edge") or family.max_pixels,
    )
