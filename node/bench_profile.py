"""Where the time of a call goes, kernel by kernel, as torch's profiler tells it."""

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .bench_report import Kernel
from .stopwatch import wait_for

NUM_KERNELS = 12
MAX_NAME_CHARS = 80


def prepare_profiler() -> None:
    """Have the profiler set itself up on the main thread, before another one uses it."""
    with profile(activities=[ProfilerActivity.CPU]):
        pass


def top_kernels(device: torch.device, call: Callable[[], object], *, model: str, of: str) -> list[Kernel]:
    """The longest of what a call runs on its device (on the CPU: the operators of this thread), longest first."""
    is_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if is_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities, acc_events=True) as profiler:
        call()
        wait_for(device)
    events: Any = profiler.key_averages()
    times_us = [(event.self_device_time_total if is_gpu else event.self_cpu_time_total) for event in events]
    total_us = sum(times_us) or 1.0
    ranked = sorted(zip(times_us, events, strict=True), key=lambda pair: -pair[0])
    return [
        Kernel(model, of, event.key[:MAX_NAME_CHARS], time_us / 1e3, event.count, time_us / total_us)
        for time_us, event in ranked[:NUM_KERNELS]
        if time_us > 0
    ]
