"""Where the time goes on a GPU, stage by stage and variant by variant: the engine's ways beside those it replaced.

    python tests/gpu/speed.py PART [--model NAME] [--budget 120] [--json FILE]

`right` compares the kernels and the captured steps with plain torch, and passes the exactness gate; `start` starts
an engine at a published model's sizes with random weights and shows what it gave up, what it takes, and that nothing
is compiled once it is warm; `kernels` times attention alone, `pieces` that of a chunk to its past in pieces and whole;
`model` times the stages of a 1080p chunk, of a question and of decoding with CUDA events; `upload` times the ways of
pictures to the device, alone and under a stream of chunks; `streams` times small chunks of several streams, one by one
and together; `between` shows the pace of answers and the rate of a stream together, with and without decode steps
between the layers of a chunk. What fails is printed with its traceback, and the rest goes on; what would begin after
the budget (seconds) is left out.
"""

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from onlooker.node import attention as attention_module
from onlooker.node import model as model_module
from onlooker.node import vision
from onlooker.node.answer import decode_tokens
from onlooker.node.arena import Arena, KVShape
from onlooker.node.attention import Partial, attend_causal, attend_recent, attend_shared, grouped, merge
from onlooker.node.bench_engine import STREAM, Askers, BenchEngine, Frames, Setting
from onlooker.node.branch import Branch, Scratch
from onlooker.node.chunk import Chunk, Picture
from onlooker.node.compilation import Compilation
from onlooker.node.engine import Engine
from onlooker.node.layout import Patches
from onlooker.node.ledger import Snapshot
from onlooker.node.memory import StreamMemory
from onlooker.node.model import VisionLanguageModel, load_model
from onlooker.node.options import StreamOptions
from onlooker.node.passes import Prefill
from onlooker.node.published import build_published
from onlooker.node.random_checkpoint import write_checkpoint
from onlooker.node.rehearsal import Rehearsal
from onlooker.node.split_kv import Row, SplitAttention, attend_rows
from onlooker.node.upload import Uploader, upload
from onlooker.node.verify import verify
from onlooker.protocol.messages import Ask, AskChoice

CUDA = torch.device("cuda")
HISTORY = 28_500
PIECE = 8192  # of a history, for kernels that are built for each length
NUM_QUERIES = (5382, 224)
SIZE = (1932, 1092)  # 1920x1080 as Qwen2.5-VL encodes it


class Report:
    """Figures by name, in the order in which they came; written to a file after each section."""

    def __init__(self, path: Path | None, budget_s: float) -> None:
        self._path = path
        self._began = time.monotonic()
        self._budget_s = budget_s
        self.figures: dict[str, Any] = {}

    def add(self, name: str, value: Any) -> None:
        self.figures[name] = value
        shown = f"{value:,.3f}" if isinstance(value, float) else value
        print(f"{time.monotonic() - self._began:6.1f} s  {name:<64}{shown}", flush=True)

    def section(self, name: str, run: Callable[[], None]) -> None:
        if time.monotonic() - self._began > self._budget_s:
            self.add(f"{name}: left out", "no time")
            return
        print(f"--- {name}", flush=True)
        try:
            run()
        except Exception as error:
            traceback.print_exc()
            self.add(f"{name}: FAILED", f"{type(error).__name__}: {str(error)[:200]}")
        torch.cuda.synchronize()
        if self._path is not None:
            self._path.write_text(json.dumps(self.figures, indent=1, default=str) + "\n")

    def time(self, name: str, call: Callable[[], object], num: int = 5) -> float | None:
        """Add the median of a few calls, in milliseconds of the GPU's clock, and of the first one where it differs."""
        try:
            first = _ms(call)
            ms = statistics.median(_ms(call) for _ in range(num))
        except Exception as error:
            traceback.print_exc()
            self.add(f"{name}: FAILED", f"{type(error).__name__}: {str(error)[:200]}")
            return None
        if first > 3 * ms + 5:
            self.add(f"{name}, first call ms", first)
        self.add(f"{name}, ms", ms)
        return ms


def _ms(call: Callable[[], object]) -> float:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    began.record()
    call()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended)


def _rand(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(CUDA).manual_seed(seed), device=CUDA).to(dtype)


def _arena(shape: KVShape, capacity: int, seed: int) -> Arena:
    arena = Arena(shape, capacity)
    for i, tensor in enumerate((*arena.keys, *arena.values)):
        tensor.copy_(_rand(*tensor.shape, seed=seed + i, dtype=shape.dtype))
    return arena


# ------------------------------------------------------------------------------------------ correctness


