import pytest
import torch
from checkpoints import Checkpoints
from hypothesis import given, settings
from hypothesis import strategies as st

from onlooker.node.decoding import TextStream, TokenChooser

LOGITS = torch.tensor([0.1, 3.0, 2.0, -1.0, 2.9, 0.0])


@pytest.fixture(scope="session")
def tokenizer(checkpoints: Checkpoints):
    return checkpoints.model("qwen2_5_vl").tokenizer


def drawn(num: int = 40, **settings: float) -> list[int]:
    chooser = TokenChooser(**settings)  # type: ignore[arg-type]
    return [chooser.choose([1] * n, LOGITS) for n in range(num)]


# Choosing


def test_zero_temperature_takes_the_likeliest_token():
    assert drawn(3) == [1, 1, 1]
    assert drawn(3, temperature=0.0, top_p=0.01, seed=3) == [1, 1, 1]


def test_a_seed_gives_the_same_tokens_again_and_another_seed_others():
    assert drawn(temperature=1.0, seed=5) == drawn(temperature=1.0, seed=5)
    assert drawn(temperature=1.0, seed=5) != drawn(temperature=1.0, seed=6)


def test_without_a_seed_the_tokens_differ_from_time_to_time():
    assert len({tuple(drawn(temperature=2.0)) for _ in range(4)}) > 1


def test_the_largest_seed_is_accepted():
    assert drawn(temperature=1.0, seed=(1 << 63) - 1)


@pytest.mark.parametrize("top_p", [0.3, 0.6, 0.85])
def test_every_token_drawn_is_in_the_nucleus(top_p: float):
    ranked = LOGITS.softmax(-1).sort(descending=True)
    num_before = int((ranked.values.cumsum(0) < top_p).sum())
    nucleus = set(ranked.indices[: num_before + 1].tolist())
    assert set(drawn(300, temperature=1.0, top_p=top_p, seed=0)) == nucleus


def test_tokens_are_drawn_as_often_as_they_are_likely():
    tokens = torch.tensor(drawn(3000, temperature=2.0, seed=0))
    expected = (LOGITS / 2).softmax(-1)
    seen = torch.bincount(tokens, minlength=len(LOGITS)) / len(tokens)
    assert (seen - expected).abs().max() < 0.03


def test_a_whole_number_is_a_temperature_too():
    assert drawn(temperature=1, seed=5) == drawn(temperature=1.0, seed=5)


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-30, 5e-324])
def test_the_smallest_temperatures_are_greedy_and_no_error(temperature: float):
    assert drawn(5, temperature=temperature, seed=0) == [1] * 5


def test_a_choice_does_not_depend_on_the_global_random_state():
    torch.manual_seed(1)
    first = drawn(temperature=1.0, seed=5)
    torch.manual_seed(2)
    assert drawn(temperature=1.0, seed=5) == first


# Text


def pushed(stream: TextStream, ids: list[int]) -> list[str]:
    """The deltas of a whole answer, as an answer takes them: nothing after a stop."""
    deltas = []
    for token in ids:
        deltas.append(stream.push(token))
        if stream.is_stopped:
            break
    return [*deltas, stream.finish()]


def test_text_is_certain_token_by_token(tokenizer):
    ids = tokenizer.encode("I see a red circle.", add_special_tokens=False)
    deltas = pushed(TextStream(tokenizer), ids)
    assert deltas == [*(tokenizer.decode([token]) for token in ids), ""]


def test_a_character_of_several_tokens_is_held_back_until_it_is_whole(tokenizer):
    ids = tokenizer.encode("a🚲b", add_special_tokens=False)
    assert len(ids) == 6
    assert pushed(TextStream(tokenizer), ids) == ["a", "", "", "", "🚲", "b", ""]


