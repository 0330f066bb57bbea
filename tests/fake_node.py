"""A node process around a FakeEngine: `python fake_node.py WORD_S LOAD_S CLOSE_S [flags of onlooker.node]`.

Its model takes LOAD_S seconds to load and CLOSE_S to end, its answers WORD_S a word, and every stream has seen
one chunk. A model named `broken` cannot be loaded, and one named `small` has no room for its scratch.
"""

import sys
import time
from concurrent.futures import Future

from fakes import FakeEngine
from nodes import remember

from onlooker.node.__main__ import leave, main
from onlooker.node.config import NodeConfig
from onlooker.node.options import StreamOptions
from onlooker.protocol.errors import ErrorCode, NodeError
from onlooker.protocol.messages import Forecast

WORD_S, LOAD_S, CLOSE_S = map(float, sys.argv[1:4])


class SeenEngine(FakeEngine):
    """A fake engine whose streams have seen something from the start."""

    def add_stream(self, options: StreamOptions) -> Future[Forecast]:
        future = super().add_stream(options)
        remember(self, stream=options.name)
        return future

    def close(self, timeout_s: float = 1.0) -> None:
        time.sleep(CLOSE_S)
        super().close()


def load_engine(config: NodeConfig) -> SeenEngine:
    if config.model == "broken":
        raise OSError("there is no such checkpoint")
    if config.model == "small":
        raise NodeError(ErrorCode.OUT_OF_MEMORY, "there is no room for its scratch")
    time.sleep(LOAD_S)
    return SeenEngine(word_s=WORD_S)


if __name__ == "__main__":
    leave(main(sys.argv[4:], load_engine))
