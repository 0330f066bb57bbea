"""Questions about a story as far as its frames were shown, with the right answer and wrong ones.

A thing counts as seen when at least one of the frames shown has it; "now" is the newest of them.

    story = make_story(7)
    quiz = ask_about(story, np.arange(0, 12, 0.5), np.random.default_rng(0), kind="first")
    quiz.question, quiz.answer  # "Which thing appeared first?", "a red circle"
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from .scene_wordings import WORDINGS
from .story import COLOURS, DIRECTIONS, PLACES, SHAPES, Split, Story, Thing, make_plain_story

Phrasing = Literal["train", "test"]

NUM_OPTIONS = 4
MAX_LISTED = 6  # longer lists are asked of nobody
MAX_COUNT = 12
MIN_MOVE = 0.08  # of the frame; what moved less while in view is not asked about
MAX_ASIDE = 0.07  # from the middle of the frame, for a thing in the "middle"
MIN_ASIDE = 0.13  # for one on the left, right, top or bottom
CLOCK_GRACE_S = 0.05  # a camera that is some milliseconds early must not fall a second back
MAX_CORPUS_S = 99
MAX_SECONDS_OFF = 1
# Where one answer would come too often, most of its questions are dropped:
EMPTY_SEEN_SHARE = 0.1  # has x appeared, before anything did
EMPTY_VIEW_SHARE = 0.5  # what is visible, and is x, with nothing in view
END_SHARE = 0.25  # what came before the first thing, or after the last
STILL_SHARE = 0.3  # which way does it move, of a thing that stands still

_MOMENT = re.compile(r"at (\d{1,6}) seconds?")

NOTHING_NOW = "nothing"
NOTHING_YET = "nothing yet"


@dataclass(frozen=True, slots=True)
class Quiz:
    """A question with its one right answer; `options` has it once among wrong ones, in random order."""

    kind: str
    question: str
    answer: str
    options: tuple[str, ...]


def is_right(quiz: Quiz, text: str) -> bool:
    """Whether a text is the answer: case, spaces, articles and a final full stop apart, word for word.

    Of two things that are in view together, either may be named first. A time may be a second off: a model sees
    frames in pairs, and the two of a pair have one time.
    """
    given, wanted = _plain(text), _plain(quiz.answer)
    if quiz.kind == "when_x" and (told := _MOMENT.fullmatch(given)) and (meant := _MOMENT.fullmatch(wanted)):
        return abs(int(told[1]) - int(meant[1])) <= MAX_SECONDS_OFF
    if quiz.kind == "what_now" and len(parts := wanted.split(" and ")) == 2:
        return given in (wanted, " and ".join(reversed(parts)))
    return given == wanted


def _plain(text: str) -> str:
    words = text.strip().removesuffix(".").lower().replace(",", " , ").split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def with_article(name: str) -> str:
    """As in "a red circle" and "an orange circle"."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def place_of(x: float, y: float) -> str | None:
    """Where in the frame a centre is, one of PLACES, or None between them."""
    across, down = x - 0.5, y - 0.5
    far, near = max(abs(across), abs(down)), min(abs(across), abs(down))
    if far <= MAX_ASIDE:
        return "middle"
    if far < MIN_ASIDE or near > far / 2:
        return None
    if abs(across) > abs(down):
        return "left" if across < 0 else "right"
    return "top" if down < 0 else "bottom"


class Run(NamedTuple):
    """One appearance as the frames shown have it: the indices of the first and the last frame with it."""

    thing: Thing
    first: int
    last: int

    @property
    def name(self) -> str:
        return self.thing.name


