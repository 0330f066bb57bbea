"""A thread that polls is woken by what others put."""

import select
import threading

from onlooker.node.outbox import Outbox


def is_readable(outbox: Outbox[int]) -> bool:
    return bool(select.select([outbox.fileno()], [], [], 0)[0])


def test_it_is_readable_exactly_while_something_waits():
    outbox: Outbox[int] = Outbox()
    assert not is_readable(outbox)
    outbox.put(1)
    outbox.put(2)
    assert is_readable(outbox)
    assert outbox.take() == [1, 2]
    assert not is_readable(outbox)
    assert outbox.take() == []
    outbox.close()


def test_many_threads_lose_nothing():
    outbox: Outbox[int] = Outbox()
    threads = [threading.Thread(target=lambda: [outbox.put(n) for n in range(500)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    taken: list[int] = []
    while len(taken) < 2000:
        assert select.select([outbox.fileno()], [], [], 5)[0]
        taken += outbox.take()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(list(range(500)) * 4)
    outbox.close()


def test_what_is_put_after_the_end_is_dropped():
    outbox: Outbox[int] = Outbox()
    outbox.put(1)
    outbox.close()
    outbox.put(2)
    outbox.close()
    assert outbox.take() == []
