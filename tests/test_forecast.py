"""What a node foretells of a stream is what then happens."""

from copy import deepcopy
from typing import Any

import pytest
from checkpoints import FAMILIES, Checkpoints, DirectedModel, chunk
from msgspec import UNSET

from onlooker.node.chunk import ChunkRefused
from onlooker.node.forecast import forecast, within_room
from onlooker.node.memory import StreamMemory
from onlooker.node.options import StreamOptions
from onlooker.protocol.errors import NodeError
from onlooker.protocol.forecast import Room, tokens_of


def options(model: DirectedModel, num_tokens: int = 200, **changes: Any) -> StreamOptions:
    """Of a stream whose frames are those of `checkpoints.chunk`."""
    side = 2 * model.geometry.factor
    known = {"encode_size": (side, side), "fps": 2.0, "chunk_frames": 2}
    return StreamOptions("front", memory_bytes=num_tokens * model.kv_shape.bytes_per_token, **(known | changes))


def num_taken(memory: StreamMemory, num: int) -> int:
    """How many chunks a memory takes before it refuses one."""
    for number in range(1000):
        try:
            memory.append(chunk(number * num, num=num, factor=memory.model.geometry.factor))
        except ChunkRefused:
            return number
    raise AssertionError("it takes all")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["native", "turns"])
@pytest.mark.parametrize("num", [1, 4])
def test_the_chunks_that_fit_are_those_foretold(checkpoints: Checkpoints, family: str, layout: str, num: int):
    model = DirectedModel(checkpoints.model(family))
    stream = options(model, layout=layout, chunk_frames=num)
    foretold, memory = forecast(model, stream), StreamMemory(model, stream)
    assert num_taken(memory, num) == foretold.num_chunks > 1
    # Written times get longer.
    assert memory.now.num_tokens == pytest.approx(tokens_of(foretold.footprint, foretold.num_chunks), abs=2)
    assert (foretold.limit, foretold.seconds_of_memory) == ("memory", foretold.num_chunks * num / 2.0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["native", "turns"])
def test_so_are_those_that_there_are_positions_for(checkpoints: Checkpoints, family: str, layout: str):
    model = DirectedModel(checkpoints.model(family))
    model.config = deepcopy(model.config)
    model.config.text_config.max_position_embeddings = 150
    stream = options(model, 4000, layout=layout)
    foretold = forecast(model, stream)
    assert abs(num_taken(StreamMemory(model, stream), 2) - foretold.num_chunks) <= 1 < foretold.num_chunks
    assert foretold.limit == "positions"
    assert foretold.seconds_of_positions == pytest.approx(foretold.num_chunks, abs=1.0)  # a second each


def test_a_memory_that_holds_no_chunk_is_refused_with_the_figures(model: DirectedModel):
    needed = tokens_of(forecast(model, options(model)).footprint, 1)
    assert forecast(model, options(model, needed)).num_chunks == 1
    with pytest.raises(NodeError, match=f"takes {needed} tokens or more") as caught:
        forecast(model, options(model, needed - 1))
    assert caught.value.code == "TOO_LARGE"
    assert caught.value.details["needed_bytes"] == needed * model.kv_shape.bytes_per_token


def test_while_the_size_is_unknown_the_largest_pictures_are_counted_and_the_smallest_decide(model: DirectedModel):
    side = model.geometry.factor
    least = options(model, encode_size=None, min_pixels=side**2, max_pixels=64 * side**2)
    foretold = forecast(model, least)
    assert foretold.encode_size is UNSET and foretold.footprint.tokens_per_chunk > 40
    assert forecast(model, options(model, 40, encode_size=None, min_pixels=1, max_pixels=10**12)).num_chunks == 0


def test_a_memory_that_holds_pictures_of_another_shape_is_not_refused(model: DirectedModel):
    side = model.geometry.factor
    needed = tokens_of(forecast(model, options(model, encode_size=(4 * side, 3 * side))).footprint, 1)
    # Within these bounds pictures of 16:9 take 15 tokens, those of 4:3 take 12.
    bounds = {"encode_size": None, "min_pixels": 12 * side**2, "max_pixels": 16 * side**2}
    assert forecast(model, options(model, needed, **bounds)).num_chunks == 0
    with pytest.raises(NodeError, match=f"takes {needed} tokens or more"):
        forecast(model, options(model, needed - 1, **bounds))


def test_without_a_rate_no_seconds_are_foretold(model: DirectedModel):
    foretold = forecast(model, options(model, fps=None))
    assert foretold.seconds_of_memory is UNSET and foretold.seconds_of_positions is not UNSET  # the clock alone counts
    assert foretold.limit is UNSET  # the positions end after so many seconds, whatever comes until then
    assert forecast(model, options(model, fps=None, layout="turns")).limit == "memory"  # no clock counts


@pytest.mark.parametrize("retention", ["window", "thin"])
def test_a_memory_that_forgets_holds_what_is_not_reserved_and_its_positions_never_end(
    model: DirectedModel, retention: str
):
    stream = options(model, 400, retention=retention)
    foretold = forecast(model, stream)
    assert foretold.capacity_tokens == StreamMemory(model, stream).info().capacity_tokens == 350
    assert foretold.seconds_of_positions is UNSET


def test_a_device_gives_what_it_has_room_for_and_never_less_than_the_least():
    room = Room(free_bytes=100, workspace_bytes=30, safety_bytes=10)
    assert within_room(StreamOptions("front", memory_bytes=60), room).memory_bytes == 60
    assert within_room(StreamOptions("front", memory_bytes=90, min_memory_bytes=60), room).memory_bytes == 60
    assert within_room(StreamOptions("front", memory_bytes=90), None).memory_bytes == 90
    with pytest.raises(NodeError, match="needs 61 B of a device that has 60 B") as caught:
        within_room(StreamOptions("front", memory_bytes=90, min_memory_bytes=61), room)
    assert caught.value.code == "OUT_OF_MEMORY"
    assert caught.value.details["room_bytes"] == 60 and caught.value.details["workspace_bytes"] == 30
