"""`onlooker qa`: what it prints, what it writes, how it ends."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Ended, onlooker
from oracle import running_oracle

from onlooker.tools.qa import Sockets
from onlooker.tools.report import page_of
from onlooker.tools.scenario import KEEPINGS, Part, Setting, comparison, recall, rounds_scenario, stories_scenario

ROUNDS = rounds_scenario(0, 1, Setting("native", 2))
BOTH = [Setting("native", 4), Setting("turns", 4)]


def qa(sockets: Sockets, *flags: object) -> Ended:
    endpoints = [part for name, endpoint in sockets._asdict().items() for part in (f"--{name}", endpoint)]
    return onlooker("qa", *endpoints, *flags)


def plain(text: str) -> str:
    """What is said, without the lines around it and wherever it was broken."""
    return " ".join(text.replace("│", " ").replace("┃", " ").split())


@pytest.fixture(scope="module")
def rounds() -> Iterator[Sockets]:
    with running_oracle(ROUNDS) as sockets:
        yield sockets


def asked_of(parts: list[Part], *flags: object, **settings) -> Ended:
    with running_oracle(parts, **settings) as sockets:
        return qa(sockets, *flags)


def test_three_rounds_that_are_answered_rightly_are_success(rounds: Sockets):
    ended = qa(rounds)
    assert ended.status == 0
    assert ended.out.count("right") >= 3 and "WRONG" not in ended.out
    assert "All of it held" in ended.out


def test_everything_is_in_the_json(rounds: Sockets):
    report = qa(rounds, "--json").json
    assert report["score"]["all"] == {"num": 3, "of": 3}
    assert report["showings"][0]["asked"][0]["wanted"] == "red"
    assert all(check["held"] for check in report["checks"])


def test_one_wrong_answer_is_a_failure_and_shown():
    ended = asked_of(ROUNDS, spoil=lambda answer: answer.replace("green", "blue"))
    assert ended.status == 1
    assert "WRONG" in ended.out and "NOT all of it held" in ended.out


def test_less_may_be_asked_for():
    assert asked_of(ROUNDS, "--min-accuracy", "0.6", spoil=lambda answer: answer.replace("green", "blue")).status == 0


def test_rounds_again_have_other_seeds():
    parts = rounds_scenario(7, 2, Setting("native", 2))
    report = asked_of(parts, "--rounds", 2, "--seed", 7, "--json").json
    assert [showing["seed"] for showing in report["showings"]] == [7, 8]
    assert report["score"]["all"] == {"num": 6, "of": 6}


def test_stories_are_scored_and_drawn(tmp_path: Path):
    parts = stories_scenario(0, 2, [1, 3], 4, BOTH)
    flags = ("--streams", 2, "--chunks", "1,3", "--questions", 4, "--storm", 2, "--choice")
    ended = asked_of(parts, "--scenario", "stories", *flags, "--plot", tmp_path / "lengths.png")
    assert ended.status == 0
    assert all(words in plain(ended.out) for words in ("8 of 8", "in the storm", "rank by", "p = "))
    assert (tmp_path / "lengths.png").stat().st_size > 10_000


def test_chunk_sizes_are_compared_and_drawn(tmp_path: Path):
    settings = [Setting("native", size) for size in (1, 2, 4, 6, 8)]
    parts = comparison(0, 1, [24], 2, settings)
    ended = asked_of(
        parts, "--compare", "chunks", "--streams", 1, "--chunks", 6, "--questions", 2, "--plot", tmp_path / "sizes.png"
    )
    assert ended.status == 0
    assert all(words in plain(ended.out) for words in ("10 of 10", "frames a chunk"))
    assert (tmp_path / "sizes.png").stat().st_size > 10_000


def test_layouts_are_compared():
    parts = comparison(0, 1, [8], 2, BOTH)
    flags = ("--compare", "layouts", "--streams", 1, "--chunks", 2, "--questions", 2, "--json")
    report = asked_of(parts, *flags).json
    assert [row["layout"] for row in report["comparison"]] == ["native", "turns"]
    assert "4 of 4" in page_of(report, "").verdict.text
    assert report["score"]["all"] == {"num": 4, "of": 4}


def test_ways_to_keep_are_compared_and_drawn(tmp_path: Path):
    parts = recall(0, 1, [16], 3, [Setting("native", 2, keeping) for keeping in KEEPINGS])
    flags = ("--compare", "retention", "--streams", 1, "--chunks", 16, "--questions", 3)
    ended = asked_of(parts, *flags, "--json", "--plot", tmp_path / "ages.png")
    assert ended.status == 0
    rows = {row["keeping"]["name"]: row for row in ended.json["recall"]}
    assert list(rows) == [keeping.name for keeping in KEEPINGS]
    # The oracle tells the moment by the frames it has: it is lost where a gate leaves some out.
    assert all(row["right"] == {"num": 3, "of": 3} for name, row in rows.items() if "gate" not in name)
    assert all((row["gated_frames"] > 0) == ("gate" in name) for name, row in rows.items())
    assert (tmp_path / "ages.png").stat().st_size > 10_000
    assert "held" in page_of(ended.json, "").verdict.text


@pytest.mark.parametrize(
    ("flags", "mistake"),
    [
        (("--chunk-frames", 3), "1, 2, 4, 6, 8"),
        (("--chunk-frames", 4), "2 frames"),
        (("--scenario", "stories", "--chunks", "1,x"), "1,8,24"),
        (("--scenario", "stories", "--chunks", "0"), "1,8,24"),
        (("--compare", "chunks", "--chunks", "5"), "multiple of 24"),
        (("--compare", "chunks", "--chunk-frames", "2"), "leave out --chunk-frames"),
        (("--compare", "layouts", "--layout", "turns"), "leave out --layout"),
        (("--compare", "retention", "--chunks", "8"), "too few"),
        (("--plot", "/nowhere/at/all/x.png"), "there is no folder"),
    ],
)
def test_a_mistake_is_told_before_anything_is_asked(flags: tuple[object, ...], mistake: str):
    ended = onlooker("qa", *flags)
    assert ended.status in (1, 2)
    assert mistake in plain(ended.err)


def test_a_node_that_is_not_there_is_no_reply(tmp_path: Path):
    nowhere = f"ipc://{tmp_path}/nobody"
    ended = onlooker("qa", "--control", nowhere, "--ask", nowhere, "--frames", nowhere, "--timeout", 0.2)
    assert ended.status == 3
    assert "no node answers" in ended.err
