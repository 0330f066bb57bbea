"""A showing gets every frame into the memory at the story's times, asks at its moments, and leaves nothing behind."""

from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest
from nodes import running_node
from oracle import Oracle

from onlooker.node.chunk import Picture
from onlooker.node.options import StreamOptions
from onlooker.protocol.client import NodeClient
from onlooker.protocol.errors import NodeError
from onlooker.tools.link import LOSSLESS_IN_FLIGHT, Link
from onlooker.tools.scenario import EVERYTHING, Keeping, Part, Setting, recall, rounds_scenario, stories_scenario
from onlooker.tools.showing import LostFramesError, Manner, show

ROUNDS = rounds_scenario(0, 1, Setting("native", 2))
STORIES = stories_scenario(1, 2, [3, 5], 6, [Setting("native", 4), Setting("turns", 2)])


class Remembering(Oracle):
    """Keeps what a stream had seen when it was removed."""

    kept: list[Picture]

    def remove_stream(self, stream: str):
        self.kept = self.pictures(stream)
        return super().remove_stream(stream)


@contextmanager
def way_to(engine: Oracle, **settings) -> Iterator[tuple[NodeClient, Link]]:
    with running_node(engine, **settings) as node:
        link = Link(
            frames=node.endpoints["frames"],
            control=node.endpoints["control"],
            max_in_flight=LOSSLESS_IN_FLIGHT,
            adds_streams=False,
        )
        with NodeClient(node.endpoints["ask"], node.endpoints["control"]) as client:
            yield client, link


def shown(parts: list[Part], manner: Manner | None = None, **settings):
    with Oracle(parts, **settings) as engine, way_to(engine) as (client, link):
        return list(show(parts, client, link, manner))


def test_the_memory_gets_every_frame_with_its_pixels_and_its_time():
    with Remembering(STORIES) as engine, way_to(engine) as (client, link):
        for part, showing in zip(STORIES, show(STORIES, client, link), strict=True):
            script = part.script
            assert showing.memory.num_frames == script.num_frames
            assert [picture.ts for picture in engine.kept] == [round(time_s * 1e9) for time_s in script.times_s]
            pictures = zip(engine.kept, script.pictures(), strict=True)
            assert all((picture.pixels == pixels).all() for picture, pixels in pictures)


def test_each_question_is_asked_of_the_memory_of_its_moment():
    for part, showing in zip(STORIES, shown(STORIES), strict=True):
        queries = part.script.queries
        assert [each.before.num_frames for each in showing.asked] == [query.num_frames for query in queries]
        assert [each.question for each in showing.asked] == [query.quiz.question for query in queries]
        assert all(each.right and each.is_traceless for each in showing.asked)
        assert showing.setting == part.setting


def test_a_wrong_answer_is_wrong():
    (showing,) = shown(ROUNDS, spoil=lambda answer: answer.replace("green", "blue"))
    assert [each.right for each in showing.asked] == [True, True, False]


def test_a_memory_that_is_not_as_before_is_a_trace():
    (showing,) = shown(ROUNDS)
    asked = showing.asked[0]
    grown = msgspec.structs.replace(asked.after, num_tokens=asked.after.num_tokens + 1)
    assert not msgspec.structs.replace(asked, after=grown).is_traceless
    touched = msgspec.structs.replace(asked.answer.memory, unchanged=False)
    answer = msgspec.structs.replace(asked.answer, memory=touched)
    assert not msgspec.structs.replace(asked, answer=answer).is_traceless


def test_choices_are_asked_for_beside_the_answers():
    (showing,) = shown(ROUNDS, Manner(with_choices=True))
    assert all(
        each.choice and {score.option for score in each.choice.scores} == set(each.options) for each in showing.asked
    )


def test_a_storm_comes_after_every_chunk():
    (showing,) = shown(ROUNDS, Manner(num_storm=5))
    assert showing.num_storm == 3 * 5
    assert showing.num_storm_traces == 0


def test_the_node_is_as_before_afterwards():
    with Oracle(ROUNDS) as engine, way_to(engine) as (client, link):
        list(show(ROUNDS, client, link))
        assert client.stream_names() == ["front"]


def test_a_memory_that_is_full_ends_it_and_the_stream_is_removed():
    with Oracle(STORIES, capacity_tokens=40) as engine, way_to(engine) as (client, link):
        with pytest.raises(LostFramesError, match=r"memory_full 4.*memory_bytes"):
            list(show(STORIES, client, link))
        assert client.stream_names() == ["front"]


def test_a_node_that_is_busy_is_asked_again():
    at_once = stories_scenario(0, 1, [1], 3, [Setting("native", 1)])
    with Oracle(at_once) as engine, way_to(engine, questions__max_per_client=1) as (client, link):
        showings = list(show(at_once, client, link))
    assert all(each.right for showing in showings for each in showing.asked)


def test_another_refusal_is_not_asked_again():
    with Oracle(ROUNDS) as engine, way_to(engine) as (client, link):
        engine.fail_ask = NodeError("INTERNAL", "it broke")
        with pytest.raises(NodeError, match="it broke"):
            list(show(ROUNDS, client, link))


class Configured(Oracle):
    """Keeps how its newest stream was configured."""

    configured: StreamOptions

    def add_stream(self, options: StreamOptions):
        self.configured = options
        return super().add_stream(options)


def test_a_way_to_keep_is_how_its_stream_is_configured_with_a_share_of_what_everything_took():
    keepings = [EVERYTHING, Keeping("some", "thin", gate=200.0, drop=0.9, share=0.25)]
    parts = recall(0, 1, [16], 2, [Setting("native", 2, keeping) for keeping in keepings])
    with Configured(parts) as engine, way_to(engine) as (client, link):
        whole, some = show(parts, client, link)
    options = engine.configured
    assert (options.retention, options.gate, options.drop) == ("thin", 200.0, 0.9)
    assert options.memory_bytes == whole.memory.logical_bytes // 4
    assert whole.num_gated == 0
    assert some.num_gated + some.memory.num_frames == 32


def test_a_memory_that_is_meant_to_be_full_does_not_end_it():
    keepings = [EVERYTHING, Keeping("stop", share=0.25)]
    parts = recall(0, 1, [16], 2, [Setting("native", 2, keeping) for keeping in keepings])
    with Oracle(parts) as engine, way_to(engine) as (client, link):
        showings = show(parts, client, link)
        next(showings)
        engine.capacity_tokens = 40
        assert next(showings).memory.num_frames == 10
