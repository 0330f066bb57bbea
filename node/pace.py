"""How far the host runs ahead of a GPU."""

from collections import deque

import torch

_STEPS_AHEAD = 2  # enough that the device always has work, and soon done


class Pace:
    """Keeps the host two steps ahead of a GPU, a step being what was launched between two calls of `keep`.

    So what the host launches next begins within two steps, and the device never waits. On the CPU, where a step
    is done when it returns, it does nothing.
    """

    def __init__(self, device: torch.device) -> None:
        num = _STEPS_AHEAD if device.type == "cuda" else 0
        self._ends = deque(torch.cuda.Event() for _ in range(num))

    def keep(self) -> None:
        """End a step; wait for the end of the one two steps before."""
        if self._ends:
            end = self._ends.popleft()
            end.synchronize()  # one that was never recorded is no wait
            end.record()
            self._ends.append(end)