class Seen:
    """What the frames shown of a story amount to."""

    def __init__(self, story: Story, times_s: npt.NDArray[np.float64]) -> None:
        self._story = story
        self.times_s = times_s
        self.runs: list[Run] = []  # by first frame, then in the story's order
        for thing in story.things:
            first, until = np.searchsorted(times_s, (thing.start_s, thing.end_s)).tolist()
            if first < until:
                self.runs.append(Run(thing, first, until - 1))
        self.runs.sort(key=lambda run: run.first)

    @property
    def now_s(self) -> float:
        return float(self.times_s[-1])

    @property
    def visible(self) -> list[Run]:
        return [run for run in self.runs if run.last == len(self.times_s) - 1]

    @property
    def names(self) -> list[str]:
        """The different things, in the order in which they first appeared."""
        return list(dict.fromkeys(run.name for run in self.runs))

    @property
    def busy_share(self) -> float:
        """About how much of the story has something in view."""
        shown_s = sum(thing.end_s - thing.start_s for thing in self._story.things)
        return min(shown_s / self._story.duration_s, 1.0)

    def second(self, run: Run) -> int:
        """The whole seconds on the stream's clock when a run begins."""
        return math.floor(float(self.times_s[run.first] - self.times_s[0]) + CLOCK_GRACE_S)

    def is_alone(self, index: int) -> bool:
        """Whether no other run begins in the same frame as this one."""
        return all(run.first != self.runs[index].first for i, run in enumerate(self.runs) if i != index)

    def once(self) -> list[int]:
        """Indices of the runs of things that appeared once."""
        times = Counter(run.name for run in self.runs)
        return [i for i, run in enumerate(self.runs) if times[run.name] == 1]


class _Draft(NamedTuple):
    """A question before it is worded: its answer, wrong answers (the likeliest mistakes first), its `{x}`."""

    answer: str
    wrong: Iterable[str]
    x: str | None = None
    form: str | None = None  # a key of WORDINGS, where it is not the kind


def ask_about(
    story: Story,
    frame_times_s: npt.ArrayLike,
    rng: np.random.Generator,
    *,
    kind: str | None = None,
    clock: bool = True,
    phrasings: Phrasing = "train",
) -> Quiz | None:
    """Ask something about the frames shown so far, oldest first, of one kind or of any kind that fits.

    None when the kind makes no sense there, when more than one answer could be defended, and at times where one answer
    would come too often. Seconds are whole ones on a clock that starts with the first frame; without a `clock` nobody
    is asked for them.
    """
    times_s = np.asarray(frame_times_s, np.float64)
    if len(times_s) == 0:
        raise ValueError("no frame was shown: there is no now to ask about")
    seen = Seen(story, times_s)
    for candidate in [kind] if kind else _kinds_in_turn(rng):
        if candidate == "when_x" and not clock:
            continue
        if draft := _DRAFTS[candidate](seen, rng):
            return _worded(candidate, draft, rng, phrasings)
    return None


class Recalled(NamedTuple):
    """A question about a thing, and how many frames ago it was seen last; 0 while it is in view."""

    num_frames_ago: int
    quiz: Quiz


def ask_back(
    story: Story, frame_times_s: npt.ArrayLike, rng: np.random.Generator, *, phrasings: Phrasing = "train"
) -> list[Recalled]:
    """Ask for the colour of every shape that the frames shown so far have in one colour only."""
    seen = Seen(story, np.asarray(frame_times_s, np.float64))
    newest = len(seen.times_s) - 1
    return [
        Recalled(newest - run.last, _worded("colour_of_shape", _colour_draft(seen, rng, run), rng, phrasings))
        for run in _of_one_colour(seen)
    ]


def _kinds_in_turn(rng: np.random.Generator) -> list[str]:
    """All kinds in random order, those that fit seldom more often near the front."""
    turns = rng.exponential(size=len(KINDS)) / _ODDS
    return [KINDS[i] for i in np.argsort(turns)]


def _worded(kind: str, draft: _Draft, rng: np.random.Generator, phrasings: Phrasing) -> Quiz:
    choices: tuple[str, ...] = getattr(WORDINGS[draft.form or kind], phrasings)
    question = choices[rng.integers(len(choices))]
    if draft.x is not None:
        question = question.format(x=draft.x)
    return Quiz(kind, question, draft.answer, _options(kind, draft, rng))


def _options(kind: str, draft: _Draft, rng: np.random.Generator) -> tuple[str, ...]:
    """The answer and the first wrong ones that differ from it and from each other, shuffled."""
    options = [draft.answer]
    for text in draft.wrong:
        if len(options) == NUM_OPTIONS:
            break
        if not any(is_right(Quiz(kind, "", option, ()), text) for option in options):
            options.append(text)
    return tuple(options[i] for i in rng.permutation(len(options)))


def _shuffled(rng: np.random.Generator, items: Iterable[str]) -> list[str]:
    texts = tuple(items)
    return [texts[i] for i in rng.permutation(len(texts))]


