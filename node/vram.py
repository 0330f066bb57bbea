"""Device memory in bytes, as far as it can be known: torch's own counters, and NVML where there is one."""

import logging
import os

import torch
from msgspec import UNSET, UnsetType

from ..protocol.messages import Vram

logger = logging.getLogger(__name__)


class VramMeter:
    """Reads the memory of one device. What it cannot know it leaves out."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._allocated = 0  # at the last reading
        self._most_activations = 0
        self._most_allocated = 0
        self._nvml_handle = _nvml_handle(device) if device.type == "cuda" else None

    def read(self, *, weights_bytes: int, kv_bytes: int) -> Vram:
        """Measure now. Of a model over several devices, weights and K/V are those of all, the rest of the first."""
        if self._device.type != "cuda":
            return Vram(device=str(self._device), weights_bytes=weights_bytes, kv_bytes=kv_bytes)
        free, total = torch.cuda.mem_get_info(self._device)
        stats = torch.cuda.memory_stats(self._device)
        allocated, peak = stats["allocated_bytes.all.current"], stats["allocated_bytes.all.peak"]
        return Vram(
            device=f"{self._device} {torch.cuda.get_device_name(self._device)}",
            weights_bytes=weights_bytes,
            kv_bytes=kv_bytes,
            activations_peak_bytes=self._activations_peak(allocated, peak),
            total_bytes=total,
            free_bytes=free,
            other_process_bytes=self._other_process_bytes(),
            torch_allocated_bytes=allocated,
            torch_reserved_bytes=stats["reserved_bytes.all.current"],
            torch_peak_bytes=self._most_allocated,
        )

    def _activations_peak(self, allocated: int, peak: int) -> int:
        """The most that was in use for a while; what is in use now, between two turns, stays in use.

        The device's peak is taken since the last reading, so that an arena which was freed meanwhile does not
        count as activations for ever.
        """
        torch.cuda.reset_peak_memory_stats(self._device)
        self._most_allocated = max(self._most_allocated, peak)
        if allocated >= self._allocated:
            self._most_activations = max(self._most_activations, peak - allocated)
        self._allocated = allocated
        return self._most_activations

    def _other_process_bytes(self) -> int | UnsetType:
        if self._nvml_handle is None:
            return UNSET
        import pynvml

        try:
            processes = pynvml.nvmlDeviceGetComputeRunningProcesses(self._nvml_handle)
        except pynvml.NVMLError as error:
            logger.warning("NVML does not tell the processes of %s: %s", self._device, error)
            self._nvml_handle = None
            return UNSET
        if all(process.pid != os.getpid() for process in processes):
            return UNSET  # in a container NVML may number processes as the host does: which one are we?
        others = [p.usedGpuMemory for p in processes if p.pid != os.getpid()]
        return UNSET if None in others else sum(others)  # None: NVML hides it from this user


def _nvml_handle(device: torch.device):  # type: ignore[no-untyped-def]
    """The NVML handle of a CUDA device, found by UUID (indexes differ under CUDA_VISIBLE_DEVICES)."""
    try:
        import pynvml
    except ImportError as error:
        return _without_nvml(device, error)
    try:
        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        return pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
    except (AttributeError, pynvml.NVMLError) as error:
        return _without_nvml(device, error)


def _without_nvml(device: torch.device, why: Exception) -> None:
    logger.info("no NVML for %s (%s): other processes' memory is unknown", device, why)
