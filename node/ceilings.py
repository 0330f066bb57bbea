"""What a machine can do at most, measured on it: the rate of a large matrix product, and of a copy in its memory."""

from dataclasses import dataclass

import torch

from .stopwatch import time_ms
from .workload import Work

_SIDES = {"cuda": 8192, "cpu": 768}  # of the matrices
_COPY_BYTES = {"cuda": 1 << 30, "cpu": 64 << 20}
_NUM_CALLS = 10


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Rates that no step can go beyond."""

    flops_per_s: float
    bytes_per_s: float  # read and written

    def limit_ms(self, work: Work) -> float:
        """The least time that a piece of work can take: computing and moving overlap, the longer of them stays."""
        return max(work.flops / self.flops_per_s, work.num_bytes / self.bytes_per_s) * 1e3


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure on random numbers: on zeros a card draws less power, and runs faster than it ever does at work."""
    side, num_bytes = _SIDES[device.type], _COPY_BYTES[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    product_ms = time_ms(device, lambda: a @ b, num_calls=_NUM_CALLS)
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_ms = time_ms(device, lambda: target.copy_(source), num_calls=_NUM_CALLS)
    return Ceilings(2 * side**3 / product_ms * 1e3, 2 * num_bytes / copy_ms * 1e3)
