"""Rows that move, those who read them, and arenas that come and go."""

import gc
import weakref
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from onlooker.node import storage as storage_module
from onlooker.node.arena import Arena, KVShape
from onlooker.node.ledger import Snapshot
from onlooker.node.reading import Reading
from onlooker.node.storage import Storage

SHAPE = KVShape(2, 4, torch.float32, (torch.device("cpu"),) * 2)


@pytest.fixture
def storage() -> Storage:
    """Ten rows of twenty are in use, each with its own number in it."""
    storage = Storage(SHAPE, 20)
    for tensor in (*storage.arena.keys, *storage.arena.values):
        tensor.copy_(torch.arange(20.0)[:, None, None].expand_as(tensor))
    return storage


def numbers(reading: Reading) -> list[int]:
    """What is written in the rows that are read."""
    return [int(row[0, 0]) for extent in reading.extents for row in extent.rows(0)[0]]


def keep(storage: Storage, kept: Sequence[int], num_left: int) -> None:
    storage.keep(np.array(kept), lambda held: [Snapshot(num_tokens=num_left)] * len(held))


def test_what_is_read_goes_aside_as_long_as_it_is_read(storage: Storage):
    reading = storage.read(Snapshot(num_tokens=4), ())
    assert storage.is_read and storage.top == 20
    keep(storage, [0, 3, 8, 9], num_left=2)
    assert storage.arena.keys[1][:4, 0, 0].tolist() == [0, 3, 8, 9]
    assert numbers(reading) == [0, 3, 1, 2] and storage.top == 18
    assert reading.arena.fingerprint(reading.sampled) == reading.fingerprint
    storage.end_reading(reading)
    assert not storage.is_read and storage.top == 20


def test_an_arena_that_was_followed_by_another_goes_with_its_last_reader(storage: Storage):
    readings = [storage.read(Snapshot(num_tokens=num), ()) for num in (2, 3)]
    before = storage.arena
    storage.renew(8, np.array([0, 5]))
    assert storage.arena.keys[0][:2, 0, 0].tolist() == [0, 5] and not storage.is_read
    assert numbers(readings[1]) == [0, 1, 2]
    storage.end_reading(readings[0])
    assert before.resident_bytes > 0
    storage.end_reading(readings[1])
    assert before.resident_bytes == 0 < storage.arena.resident_bytes


def test_nothing_is_left_of_what_is_released_though_somebody_reads_it(storage: Storage):
    storage.read(Snapshot(num_tokens=2), ())
    first = storage.arena
    storage.renew(8, np.arange(2))
    storage.release()
    assert first.resident_bytes == storage.arena.resident_bytes == 0


def test_an_arena_that_cannot_be_reserved_is_a_memory_error_that_holds_on_to_nothing(monkeypatch: pytest.MonkeyPatch):
    arenas: list[weakref.ref[Arena]] = []

    class NotedArena(Arena):
        def __init__(self, shape: KVShape, capacity: int) -> None:
            arenas.append(weakref.ref(self))
            super().__init__(shape, capacity)

    monkeypatch.setattr(storage_module, "Arena", NotedArena)
    with pytest.raises(MemoryError, match="cannot reserve") as refused:
        Storage(SHAPE, 1 << 50)
    gc.collect()
    assert refused.value.__cause__ is not None and [arena() for arena in arenas] == [None]
