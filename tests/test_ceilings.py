import torch

from onlooker.node.ceilings import Ceilings, measure_ceilings
from onlooker.node.stopwatch import time_ms
from onlooker.node.workload import Work

CPU = torch.device("cpu")


def test_the_limit_is_the_longer_of_computing_and_moving():
    ceilings = Ceilings(flops_per_s=100, bytes_per_s=10)
    assert ceilings.limit_ms(Work(flops=1000, num_bytes=1)) == 10_000
    assert ceilings.limit_ms(Work(flops=1, num_bytes=1000)) == 100_000


def test_the_ceilings_of_this_machine_are_credible():
    ceilings = measure_ceilings(CPU, torch.float32)
    assert 1e8 < ceilings.flops_per_s < 1e14
    assert 1e8 < ceilings.bytes_per_s < 1e13


def test_the_first_call_is_not_counted_and_no_more_are_made_than_there_is_time_for():
    calls: list[int] = []
    time_ms(CPU, lambda: calls.append(0), num_calls=3)
    assert len(calls) == 4
    calls.clear()
    time_ms(CPU, lambda: calls.append(0), num_calls=3, max_s=0)
    assert len(calls) == 2