def _any_name(rng: np.random.Generator) -> str:
    colours = tuple(COLOURS)
    return f"{colours[rng.integers(len(colours))]} {SHAPES[int(rng.integers(len(SHAPES)))]}"


def _wrong_words(rng: np.random.Generator, seen: Iterable[str], known: Iterable[str]) -> Iterator[str]:
    """Single words, one that was seen first: the likeliest mistake."""
    yield from _shuffled(rng, dict.fromkeys(seen))[:2]
    yield from _shuffled(rng, known)


def _wrong_things(rng: np.random.Generator, right: str | None, seen: Seen, nothing: str) -> Iterator[str]:
    """Things: some that were seen, half-right ones, any, and at times that there was none."""
    if right is not None and rng.random() < 0.4:
        yield nothing
    names = [name for name in seen.names if name != right]
    yield from map(with_article, _shuffled(rng, names)[: rng.integers(1, NUM_OPTIONS)])
    if right is not None:
        yield with_article(_half_right(rng, right))
    while True:
        yield with_article(_any_name(rng))


def _half_right(rng: np.random.Generator, name: str) -> str:
    """Another thing of the same shape or of the same colour."""
    colour, shape = name.split()
    if rng.random() < 0.5:
        return f"{_other(rng, tuple(COLOURS), colour)} {shape}"
    return f"{colour} {_other(rng, SHAPES, shape)}"


def _other(rng: np.random.Generator, words: Sequence[str], word: str) -> str:
    rest = [other for other in words if other != word]
    return rest[rng.integers(len(rest))]


def _colour_now(seen: Seen, rng: np.random.Generator) -> _Draft | None:
    if len(seen.visible) != 1:
        return None
    return _Draft(seen.visible[0].thing.colour, _wrong_words(rng, (run.thing.colour for run in seen.runs), COLOURS))


def _shape_now(seen: Seen, rng: np.random.Generator) -> _Draft | None:
    if len(seen.visible) != 1:
        return None
    return _Draft(seen.visible[0].thing.shape, _wrong_words(rng, (run.thing.shape for run in seen.runs), SHAPES))


def _what_now(seen: Seen, rng: np.random.Generator) -> _Draft | None:
    names = [run.name for run in _in_reading_order(seen)]
    if not names and rng.random() > EMPTY_VIEW_SHARE:
        return None
    if len(names) < 2:
        answer = with_article(names[0]) if names else NOTHING_NOW
        return _Draft(answer, _wrong_things(rng, names[0] if names else None, seen, NOTHING_NOW))
    return _Draft(_pair(names), _wrong_pairs(rng, names, seen))


def _in_reading_order(seen: Seen) -> list[Run]:
    """What is in view: left before right where it stands side by side, else top before bottom."""
    runs = seen.visible
    if len(runs) < 2:
        return runs
    (xa, ya), (xb, yb) = (run.thing.position_at(seen.now_s) for run in runs)
    swapped = xa > xb if abs(xa - xb) >= abs(ya - yb) else ya > yb
    return runs[::-1] if swapped else runs


def _pair(names: Sequence[str]) -> str:
    return " and ".join(map(with_article, names))


def _wrong_pairs(rng: np.random.Generator, names: list[str], seen: Seen) -> Iterator[str]:
    """One of the two alone, or one of them beside another one."""
    yield with_article(names[rng.integers(2)])
    others = [name for name in seen.names if name not in names]
    if others:
        yield _pair([names[0], others[rng.integers(len(others))]])
    while True:
        i = int(rng.integers(2))
        other = _half_right(rng, names[1 - i])
        if other not in names:
            yield _pair([names[i], other] if i == 0 else [other, names[i]])


def _where_now(seen: Seen, rng: np.random.Generator) -> _Draft | None:
    run = _any_visible(seen, rng)
    place = run and place_of(*run.thing.position_at(seen.now_s))
    if run is None or place is None:
        return None
    return _about_now(seen, rng, run, "where_now", place, _shuffled(rng, PLACES))


