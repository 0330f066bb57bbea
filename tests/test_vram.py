import os
import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace

import pytest
import torch
from msgspec import UNSET

from onlooker.node.vram import VramMeter, _nvml_handle

CUDA = torch.device("cuda:0")


class FakeNvml(ModuleType):
    """As much of pynvml as is asked of it: some processes, or an error."""

    class NVMLError(Exception):
        pass

    def __init__(self, processes: Sequence[tuple[int, int | None]], broken: str = "") -> None:
        super().__init__("pynvml")
        self._processes = processes
        self._broken = broken

    def nvmlInit(self) -> None:
        self._break("nvmlInit")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        assert uuid.startswith("GPU-")
        return "handle"

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[SimpleNamespace]:
        self._break("nvmlDeviceGetComputeRunningProcesses")
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self._processes]

    def _break(self, name: str) -> None:
        if self._broken == name:
            raise self.NVMLError(name)


def meter_with(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> VramMeter:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    meter = VramMeter(torch.device("cpu"))
    meter._nvml_handle = "handle"  # type: ignore[assignment]
    return meter


def test_on_the_cpu_only_weights_and_memories_are_known():
    vram = VramMeter(torch.device("cpu")).read(weights_bytes=10, kv_bytes=20)
    assert (vram.device, vram.weights_bytes, vram.kv_bytes) == ("cpu", 10, 20)
    others = set(vram.__struct_fields__) - {"device", "weights_bytes", "kv_bytes"}
    assert {getattr(vram, name) for name in others} == {UNSET}


def test_a_gpu_without_the_nvml_package_is_read_without_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it raises ImportError
    assert _nvml_handle(CUDA) is None


def test_a_gpu_without_the_nvml_library_is_read_without_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml([], broken="nvmlInit"))
    assert _nvml_handle(CUDA) is None


def test_other_processes_are_those_with_another_pid(monkeypatch: pytest.MonkeyPatch):
    processes = [(os.getpid(), 1000), (os.getpid() + 1, 30), (os.getpid() + 2, 4)]
    assert meter_with(FakeNvml(processes), monkeypatch)._other_process_bytes() == 34


def test_what_nvml_hides_is_unknown_not_zero(monkeypatch: pytest.MonkeyPatch):
    processes = [(os.getpid(), 1000), (os.getpid() + 1, 30), (os.getpid() + 2, None)]
    assert meter_with(FakeNvml(processes), monkeypatch)._other_process_bytes() is UNSET


def test_others_are_unknown_where_this_process_cannot_be_told_from_them(monkeypatch: pytest.MonkeyPatch):
    processes = [(os.getpid() + 1, 1000), (os.getpid() + 2, 30)]
    assert meter_with(FakeNvml(processes), monkeypatch)._other_process_bytes() is UNSET


def test_an_nvml_that_stops_working_is_asked_no_more(monkeypatch: pytest.MonkeyPatch):
    nvml = FakeNvml([(1, 5)], broken="nvmlDeviceGetComputeRunningProcesses")
    meter = meter_with(nvml, monkeypatch)
    assert meter._other_process_bytes() is UNSET
    nvml._broken = ""
    assert meter._other_process_bytes() is UNSET