def test_half_a_character_at_the_end_is_flushed_as_a_replacement(tokenizer):
    ids = tokenizer.encode("a🚲", add_special_tokens=False)[:3]
    stream = TextStream(tokenizer)
    assert "".join(pushed(stream, ids)) == stream.text == tokenizer.decode(ids)
    assert stream.text.startswith("a\N{REPLACEMENT CHARACTER}")


def test_a_character_that_never_gets_whole_does_not_hold_back_the_rest(tokenizer):
    ids = tokenizer.encode("🚲", add_special_tokens=False)[:2] + tokenizer.encode("ab", add_special_tokens=False)
    stream = TextStream(tokenizer)
    assert "".join(pushed(stream, ids)) == tokenizer.decode(ids)


def test_special_tokens_are_no_text(tokenizer):
    ids = tokenizer.encode("left<|vision_start|> right", add_special_tokens=False)
    assert "".join(pushed(TextStream(tokenizer), ids)) == "left right"


def test_a_stop_string_over_several_tokens_is_never_shown(tokenizer):
    ids = tokenizer.encode("one, two. END of it", add_special_tokens=False)
    stream = TextStream(tokenizer, ["END"])
    assert len(tokenizer.encode("END", add_special_tokens=False)) > 1
    assert "".join(pushed(stream, ids)) == stream.text == "one, two. "
    assert stream.is_stopped


def test_what_may_begin_a_stop_string_is_held_back_and_comes_when_it_does_not(tokenizer):
    stream = TextStream(tokenizer, ["xyz"])
    deltas = [stream.push(token) for letter in "axyb" for token in tokenizer.encode(letter, add_special_tokens=False)]
    assert deltas == ["a", "", "", "xyb"] and not stream.is_stopped


def test_what_was_held_back_for_a_stop_string_comes_at_the_end(tokenizer):
    stream = TextStream(tokenizer, ["xyz"])
    deltas = pushed(stream, tokenizer.encode("axy", add_special_tokens=False))
    assert "".join(deltas) == stream.text == "axy" and not stream.is_stopped


def test_a_stop_string_that_overlaps_itself_is_found(tokenizer):
    stream = TextStream(tokenizer, ["aab"])
    assert "".join(pushed(stream, [tokenizer.encode(c, add_special_tokens=False)[0] for c in "aaabaa"])) == "a"
    assert stream.is_stopped


def test_a_stop_string_of_half_a_character_does_not_exist_but_one_of_it_all_does(tokenizer):
    stream = TextStream(tokenizer, ["🚲"])
    assert "".join(pushed(stream, tokenizer.encode("ab🚲c", add_special_tokens=False))) == "ab"
    assert stream.is_stopped


texts = st.text(st.sampled_from("ab é東🚲\n.") | st.characters(exclude_categories=["Cs"]), max_size=40)


@given(text=texts)
@settings(max_examples=200, deadline=None)
def test_deltas_add_up_to_the_text(tokenizer, text: str):
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    stream = TextStream(tokenizer)
    assert "".join(pushed(stream, ids)) == stream.text == text


@given(ids=st.lists(st.integers(14, 511), max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_tokens_at_all_add_up_to_what_the_tokenizer_makes_of_them(tokenizer, ids: list[int]):
    ids = [i for i in ids if i < len(tokenizer)]
    stream = TextStream(tokenizer)
    assert "".join(pushed(stream, ids)) == stream.text == tokenizer.decode(ids, skip_special_tokens=True)


@given(text=texts, stop=st.lists(st.text("ab 東🚲\n", min_size=1, max_size=4), min_size=1, max_size=3))
@settings(max_examples=300, deadline=None)
def test_no_stop_string_is_ever_in_the_text_and_nothing_shown_is_taken_back(tokenizer, text: str, stop: list[str]):
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    stream = TextStream(tokenizer, stop)
    assert "".join(pushed(stream, ids)) == stream.text
    assert text.startswith(stream.text)
    assert not any(s in stream.text for s in stop)
    if stream.is_stopped:
        assert any(text.startswith(s, len(stream.text)) for s in stop)
    else:
        assert stream.text == text
