"""Counts by reason."""

import threading

from onlooker.node.tally import Tally


def test_threads_count_together():
    tally = Tally()
    threads = [threading.Thread(target=lambda: [tally.add("malformed") for _ in range(1000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tally.add("busy")
    assert tally.counts() == {"malformed": 4000, "busy": 1}
