"""How long a call takes on its device: by a GPU's own clock, or the host's."""

import statistics
import time
from collections.abc import Callable

import torch

MAX_CALLS = 20


def time_ms(device: torch.device, call: Callable[[], object], *, num_calls: int = 5, max_s: float = 2.0) -> float:
    """Median milliseconds of a few calls, fewer if those take longer than `max_s`; one more goes before, uncounted."""
    call()
    wait_for(device)
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < min(num_calls, MAX_CALLS) and (not times or time.perf_counter() - began < max_s):
        times.append(_timed_ms(device, call))
    return statistics.median(times)


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timed_ms(device: torch.device, call: Callable[[], object]) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return (time.perf_counter() - began) * 1e3
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.current_stream(device)
    before.record(stream)
    call()
    after.record(stream)
    after.synchronize()
    return before.elapsed_time(after)
