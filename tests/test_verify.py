"""The gate holds on what is right, and shuts on what is wrong."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, Checkpoints

from onlooker.node import token_drop
from onlooker.node import verify as verify_module
from onlooker.node.arena import Arena
from onlooker.node.chunk import Chunk, Encoded
from onlooker.node.layout import LAYOUTS, LayoutState, NativeLayout, Patches, Span
from onlooker.node.ledger import Snapshot
from onlooker.node.memory import StreamMemory
from onlooker.node.model import VisionLanguageModel
from onlooker.node.native_answers import Compared
from onlooker.node.reading import Reading
from onlooker.node.token_drop import Sifted
from onlooker.node.verify import BOUND, Check, main, verify, verify_answers
from onlooker.node.vision import Vision
from onlooker.tools.report import page_of


def missed(checks: list[Check]) -> set[str]:
    return {check.promise for check in checks if not check.passed}


@pytest.fixture(scope="module")
def sound(checkpoints: Checkpoints) -> Callable[[str], list[Check]]:
    """All checks of a family, made once."""
    return cache(lambda family: list(verify(checkpoints.model(family))))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_promise_holds_for_every_family(sound: Callable[[str], list[Check]], family: str):
    assert len(sound(family)) == 67
    assert not missed(sound(family))


class LateLayout(NativeLayout):
    """Every chunk one position too late."""

    def extend(self, state: LayoutState, patches: Patches) -> tuple[Span, LayoutState]:
        span, after = super().extend(state, patches)
        shift = 0 if state.is_empty else 1
        return replace(span, positions=span.positions + shift), after


def test_positions_that_are_one_off_are_found(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(LAYOUTS, "native", LateLayout)
    checks = list(verify_module._one_pass(checkpoints.model("qwen2_5_vl"), "native", 2, (2, 3), BOUND))
    assert missed(checks) == {"chunks = one pass, logits", "chunks = one pass, K and V"}


def test_a_question_that_writes_one_value_is_found(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch):
    sound = StreamMemory.read

    def touching(self: StreamMemory, snapshot: Snapshot) -> Reading:
        self._arena.values[1][0, 0, 0] += 1e-6
        return sound(self, snapshot)

    monkeypatch.setattr(StreamMemory, "read", touching)
    assert "no trace, K and V that differ" in missed(
        list(verify_module._no_trace(checkpoints.model("qwen2_vl"), "native"))
    )


def test_questions_that_never_ran_in_the_middle_of_a_chunk_are_found(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
):
    sound = StreamMemory.append

    def closed(self: StreamMemory, chunk: Chunk, upload: Any = None, between: Any = None) -> Encoded:
        return sound(self, chunk, upload)

    monkeypatch.setattr(StreamMemory, "append", closed)
    checks = list(verify_module._no_trace(checkpoints.model("qwen2_vl"), "native"))
    assert missed(checks) == {"no trace, endings that did not run"}


def test_tokens_that_moved_up_to_those_before_them_are_found(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch):
    def closed_up(span: Span, vision: Vision, is_new: np.ndarray) -> Sifted:
        sifted = sound(span, vision, is_new)
        return sifted._replace(span=replace(sifted.span, positions=span.positions[:, : len(sifted.span)]))

    sound = token_drop._sifted
    monkeypatch.setattr(token_drop, "_sifted", closed_up)
    checks = list(verify_module._dropping(checkpoints.model("qwen2_5_vl"), "native", BOUND))
    assert missed(checks) == {"dropping = one pass, masked, logits", "dropping = one pass, masked, K and V"}


def test_another_choice_of_tokens_is_found(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.nn.functional, "cosine_similarity", lambda a, b, dim: torch.ones(len(a)))
    checks = list(verify_module._dropping(checkpoints.model("qwen2_5_vl"), "native", BOUND))
    assert [check.value for check in checks] == [math.inf]


def test_keys_that_did_not_move_with_their_positions_are_found(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Arena, "rotate", lambda self, turns: None)
    checks = list(verify_module._moving(checkpoints.model("qwen2_5_vl"), "native", BOUND))
    assert missed(checks) == {"moved = encoded there, logits", "moved = encoded there, K and V"}


def test_positions_that_never_move_are_found(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(VisionLanguageModel, "max_positions", 10_000)
    checks = list(verify_module._moving(checkpoints.model("qwen2_5_vl"), "native", BOUND))
    assert [check.value for check in checks] == [math.inf]


def test_bytes_that_are_miscounted_are_found(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Arena, "logical_bytes", lambda self, num_tokens: 0)
    assert missed(list(verify_module._bytes(checkpoints.model("qwen2_vl")))) == {
        "bytes = tokens x bytes per token = storage"
    }


def test_a_value_that_is_no_number_does_not_pass():
    assert not Check("a promise", "a model", "a case", float("nan"), 1e-5).passed


def test_a_difference_is_measured_by_the_largest_figure_once_that_is_over_one():
    ones = torch.ones(3)
    assert verify_module._distance(100 * ones + 1e-3, 100 * ones) == pytest.approx(1e-5, rel=0.01)
    assert verify_module._distance(0.01 * ones + 1e-3, 0.01 * ones) == pytest.approx(1e-3, rel=0.01)


def test_answers_that_differ_are_counted_and_found(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        verify_module, "compare_answers", lambda model: [Compared("native", 5, 5), Compared("turns", 4, 5)]
    )
    same, different = verify_answers(checkpoints.model("qwen2_vl"))
    assert same.passed and not different.passed
    assert (different.value, different.case) == (1, "turns: 4 of 5 the same")


def test_whole_answers_are_compared_when_asked_for(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(verify_module, "verify", lambda model, bound: ())
    monkeypatch.setattr(verify_module, "compare_answers", lambda model: [Compared("turns", 4, 5)])
    arguments = ["--model", str(checkpoints.path("qwen2_vl")), "--device", "cpu"]
    assert main([*arguments, "--answers"]) == 1
    assert "turns: 4 of 5 the same" in capsys.readouterr().out
    assert main(arguments) == 0


def test_a_bound_that_is_too_narrow_is_missed(checkpoints: Checkpoints):
    assert not all(check.passed for check in verify(checkpoints.model("qwen2_vl"), 1e-12))


def test_the_command_reports_as_json_and_by_its_status(
    checkpoints: Checkpoints,
    sound: Callable[[str], list[Check]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def verified(model: VisionLanguageModel, bound: float) -> list[Check]:
        return [replace(check, bound=min(check.bound, bound)) for check in sound(model.config.model_type)]

    monkeypatch.setattr(verify_module, "verify", verified)
    path = str(checkpoints.path("qwen2_vl"))
    assert main(["--model", path, "--device", "cpu", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["passed"] and len(document["checks"]) == 67
    assert document["machine"]["command"] == f"onlooker verify --model {path} --device cpu --json"
    assert page_of(document, "").verdict == (True, "All 67 checks hold")
    assert main(["--model", path, "--device", "cpu", "--bound", "1e-12"]) == 1
    assert "MISS" in capsys.readouterr().out


def test_a_promise_is_a_line_and_its_cases_come_when_asked_for(
    monkeypatch: pytest.MonkeyPatch, checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]
):
    checks = [
        Check("one", "m", "a", 1e-7, 1e-5),
        Check("one", "m", "b", math.nan, 1e-5),
        Check("one", "m", "c", 2e-6, 1e-5),
        Check("two", "m", "d", 0, 0),
    ]
    monkeypatch.setattr(verify_module, "verify", lambda model, bound: checks)
    arguments = ["--model", str(checkpoints.path("qwen2_vl")), "--device", "cpu"]
    assert main(arguments) == 1
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [
        ["one", "2", "of", "3", "nan", "1e-05"],
        ["MISS", "nan", "b"],
        ["two", "1", "of", "1", "0", "bit", "for", "bit"],
        [],
        ["3", "of", "4", "checks", "hold"],
    ]
    main([*arguments, "--cases"])
    assert ["ok", "2e-06", "c"] in [line.split() for line in capsys.readouterr().out.splitlines()]


def test_a_checkpoint_that_is_not_there_is_a_line_and_status_1(capsys: pytest.CaptureFixture[str]):
    assert main(["--model", "./no-such-folder", "--device", "cpu"]) == 1
    assert capsys.readouterr().err.startswith("onlooker verify: ./no-such-folder cannot be loaded: ")


def test_a_device_that_nobody_has_is_a_mistake_in_the_arguments(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as error:
        main(["--device", "gpu"])
    assert error.value.code == 2
    assert "auto, cpu, cuda" in capsys.readouterr().err