def check_split_kv(report: Report) -> None:
    """The kernels against plain torch, over head counts, widths, lengths and both precisions."""
    cases = {
        "one row": [(0, 1000, 0, 3)],
        "rows of two streams": [(0, 1000, 0, 3), (1, 333, 1, 70), (0, 641, 2, 1), (0, 1, 3, 64)],
        "nothing seen": [(0, 0, 0, 3), (1, 40, 1, 65), (0, 0, 2, 1), (1, 64, 3, 63)],
        "a question": [(0, 999, 1, 5 + i) for i in range(19)],
    }
    worst = {torch.float32: 0.0, torch.bfloat16: 0.0}
    several, question = ["rows of two streams", "nothing seen"], ["a question"]
    todo = [((16, 2, 128), torch.bfloat16, list(cases)), ((16, 2, 128), torch.float32, several)]
    todo += [(heads, torch.bfloat16, several) for heads in ((28, 4, 128), (6, 2, 80), (4, 2, 64))]
    todo += [((32, 8, 128), torch.bfloat16, question), ((4, 2, 16), torch.float32, several)]
    for (heads, kv_heads, head_dim), dtype, names in todo:
        shape = KVShape(kv_heads, head_dim, dtype, (CUDA,) * 2)
        streams, scratch = [_arena(shape, 1024, 1), _arena(shape, 512, 9)], _arena(shape, 4 * 96, 20)
        for case in (cases[name] for name in names):
            rows = [
                Row(0, 0, streams[s].extent(0, seen), scratch.extent(96 * slot, 96 * slot + own))
                for s, seen, slot, own in case
            ]
            attention = SplitAttention(scratch, heads, len(rows), max_tiles=2 * len(rows))
            host = np.zeros(attention.table_size, np.int64)
            attention.write_tables(rows, host)
            query = _rand(len(rows), heads, head_dim, seed=3, dtype=dtype)
            out = attention.attend(1, query, torch.from_numpy(host).to(CUDA), head_dim**-0.5)
            gap = float((out - attend_rows(1, query, rows, head_dim**-0.5)).float().abs().max())
            worst[dtype] = max(worst[dtype], gap if gap == gap else float("inf"))
    report.add("split_kv against torch, float32", worst[torch.float32])
    report.add("split_kv against torch, bfloat16", worst[torch.bfloat16])
    assert worst[torch.float32] <= 1e-5 and worst[torch.bfloat16] <= 3e-2, worst