def _motion_now(seen: Seen, rng: np.random.Generator) -> _Draft | None:
    run = _any_visible(seen, rng)
    if run is None or run.first == run.last:
        return None
    (x0, y0), (x1, y1) = (run.thing.position_at(float(seen.times_s[i])) for i in (run.first, run.last))
    direction = run.thing.direction
    if direction is None and rng.random() > STILL_SHARE:
        return None
    if direction is not None and math.hypot(x1 - x0, y1 - y0) < MIN_MOVE:
        return None
    known = ["still", *(f"moving {way}" for way in DIRECTIONS)]
    return _about_now(
        seen, rng, run, "motion_now", f"moving {direction}" if direction else "still", _shuffled(rng, known)
    )


def _any_visible(seen: Seen, rng: np.random.Generator) -> Run | None:
    return seen.visible[rng.integers(len(seen.visible))] if seen.visible else None


def _about_now(seen: Seen, rng: np.random.Generator, run: Run, kind: str, answer: str, wrong: Iterable[str]) -> _Draft:
    """A question about something in view, by name where there are two, and sometimes where there is one."""
    if len(seen.visible) > 1 or rng.random() < 0.4:
        return _Draft(answer, wrong, run.name, f"{kind} of x")
    return _Draft(answer, wrong)


def _first(seen: Seen, rng: np.random.Generator) -> _Draft | None:
    if not seen.runs or not seen.is_alone(0):
        return None
    return _thing_draft(rng, seen, seen.runs[0].name)


def _last(seen: Seen, rng: np.random.Generator) -> _Draft | None:
    """The one that came last must also be the one that is still in view, or was longest: else both are meant."""
    if not seen.runs or not seen.is_alone(len(seen.runs) - 1):
        return None
    if any(run.last > seen.runs[-1].last for run in seen.runs):
        return None
    return _thing_draft(rng, seen, seen.runs[-1].name)


def _thing_draft(
    rng: np.random.Generator, seen: Seen, name: str | None, x: str | None = None, nothing: str = NOTHING_YET
) -> _Draft:
    answer = nothing if name is None else with_article(name)
    return _Draft(answer, _wrong_things(rng, name, seen, nothing), x)


def _after_x(seen: Seen, rng: np.random.Generator) -> _Draft | None:
    return _beside_x(seen, rng, 1, NOTHING_YET)


def _before_x(seen: Seen, rng: np.random.Generator) -> _Draft | None:
    return _beside_x(seen, rng, -1, NOTHING_NOW)


def _beside_x(seen: Seen, rng: np.random.Generator, step: int, nothing: str) -> _Draft | None:
    """What came one step after or before a thing that appeared once."""
    known = seen.once()
    if not known:
        return None
    index = known[rng.integers(len(known))]
    beside = index + step
    if not seen.is_alone(index):
        return None
    if not 0 <= beside < len(seen.runs):
        if rng.random() > END_SHARE:
            return None
        return _thing_draft(rng, seen, None, seen.runs[index].name, nothing)
    if not seen.is_alone(beside):
        return None
    return _thing_draft(rng, seen, seen.runs[beside].name, seen.runs[index].name, nothing)


def _all_in_order(seen: Seen, rng: np.random.Generator) -> _Draft | None:
    names = seen.names
    firsts = {name: next(run.first for run in seen.runs if run.name == name) for name in names}
    if not names or len(names) > MAX_LISTED or len(set(firsts.values())) < len(names):
        return None
    return _Draft(_listed(names), _wrong_lists(rng, names))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(with_article, names))


def _wrong_lists(rng: np.random.Generator, names: list[str]) -> Iterator[str]:
    """Lists of other order or with another thing, and at times with one too few, or else with one too many.

    Never both beside each other: then the list of middling length would be the right one too often.
    """
    extra = int(rng.integers(-1, 2))
    while True:
        other = list(names)
        place = int(rng.integers(len(names)))
        choice = rng.random()
        if choice < 0.35:
            other = _shuffled(rng, names)
        elif choice < 0.65 and extra < 0 and len(names) > 1:
            del other[place]
        elif choice < 0.65 and extra > 0:
            other.insert(place + 1, _half_right(rng, names[place]))
        else:
            other[place] = _half_right(rng, names[place])
        if len(set(other)) == len(other):
            yield _listed(other)


