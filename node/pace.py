"""How far the host runs ahead of a GPU."""

from collections import deque

import torch

# Enough that the device has work while other threads of the process keep the host, and done soon: four layers of a
# 1080p chunk take an H200 about 10 ms.
_STEPS_AHEAD = 4


class Pace:
    """Keeps the host a few steps ahead of a GPU, a step being what was launched between two calls of `keep`.

    So what the host launches next begins soon, and the device need not wait for it. On the CPU, where a step is done
    when it returns, it does nothing.
    """

    def __init__(self, device: torch.device) -> None:
        num = _STEPS_AHEAD if device.type == "cuda" else 0
        self._ends = deque(torch.cuda.Event() for _ in range(num))

    def keep(self) -> None:
        """End a step; wait for the end of an earlier one."""
        if self._ends:
            end = self._ends.popleft()
            end.synchronize()  # one that was never recorded is no wait
            end.record()
            self._ends.append(end)