def check_recent(report: Report) -> None:
    """One flash call over past and new rows against float64."""
    worst = 0.0
    for heads, kv_heads, num_past, num_new in ((16, 2, 1000, 77), (16, 2, 0, 50), (28, 4, 333, 1), (8, 8, 64, 200)):
        query = _rand(1, heads, num_new, 128, seed=1)
        key, value = (_rand(num_past + num_new, kv_heads, 128, seed=seed) for seed in (2, 3))
        out = merge(attend_recent(grouped(query, kv_heads), key, value, 128**-0.5))[0].transpose(0, 1)
        wide = (x.double().transpose(0, 1).repeat_interleave(heads // kv_heads, 0) for x in (key, value))
        visible = torch.ones(num_new, num_past + num_new, dtype=torch.bool, device=CUDA).tril(num_past)
        k, v = wide
        scores = (query[0].double() @ k.transpose(1, 2) * 128**-0.5).masked_fill(~visible, float("-inf"))
        worst = max(worst, float((scores.softmax(-1) @ v - out).abs().max()))
    report.add("attend_recent against float64, bfloat16", worst)
    assert worst <= 2e-2, worst


def check_steps(report: Report) -> None:
    """Captured steps of small float32 models against kernel by kernel."""
    with tempfile.TemporaryDirectory() as folder:
        for family in ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"):
            engine = Engine(_small(folder, family), max_concurrent_questions=2, scratch_tokens=256)
            began = time.monotonic()
            engine.warm_up("off")
            report.add(f"{family}: warm-up, s", time.monotonic() - began)
            steps = engine._scratch.steps
            report.add(f"{family}: steps captured", steps is not None)
            engine._scratch.steps = None
            rehearsal = Rehearsal(engine._model, engine._scratch)
            plain = rehearsal.play()  # also after a capture that failed
            report.add(f"{family}: plain steps are numbers", bool(plain.isfinite().all()))
            if steps is not None:
                engine._scratch.steps = steps
                report.add(f"{family}: captured against not", _gap(rehearsal.play(), plain))


def check_gate(report: Report) -> None:
    """The exactness gate on a small float32 model."""
    with tempfile.TemporaryDirectory() as folder:
        checks = list(verify(_small(folder, "qwen2_5_vl")))
        missed = [f"{c.promise} {c.case} {c.value:.2g}" for c in checks if not c.passed]
        report.add("exactness gate: largest difference", max(c.value for c in checks))
        report.add("exactness gate", f"{len(checks) - len(missed)} of {len(checks)} hold {missed[:3]}")


def _small(folder: str, family: str) -> VisionLanguageModel:
    write_checkpoint(Path(folder) / family, family)
    return load_model(str(Path(folder) / family), dtype="float32", device=CUDA.type)


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


# --------------------------------------------------------------------------------------- attention alone


def time_attention(report: Report, n: int) -> None:
    """A chunk's n queries over a long history: flash in one call, and cuDNN whole and in pieces."""
    kv_heads, heads, dim, scale = 2, 16, 128, 128**-0.5
    key, value = (_rand(HISTORY + n + PIECE, kv_heads, dim, seed=seed) for seed in (1, 2))
    q = grouped(_rand(1, n, heads, dim, seed=3).transpose(1, 2), kv_heads)
    whole, own = slice(0, HISTORY + n), slice(HISTORY, HISTORY + n)

    def flash() -> Tensor:
        return merge(attend_recent(q, key[whole], value[whole], scale))

    def causal() -> Partial:
        return attend_causal(q, key[own].transpose(0, 1)[None], value[own].transpose(0, 1)[None], scale)

    def cudnn(start: int, stop: int) -> Partial:
        out, lse = _cudnn(q.flatten(1, 2), key[start:stop], value[start:stop], scale)
        return Partial(out.unflatten(1, q.shape[1:3]), lse.reshape(q.shape[:4]))

    def pieces() -> Tensor:
        parts, at = [causal()], 0
        while at + PIECE <= HISTORY:
            parts.append(cudnn(at, at + PIECE))
            at += PIECE
        return merge([*parts, attend_shared(q, key[at:HISTORY], value[at:HISTORY], scale)])

    def rated(name: str, num_keys: float, call: Callable[[], object]) -> None:
        ms = report.time(f"attention {n}: {name}", call)
        if ms:
            report.add(f"attention {n}: {name}, TFLOP/s", 4 * n * num_keys * dim * heads / ms / 1e9)

    rated(f"flash over {HISTORY} and itself", HISTORY + n / 2, flash)
    rated("own tokens alone", n / 2, causal)
    for length in (HISTORY, HISTORY + 1, PIECE):
        rated(f"cuDNN over {length}, heads shared", length, lambda length=length: cudnn(0, length))
    folded = q.permute(1, 2, 0, 3, 4).flatten(1, 3)[None].contiguous()
    rated(f"cuDNN over {PIECE}, heads folded", PIECE, lambda: _cudnn(folded, key[:PIECE], value[:PIECE], scale))
    rated(f"flash over {PIECE}, heads folded", PIECE, lambda: attend_shared(q, key[:PIECE], value[:PIECE], scale))
    rated(f"cuDNN in pieces over {HISTORY} and itself, merged", HISTORY + n / 2, pieces)
    report.add(f"attention {n}: cuDNN in pieces against flash", _gap(pieces(), flash()))
    parts = [causal() for _ in range(4)]
    report.time(f"attention {n}: merge of 4 parts", lambda: merge(parts))


def _cudnn(q: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    k, v = (x.transpose(0, 1)[None] for x in (key, value))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, False, scale=scale)
    return out, lse.reshape(q.shape[:3])


def time_pieces(report: Report) -> None:
    """A chunk's queries over a past by cuDNN: piece by piece, several as a batch, and whole."""
    n, kv_heads, heads, dim, scale = NUM_QUERIES[0], 2, 16, 128, 128**-0.5
    key, value = (_rand(7 * 4096 + n, kv_heads, dim, seed=seed) for seed in (1, 2))  # room for 34,054 keys
    q = _rand(1, n, heads, dim, seed=3).transpose(1, 2)

    def rated(name: str, num_keys: float, call: Callable[[], object]) -> None:
        ms = report.time(f"past of {n}: {name}", call, 9)
        if ms:
            report.add(f"past of {n}: {name}, TFLOP/s", 4 * n * num_keys * dim * heads / ms / 1e9)

    def batch(length: int, num: int, rows: Tensor) -> object:
        k, v = (x[: length * num].unflatten(0, (num, length)).transpose(1, 2) for x in (key, value))
        return attention_module._cudnn(rows, k, v, False, scale)

    for length in (2048, 4096, 8192, 12288, 24576, 28672):
        rated(f"one of {length}", length, lambda length=length: batch(length, 1, q))
    for length, num in ((8192, 2), (8192, 3), (12288, 2), (4096, 7), (2048, 2), (2048, 4)):
        what = f"{num} of {length} at once"
        rated(f"{what}, copied", length * num, lambda a=length, b=num: batch(a, b, q.repeat(b, 1, 1, 1)))
        rated(f"{what}, not", length * num, lambda a=length, b=num: batch(a, b, q.expand(b, -1, -1, -1)))
    rated(
        "flash over 1876, heads folded",
        1876,
        lambda: attend_shared(grouped(q, kv_heads), key[:1876], value[:1876], scale),
    )
    for num_keys, longest in ((28_500, 32_768), (20_000, 32_768), (3924, 4096), (1876, 2048)):
        report.section(
            f"{num_keys} of at most {longest} keys",
            lambda a=num_keys, b=longest: _time_up_to(report, q, key, value, a, b),
        )
    pieces = merge(attention_module._attend_by_pieces(attention_module._cudnn, grouped(q, kv_heads), key, value, scale))
    flash = merge(
        [attention_module._attend_grouped(attention_module._flash_cuda, grouped(q, kv_heads), key, value, True, scale)]
    )
    report.add("pieces against flash", _gap(pieces, flash))


def _time_up_to(report: Report, q: Tensor, key: Tensor, value: Tensor, num_keys: int, longest: int) -> None:
    """cuDNN told how many keys there are of at most so many: is one build enough for all lengths, and is it right?"""
    rows, scale = q[0].transpose(0, 1).contiguous(), q.shape[-1] ** -0.5
    bounds = [torch.tensor([0, num], device=CUDA, dtype=torch.int32) for num in (len(rows), num_keys)]

    def attend(num_keys: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.aten._cudnn_attention_forward(
            rows, key, value, None, bounds[0], num_keys, len(rows), longest, True, 0.0, False, False, scale=scale
        )

    report.time(f"{num_keys} of at most {longest} keys", lambda: attend(bounds[1]))
    out, lse, *_ = attend(bounds[1])
    past_key, past_value = (x[:num_keys].transpose(0, 1)[None] for x in (key, value))
    wanted, wanted_lse = attention_module._flash_cuda(q, past_key, past_value, False, scale)
    report.add(f"{num_keys} of at most {longest} keys, off by", _gap(out, wanted[0].transpose(0, 1)))
    report.add("log-sum-exp", f"{tuple(lse.shape)}, where flash has {tuple(wanted_lse.shape)}")
    fewer = torch.tensor([0, num_keys - 7], device=CUDA, dtype=torch.int32)
    torch.cuda.synchronize()
    began = time.perf_counter()
    attend(fewer)
    torch.cuda.synchronize()
    report.add("first call of another length, ms", (time.perf_counter() - began) * 1e3)


def time_split_kv(report: Report) -> None:
    """36 layers of split-KV attention as one graph, for answers and question tokens over one stream."""
    shape = KVShape(2, 128, torch.bfloat16, (CUDA,) * 36)
    stream, scratch = _arena(shape, HISTORY, 1), _arena(shape, 8 * 2048, 2)
    for num in (1, 8, 32, 64):
        own = [(i % 8, 40) if num <= 8 else (0, 10 + i) for i in range(num)]
        rows = [Row(0, 0, stream.extent(0, HISTORY), scratch.extent(2048 * s, 2048 * s + n)) for s, n in own]
        attention = SplitAttention(scratch, 16, num, max_tiles=2 * num if num <= 8 else num // 4)
        host = np.zeros(attention.table_size, np.int64)
        attention.write_tables(rows, host)
        tables, query = torch.from_numpy(host).to(CUDA), _rand(num, 16, 128, seed=4)

        def layers(attention: SplitAttention = attention, query: Tensor = query, tables: Tensor = tables) -> None:
            for layer in range(36):
                attention.attend(layer, query, tables, 128**-0.5)

        layers()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            layers()
        report.time(f"split-KV, 36 layers, {num} rows over {HISTORY}", graph.replay, 9)


# --------------------------------------------------------------------------------------------- the model


class Bench:
    """A published model and a memory of noise."""

    def __init__(self, report: Report, name: str) -> None:
        self.report = report
        self.model = build_published(name, device=CUDA.type, dtype=torch.bfloat16)
        geometry = self.model.geometry
        self.merged = round(SIZE[1] / geometry.factor), round(SIZE[0] / geometry.factor)
        self.grid = 2, self.merged[0] * geometry.merge, self.merged[1] * geometry.merge
        patches = self.grid[0] * self.grid[1] * self.grid[2]
        self.patches = _rand(patches, 3 * geometry.temporal_patch * geometry.patch**2, seed=5)
        self.memory = self._memory(HISTORY + 40_000)
        self.scratch = Scratch(self.model.kv_shape, 8, 2048)

    def _memory(self, capacity: int) -> StreamMemory:
        options = StreamOptions("cam", memory_bytes=capacity * self.model.kv_shape.bytes_per_token)
        memory = StreamMemory(self.model, options)
        for tensor in (*memory._arena.keys, *memory._arena.values):
            tensor.normal_()
        return memory

    @torch.inference_mode()
    def time_vision(self) -> None:
        visual, tower = self.model._model.model.visual, self.model.tower
        grid_thw = torch.tensor([self.grid], device=CUDA)
        self.report.add("patches of a chunk", len(self.patches))
        self.report.time("vision: transformers' own", lambda: visual(self.patches, grid_thw=grid_thw), 2)
        self.report.time("vision: ours", self._see)
        theirs, ours = visual(self.patches, grid_thw=grid_thw).pooler_output, self._see().embeds
        self.report.add("vision: ours against transformers, relative", _gap(ours, theirs) / float(theirs.abs().max()))
        sound = tower._attend
        tower._attend = _varlen_attend  # type: ignore[method-assign]
        self.report.time("vision: ours, varlen for windows and frames", self._see)
        self.report.add(
            "vision: varlen against not, relative", _gap(self._see().embeds, ours) / float(ours.abs().max())
        )
        tower._attend = sound  # type: ignore[method-assign]

    def _see(self) -> vision.Vision:
        return self.model.tower.see(self.patches, self.grid)

    @torch.inference_mode()
    def time_prefill(self, label: str) -> None:
        model, arena = self.model, self.memory._arena
        for name, (rows, columns) in {"1080p": self.merged, "448x448": (16, 16), "392x224": (8, 14)}.items():
            patches = Patches(rows, columns, ((0, 1), (2, 3)))
            span, _ = self.memory.layout.extend(self.memory.now.layout, patches)
            seen = torch.zeros(patches.num_tokens, model.config.text_config.hidden_size, device=CUDA, dtype=model.dtype)
            deepstack = len(getattr(model.config.vision_config, "deepstack_visual_indexes", ()))
            what = vision.Vision(seen, [seen] * deepstack or None)
            for history in (HISTORY,) if name != "1080p" else (0, HISTORY):
                self.report.time(
                    f"prefill {label}: {name}, {len(span)} tokens over {history}",
                    lambda s=span, w=what, h=history: model.read(s, Prefill([arena.extent(0, h)], (arena, h)), w),
                    4,
                )

    @torch.inference_mode()
    def time_decode(self, label: str) -> None:
        model = self.model
        for num in (1, 8):
            branches = [Branch(model, self.memory, self.memory.now, self.scratch) for _ in range(num)]
            for branch in branches:
                branch.reading.snapshot = Snapshot(num_tokens=HISTORY)
                branch.num_own = 40

            def step(branches: list[Branch] = branches) -> None:
                decode_tokens(model, [(100, branch) for branch in branches])
                for branch in branches:
                    branch.num_own = 40

            self.report.time(f"decode {label}: {num} answers over {HISTORY}", step, 9)
            wall = time.perf_counter()
            for _ in range(10):
                logits = decode_tokens(model, [(100, branch) for branch in branches])
                logits.argmax(-1).tolist()
            self.report.add(f"decode {label}: {num} answers, on the wall, ms", (time.perf_counter() - wall) * 100)
            if num == 1:
                self._time_question(label, branches[0])
            for branch in branches:
                branch.close()

    def _time_question(self, label: str, branch: Branch) -> None:
        span = self.memory.layout.question(self.memory.now.layout, "Is there a person?")

        def ask() -> None:
            branch.num_own = 0
            branch.prefill(span)

        self.report.time(f"question {label}: {len(span)} tokens over {HISTORY}", ask, 9)

    def compile(self) -> None:
        began = time.monotonic()

        def warm_up() -> None:
            with torch.inference_mode():
                self._see()
                self._question()

        is_compiled = Compilation(self.model.tower, self.model.language).use(warm_up)
        self.report.add("compiled", f"{is_compiled} in {time.monotonic() - began:.1f} s")

    def capture(self) -> None:
        began = time.monotonic()
        self.scratch.capture_steps(self.model)
        self.report.add("steps captured", f"{self.scratch.steps is not None} in {time.monotonic() - began:.1f} s")

    def _question(self) -> None:
        branch = Branch(self.model, self.memory, self.memory.now, self.scratch)
        try:
            branch.prefill(self.memory.layout.question(self.memory.now.layout, "What?"))
            decode_tokens(self.model, [(100, branch)])
        finally:
            branch.close()

    @torch.inference_mode()
    def time_vision_compiled(self) -> None:
        tower = self.model.tower
        self.report.time("vision compiled", self._see)
        sound = tower._attend
        tower._attend = _varlen_attend  # type: ignore[method-assign]
        self.report.time("vision compiled, varlen", self._see)
        tower._attend = sound  # type: ignore[method-assign]
        self.profile("vision", self._see)

    @torch.inference_mode()
    def profile_rest(self) -> None:
        model, arena = self.model, self.memory._arena
        patches = Patches(*self.merged, ((0, 1), (2, 3)))
        span, _ = self.memory.layout.extend(self.memory.now.layout, patches)
        seen = torch.zeros(patches.num_tokens, model.config.text_config.hidden_size, device=CUDA, dtype=model.dtype)
        deepstack = len(getattr(model.config.vision_config, "deepstack_visual_indexes", ()))
        what = vision.Vision(seen, [seen] * deepstack or None)
        self.profile("prefill", lambda: model.read(span, Prefill([arena.extent(0, HISTORY)], (arena, HISTORY)), what))
        branch = Branch(model, self.memory, self.memory.now, self.scratch)
        branch.reading.snapshot = Snapshot(num_tokens=HISTORY)
        branch.num_own = 40
        self.profile("decode", lambda: decode_tokens(model, [(100, branch)]))
        branch.close()

    def profile(self, name: str, call: Callable[[], object]) -> None:
        """The kernels that take the longest, in milliseconds of one call."""
        call()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        rows = sorted(profile.key_averages(), key=lambda row: -row.self_device_time_total)
        self.report.add(f"profile {name}: sum, ms", sum(row.self_device_time_total for row in rows) / 1e3)
        for row in rows[:12]:
            text = f"{row.self_device_time_total / 1e3:8.3f} ms  {row.count:5} x"
            self.report.add(f"profile {name}: {row.key[:90]}", text)


def _varlen_attend(q: Tensor, k: Tensor, v: Tensor, segments: list[vision.Segments]) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    lengths = [length for length, num in segments for _ in range(num)]
    bounds = _BOUNDS.get(tuple(segments))
    if bounds is None:
        bounds = _BOUNDS[tuple(segments)] = torch.tensor([0, *np.cumsum(lengths)], device=CUDA, dtype=torch.int32)
    longest = max(lengths)
    return varlen_attn(q, k, v.contiguous(), bounds, bounds, longest, longest).flatten(1)  # type: ignore[union-attr]


_BOUNDS: dict[tuple[vision.Segments, ...], Tensor] = {}


# -------------------------------------------------------------------------------------------- the engine


def check_start(report: Report, name: str) -> None:
    """An engine as a node starts it, and the first work of every kind, during which nothing may be compiled."""
    began = time.monotonic()
    model = build_published(name, device=CUDA.type, dtype=torch.bfloat16)
    engine = Engine(model)
    report.add("start: model built, s", time.monotonic() - began)
    _add_memory(report, "start: before the warm-up", engine)
    began = time.monotonic()
    engine.warm_up()
    report.add("start: warm-up, s", time.monotonic() - began)
    report.add("start: layers compiled", model.tower.before is not vision.before_attention)
    report.add("start: steps captured", engine._scratch.steps is not None)
    _add_memory(report, "start: after the warm-up", engine)
    torch.compiler.set_stance("fail_on_recompile")
    engine.start()
    rng = np.random.default_rng(0)
    for width, height, num in ((1920, 1080, 4), (448, 448, 2), (392, 224, 6), (640, 360, 1)):
        stream = f"{width}x{height}, {num} frames"
        engine.add_stream(StreamOptions(stream, chunk_frames=num, memory_bytes=1 << 30)).result()
        for i in range(2):
            frames = rng.integers(0, 256, (num, height, width, 3), dtype=np.uint8)
            times = [(num * i + at) * 125_000_000 for at in range(num)]
            chunk = Chunk(tuple(Picture(f, num * i + j, times[j], "media", times[j]) for j, f in enumerate(frames)))
            _try_work(report, f"start: chunk {i} of {stream}", lambda s=stream, c=chunk: engine.encode(s, c))
        for num_words in (1, 12, 40, 100):
            ask = Ask(stream=stream, question="What? " * num_words, max_new_tokens=4)
            _try_work(
                report, f"start: question of {num_words} words", lambda a=ask: engine.ask(a, arrived=time.monotonic())
            )
    choice = AskChoice(stream=stream, question="What?", options=["yes", "no, not at all", "it is not known"])
    _try_work(report, "start: choice", lambda: engine.ask_choice(choice, arrived=time.monotonic()))
    asks = [Ask(stream=stream, question="Who?", max_new_tokens=8, temperature=0.7, top_p=0.9)] * 5
    futures = [engine.ask(ask, arrived=time.monotonic()) for ask in asks]
    for future in futures:
        _try_work(report, "start: one of five sampled answers", lambda f=future: f)
    counters = engine.question_counters()
    report.add("start: answered, failed, traces", (counters.answered, counters.failed, counters.traces))
    _add_memory(report, "start: at the end", engine)
    report.add("start: the engine has ended", engine.close())
    torch.compiler.set_stance("default")


def _try_work(report: Report, name: str, submit: Callable[[], Any]) -> None:
    began = time.perf_counter()
    try:
        submit().result(60)
    except Exception as error:
        report.add(f"{name}: FAILED", f"{type(error).__name__}: {str(error)[:300]}")
    else:
        report.add(f"{name}, ms", (time.perf_counter() - began) * 1e3)


def _add_memory(report: Report, when: str, engine: Engine) -> None:
    free, total = torch.cuda.mem_get_info()
    known = engine._weights_bytes + engine._scratch.resident_bytes
    report.add(f"{when}: weights and scratch, GB", known / 1e9)
    report.add(f"{when}: allocated beyond them, GB", (torch.cuda.memory_allocated() - known) / 1e9)
    report.add(f"{when}: reserved, GB", torch.cuda.memory_reserved() / 1e9)
    report.add(f"{when}: used on the card, GB", (total - free) / 1e9)


def time_engine(report: Report, model: VisionLanguageModel) -> None:
    """Chunks and questions through the engine's own thread, alone and at the same time."""
    engine = Engine(model)
    began = time.monotonic()
    engine._scratch.capture_steps(model)
    Rehearsal(model, engine._scratch)
    report.add("engine: warm-up without compiling, s", time.monotonic() - began)
    engine.start()
    engine.add_stream(StreamOptions("cam", memory_bytes=6 << 30)).result()
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (1080, 1920, 3), dtype=np.uint8) for _ in range(4)]

    def chunk(i: int) -> Chunk:
        seqs = range(4 * i, 4 * i + 4)
        return Chunk(tuple(Picture(frames[s % 4], s, s * 125_000_000, "media", s * 125_000_000) for s in seqs))

    began = time.perf_counter()
    engine.encode("cam", chunk(0)).result()
    report.add("engine: first chunk, ms", (time.perf_counter() - began) * 1e3)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    futures = [engine.encode("cam", chunk(i)) for i in range(1, 6)]
    began = time.perf_counter()
    encoded = [future.result() for future in futures]
    alone = (time.perf_counter() - began) / len(futures)
    report.add("engine: chunk alone, ms", alone * 1e3)
    for part in ("preprocess_ms", "vision_ms", "prefill_ms"):
        report.add(f"engine: {part}", statistics.median(getattr(e, part) for e in encoded))
    report.add("engine: workspace peak, GB", (torch.cuda.max_memory_allocated() - before) / 1e9)

    def ask(number: int, num_tokens: int = 64) -> Any:
        request = Ask(stream="cam", question=f"What is in picture {number}?", max_new_tokens=num_tokens)
        return engine.ask(request, arrived=time.monotonic())

    ask(0).result()
    one = ask(1).result()
    report.add("engine: first token, ms", one.timing.first_token_ms)
    report.add("engine: a token, ms", one.timing.decode_ms / max(1, one.num_answer_tokens - 1))
    eight = [future.result() for future in [ask(i) for i in range(8)]]
    rate = sum(a.num_answer_tokens for a in eight) / (max(a.timing.total_ms for a in eight) / 1e3)
    report.add("engine: 8 answers, tokens/s", rate)
    running = [ask(i, 512) for i in range(8)]
    began = time.perf_counter()
    for future in [engine.encode("cam", chunk(6 + i)) for i in range(4)]:
        future.result()
    report.add("engine: chunk while 8 are answered, ms", (time.perf_counter() - began) / 4 * 1e3)
    for future in running:
        future.cancel()
    report.add("engine: traces", engine.question_counters().traces)
    engine.close()


# --------------------------------------------------------------------------------- chunks and questions at once


SETTINGS = {"1080p": Setting((1920, 1080), None, 4), "1080p at 392x224": Setting((1920, 1080), (392, 224), 4)}
NUM_CHUNKS = {"1080p": 6, "1080p at 392x224": 48}


@contextmanager
def _warm_engine(report: Report, name: str) -> Iterator[BenchEngine]:
    engine = BenchEngine(build_published(name, device=CUDA.type, dtype=torch.bfloat16))
    began = time.monotonic()
    engine.warm_up()
    report.add("warm-up, s", time.monotonic() - began)
    report.add("steps captured", engine._scratch.steps is not None)
    engine.start()
    yield engine
    report.add("traces", engine.question_counters().traces)
    report.add("the engine has ended", engine.close())


@contextmanager
def _stream(engine: BenchEngine, setting: Setting) -> Iterator[StreamMemory]:
    """A stream over a history of noise."""
    num_bytes = (HISTORY + 60_000) * engine._model.kv_shape.bytes_per_token
    options = StreamOptions(
        STREAM, chunk_frames=setting.chunk_frames, encode_size=setting.encode_size, memory_bytes=num_bytes
    )
    engine.add_stream(options).result()
    engine.fill(STREAM, HISTORY).result()
    yield engine._memories[STREAM]
    engine.remove_stream(STREAM).result()


def _chunks_in_a_row(engine: BenchEngine, frames: Frames, num: int) -> float:
    """Milliseconds of a chunk, with two on their way as a node has them."""
    waiting: deque[Any] = deque()
    began = time.perf_counter()
    for _ in range(num):
        waiting.append(engine.encode(STREAM, frames.chunk()))
        if len(waiting) > 1:
            waiting.popleft().result()
    waiting.popleft().result()
    return (time.perf_counter() - began) / num * 1e3


def _rate_alone(engine: BenchEngine, frames: Frames, num: int) -> float:
    """The same, and the memory is cut back afterwards."""
    ms = _chunks_in_a_row(engine, frames, num)
    engine.rewind(STREAM)
    return ms


def _pageable(frames: Any, device: torch.device) -> Tensor:
    """What `upload` replaced."""
    return torch.from_numpy(np.stack(frames)).to(device)


def time_upload(report: Report, name: str) -> None:
    """Four 1080p pictures to the device by themselves, then for each chunk of a stream."""
    pixels = [picture.pixels for picture in Frames(SETTINGS["1080p"]).chunk().pictures]
    report.time("upload: pageable", lambda: _pageable(pixels, CUDA), 9)
    report.time("upload: page-locked", lambda: upload(pixels, CUDA), 9)
    host = torch.empty(len(pixels), *pixels[0].shape, dtype=torch.uint8, pin_memory=True)
    report.time("upload: page-locked, the device's part", lambda: host.to(CUDA, non_blocking=True), 9)
    with _warm_engine(report, name) as engine:
        ahead = engine._uploader
        ways: dict[str, tuple[Any, Uploader | None]] = {
            "pageable, at its turn": (_pageable, None),
            "page-locked, at its turn": (upload, None),
            "page-locked, ahead": (upload, ahead),
        }
        for what, setting in SETTINGS.items():
            with _stream(engine, setting):
                frames = Frames(setting)
                _rate_alone(engine, frames, 4)
                for way, (bring, engine._uploader) in ways.items():
                    model_module.upload = bring  # type: ignore[attr-defined]
                    for _ in range(2):
                        ms = _rate_alone(engine, frames, NUM_CHUNKS[what])
                        report.add(f"upload: a chunk of {what}, {way}, ms", ms)
        engine._uploader = ahead


class Watched:
    """When the decode steps of an engine end."""

    def __init__(self, engine: BenchEngine) -> None:
        self.ends: list[float] = []
        self._step = engine._answering._decode_step
        engine._answering._decode_step = self._watch  # type: ignore[method-assign]

    def _watch(self) -> None:
        self._step()
        self.ends.append(time.perf_counter())

    def gaps_ms(self) -> list[float]:
        return sorted((b - a) * 1e3 for a, b in zip(self.ends, self.ends[1:], strict=False))


def time_streams(report: Report, name: str) -> None:
    """Small chunks that wait in four streams, by how many are encoded at once."""
    setting = Setting((392, 224), (392, 224), 4)
    with _warm_engine(report, name) as engine:
        for history in (2000, 28_500):
            names = [f"{history} {i}" for i in range(4)]
            for stream in names:
                num_bytes = (history + 30_000) * engine._model.kv_shape.bytes_per_token
                engine.add_stream(
                    StreamOptions(stream, chunk_frames=4, encode_size=setting.encode_size, memory_bytes=num_bytes)
                ).result()
                engine.fill(stream, history).result()
            for num in (1, 2, 4):
                engine._max_together = num
                frames = [Frames(setting, seed) for seed in range(len(names))]
                times = []
                for num_chunks in (4, 24, 24):  # the first ones record what is new to them
                    began = time.perf_counter()
                    waiting = [
                        engine.encode(stream, its.chunk())
                        for _ in range(num_chunks)
                        for stream, its in zip(names, frames, strict=True)
                    ]
                    for future in waiting:
                        future.result()
                    times.append((time.perf_counter() - began) / len(waiting) * 1e3)
                report.add(f"over {history} tokens, {num} at once, ms a chunk", min(times[1:]))
                for stream in names:
                    engine.rewind(stream)
            for stream in names:
                engine.remove_stream(stream).result()


def time_between(report: Report, name: str) -> None:
    """What answers and a stream have of each other, with a chunk as one turn and with each of its layers as one."""
    with _warm_engine(report, name) as engine:
        watched = Watched(engine)
        for what, setting in SETTINGS.items():
            for is_on in (False, True):
                way = f"{what}, {'between layers' if is_on else 'a chunk at a time'}"
                with _stream(engine, setting) as memory:
                    if not is_on:
                        append = memory.append
                        memory.append = lambda chunk, up, _, append=append: append(chunk, up)  # type: ignore[method-assign]
                    _time_both(report, way, engine, watched, Frames(setting), NUM_CHUNKS[what])


def _time_both(
    report: Report, way: str, engine: BenchEngine, watched: Watched, frames: Frames, num_chunks: int
) -> None:
    _rate_alone(engine, frames, 4)
    alone_ms = statistics.median(_rate_alone(engine, frames, num_chunks) for _ in range(3))
    report.add(f"{way}: a chunk while nobody asks, ms", alone_ms)
    firsts = [_first_token_in_a_chunk(engine, frames, alone_ms) for _ in range(5)]
    report.add(f"{way}: first token of a question in a chunk, median and worst ms", _spread(firsts))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with Askers(engine, 8, num_tokens=64) as askers:
        askers.wait_until_each_was_answered()
        watched.ends.clear()
        began = time.perf_counter()
        both_ms = _chunks_in_a_row(engine, frames, num_chunks)
        seconds = time.perf_counter() - began
        gaps = watched.gaps_ms()
    engine.rewind(STREAM)
    report.add(f"{way}: a chunk while 8 are answered, ms", both_ms)
    report.add(f"{way}: rate kept, %", alone_ms / both_ms * 100)
    report.add(f"{way}: time of a token while chunks come, median and worst ms", _spread(gaps))
    report.add(f"{way}: tokens/s of 8 while chunks come", 8 * len(gaps) / seconds)
    report.add(f"{way}: workspace peak, GB", (torch.cuda.max_memory_allocated() - before) / 1e9)


def _first_token_in_a_chunk(engine: BenchEngine, frames: Frames, chunk_ms: float) -> float:
    """Milliseconds to the first token of a question that comes when a third of a chunk is done."""
    encoding = engine.encode(STREAM, frames.chunk())
    time.sleep(chunk_ms / 3e3)
    ask = Ask(stream=STREAM, question="What do you see now?", max_new_tokens=1)
    answer = engine.ask(ask, arrived=time.monotonic()).result()
    encoding.result()
    engine.rewind(STREAM)
    return answer.timing.first_token_ms


def _spread(times: list[float]) -> str:
    return f"{statistics.median(times):.1f} {max(times):.1f}" if times else "none"


def time_model(report: Report, bench: Bench) -> None:
    """All stages, kernel by kernel, captured, and compiled."""
    report.section("vision", bench.time_vision)
    report.section("prefill", lambda: bench.time_prefill("eager"))
    report.section("decode", lambda: bench.time_decode("eager"))
    report.section("compile", bench.compile)
    report.section("vision, compiled", bench.time_vision_compiled)
    report.section("prefill, compiled", lambda: bench.time_prefill("compiled"))
    report.section("capture", bench.capture)
    report.section("decode, captured", lambda: bench.time_decode("captured, compiled"))
    report.section("profiles", bench.profile_rest)
    report.section("engine", lambda: time_engine(report, bench.model))


def check_all(report: Report) -> None:
    """What is new, compared with plain torch."""
    report.section("split_kv is right", lambda: check_split_kv(report))
    report.section("attend_recent is right", lambda: check_recent(report))
    report.section("captured steps are right", lambda: check_steps(report))
    report.section("the exactness gate", lambda: check_gate(report))


def time_kernels(report: Report) -> None:
    """What is new, timed by itself."""
    for n in NUM_QUERIES:
        report.section(f"attention of {n} tokens alone", lambda n=n: time_attention(report, n))
    report.section("split-KV alone", lambda: time_split_kv(report))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "part",
        choices=["right", "start", "kernels", "model", "upload", "streams", "between", "pieces"],
        help="a process each: one may break its GPU",
    )
    parser.add_argument("--model", default="qwen2.5-vl-3b")
    parser.add_argument("--budget", type=float, default=120.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stdout)
    report = Report(args.json, args.budget)
    report.add("card", torch.cuda.get_device_name())
    report.add("versions", f"torch {torch.__version__}, transformers {transformers.__version__}")
    if args.part == "right":
        check_all(report)
    elif args.part == "start":
        report.section("the start of an engine", lambda: check_start(report, args.model))
    elif args.part == "kernels":
        time_kernels(report)
    elif args.part == "pieces":
        report.section("attention to a past by pieces", lambda: time_pieces(report))
    elif args.part == "upload":
        report.section("pictures to the device", lambda: time_upload(report, args.model))
    elif args.part == "streams":
        report.section("chunks of several streams", lambda: time_streams(report, args.model))
    elif args.part == "between":
        report.section("chunks and questions at once", lambda: time_between(report, args.model))
    else:
        report.section("the model", lambda: time_model(report, Bench(report, args.model)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