def _how_many(seen: Seen, rng: np.random.Generator) -> _Draft | None:
    num = len(seen.names)
    if num > MAX_COUNT:
        return None
    # Neighbouring numbers, with the right one anywhere among them.
    lowest = max(num - int(rng.integers(NUM_OPTIONS)), 0)
    return _Draft(str(num), map(str, range(lowest, lowest + NUM_OPTIONS)))


def _seen_x(seen: Seen, rng: np.random.Generator) -> _Draft | None:
    if not seen.runs and rng.random() > EMPTY_SEEN_SHARE:
        return None
    if seen.runs and rng.random() < 0.5:
        return _yes_or_no("yes", _description(rng, seen.runs[rng.integers(len(seen.runs))].name))
    return _yes_or_no("no", _absent(rng, seen.names, seen.names))


def _visible_x(seen: Seen, rng: np.random.Generator) -> _Draft | None:
    names = [run.name for run in seen.visible]
    # With nothing in view only "no" is right: asked there less often where that is most of the time, and made up for
    # by as many more "yes" where something is in view, so that on the whole both are right equally often.
    busy = seen.busy_share
    empty_share = EMPTY_VIEW_SHARE * min(busy / (1 - busy), 1.0) if busy < 1 else EMPTY_VIEW_SHARE
    if not names and rng.random() >= empty_share:
        return None
    if names and rng.random() < 0.5 + empty_share * (1 - busy) / (2 * busy):
        return _yes_or_no("yes", _description(rng, names[rng.integers(len(names))]))
    gone = [name for name in seen.names if name not in names]
    if gone and rng.random() < 0.5:
        return _yes_or_no("no", with_article(gone[rng.integers(len(gone))]))
    return _yes_or_no("no", _absent(rng, names, seen.names))


def _yes_or_no(answer: str, x: str) -> _Draft:
    return _Draft(answer, ("yes", "no"), x)


def _description(rng: np.random.Generator, name: str) -> str:
    """A thing by both words, or by one of them."""
    colour, shape = name.split()
    match int(rng.integers(4)):
        case 0:
            return f"something {colour}"
        case 1:
            return with_article(shape)
        case _:
            return with_article(name)


def _absent(rng: np.random.Generator, present: Sequence[str], likely: Sequence[str]) -> str:
    """Describe what is not there: most often the shape of one thing seen in the colour of another."""
    colours = [colour for colour in COLOURS if not any(name.startswith(colour) for name in present)]
    shapes = [shape for shape in SHAPES if not any(name.endswith(shape) for name in present)]
    choice = rng.random()
    if choice < 0.2 and colours:
        return f"something {colours[rng.integers(len(colours))]}"
    if choice < 0.4 and shapes:
        return with_article(shapes[int(rng.integers(len(shapes)))])
    if choice < 0.85 and likely:
        crossed = [f"{a.split()[0]} {b.split()[1]}" for a in likely for b in likely]
        crossed = [name for name in crossed if name not in present]
        if crossed and rng.random() < 0.5:
            return with_article(crossed[int(rng.integers(len(crossed)))])
        near = _half_right(rng, likely[int(rng.integers(len(likely)))])
        if near not in present:
            return with_article(near)
    while (name := _any_name(rng)) in present:
        pass
    return with_article(name)


def _when_x(seen: Seen, rng: np.random.Generator) -> _Draft | None:
    known = seen.once()
    if not known:
        return None
    run = seen.runs[known[rng.integers(len(known))]]
    second = seen.second(run)
    others = [seen.second(other) for other in seen.runs]
    wrong = (_at_second(other) for other in _wrong_seconds(rng, second, others, seen))
    return _Draft(_at_second(second), wrong, run.name)


def _at_second(second: int) -> str:
    return f"at {second} second{'' if second == 1 else 's'}"


def _wrong_seconds(rng: np.random.Generator, right: int, others: list[int], seen: Seen) -> Iterator[int]:
    yield from [others[i] for i in rng.permutation(len(others))][:2]
    # Every option rules out those that are right beside it: however the others lie, one must be left.
    end = max(math.ceil(seen.now_s - float(seen.times_s[0])), right, (NUM_OPTIONS - 1) * (2 * MAX_SECONDS_OFF + 1))
    while True:
        second = int(rng.integers(end + 1))
        if abs(second - right) > MAX_SECONDS_OFF:
            yield second


def _colour_of_shape(seen: Seen, rng: np.random.Generator) -> _Draft | None:
    known = _of_one_colour(seen)
    return _colour_draft(seen, rng, known[rng.integers(len(known))]) if known else None


def _of_one_colour(seen: Seen) -> list[Run]:
    """The last run of every shape that came in one colour only."""
    lasts = {run.thing.shape: run for run in sorted(seen.runs, key=lambda run: run.last)}
    return [
        lasts[shape]
        for shape in dict.fromkeys(run.thing.shape for run in seen.runs)
        if len({run.thing.colour for run in seen.runs if run.thing.shape == shape}) == 1
    ]


def _colour_draft(seen: Seen, rng: np.random.Generator, run: Run) -> _Draft:
    return _Draft(
        run.thing.colour, _wrong_words(rng, (other.thing.colour for other in seen.runs), COLOURS), run.thing.shape
    )


def _nothing(seen: Seen, rng: np.random.Generator) -> _Draft | None:
    if seen.runs:
        return None
    form = ("all_in_order", "first", "last")[int(rng.integers(3))]
    return _Draft(NOTHING_YET, _wrong_things(rng, None, seen, NOTHING_YET), form=form)


_DRAFTS: dict[str, Callable[[Seen, np.random.Generator], _Draft | None]] = {
    "colour_now": _colour_now,
    "shape_now": _shape_now,
    "what_now": _what_now,
    "where_now": _where_now,
    "first": _first,
    "last": _last,
    "after_x": _after_x,
    "before_x": _before_x,
    "all_in_order": _all_in_order,
    "how_many": _how_many,
    "seen_x": _seen_x,
    "visible_x": _visible_x,
    "when_x": _when_x,
    "motion_now": _motion_now,
    "colour_of_shape": _colour_of_shape,
    "nothing": _nothing,
}

KINDS = tuple(_DRAFTS)

_FITS_SELDOM = {"colour_now": 2.0, "shape_now": 2.0, "where_now": 4.0, "motion_now": 6.0}
_FITS_ALWAYS = {"how_many": 0.5}
_ODDS = np.array([(_FITS_SELDOM | _FITS_ALWAYS).get(kind, 1.0) for kind in KINDS])


def corpus() -> list[str]:
    """What is said in training, for a tokenizer to learn its words from: every question, and answers of each kind."""
    names = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    things = [with_article(name) for name in names]
    xs = {
        "colour_of_shape": SHAPES,
        "seen_x": (*things, *map(with_article, SHAPES), *(f"something {colour}" for colour in COLOURS)),
    }
    xs["visible_x"] = xs["seen_x"]
    questions = [
        text.format(x=x) for form, wording in WORDINGS.items() for text in wording.train for x in xs.get(form, names)
    ]
    moments = [_at_second(second) for second in range(MAX_CORPUS_S + 1)]
    words = ["still", *(f"moving {way}" for way in DIRECTIONS), *PLACES, *COLOURS, *SHAPES]
    words += ["yes", "no", NOTHING_NOW, NOTHING_YET, *map(str, range(MAX_COUNT + 1))]
    pairs = [text for a, b in zip(names, names[7:], strict=False) for text in (_pair((a, b)), _listed((a, b)))]
    return [*questions, *moments, *words, *things, *pairs]


class Round(NamedTuple):
    """The new frames of one round, and what is asked after them."""

    story: Story
    times_s: tuple[float, ...]
    quiz: Quiz


def three_rounds(seed: int, *, split: Split = "test") -> Iterator[Round]:
    """Two frames of a red circle, of a blue square, of a green triangle, with a question after each two."""
    names = ("red circle", "blue square", "green triangle")
    story = make_plain_story(seed, names, show_s=1.0, split=split)
    questions = (
        ("colour_now", "What colour is the shape?"),
        ("all_in_order", "Which shapes have you seen so far?"),
        ("last", "What was the last shape?"),
    )
    rng = np.random.default_rng([3, seed])
    for i, (kind, question) in enumerate(questions):
        draft = _DRAFTS[kind](Seen(story, np.arange(2 * i + 2) / 2), rng)
        assert draft is not None, f"{kind} has no answer in round {i + 1}"
        yield Round(story, (i, i + 0.5), Quiz(kind, question, draft.answer, _options(kind, draft, rng)))
