"""How a stream becomes a prompt: token ids and M-RoPE positions, as pure functions of what came before.

A layout never looks at pixels or tensors. It is told the grid and the times of the temporal patches of a
chunk and answers with a span, the tokens to append, and the state the next call starts from. Positions follow
the rule that the Qwen2-VL checkpoints were trained with: text continues at the largest position on any axis
plus one (transformers up to 5.2; later versions differ for Qwen2-VL and Qwen2.5-VL).

Sources: Qwen2-VL (arXiv 2409.12191) for M-RoPE, Qwen2.5-VL (arXiv 2502.13923) for absolute time,
Qwen3-VL (arXiv 2511.21631) for timestamps as text.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

_NS = 1_000_000_000

Tokenize = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class Format:
    """What the prompts of one model family look like.

    `style` is "open" (a video is one run of patches, the clock is in the positions) or "stamped" (each temporal
    patch is a block of its own, the clock is written before it as text). `tokens_per_second` scales the clock
    of an open video; None advances it by one for each temporal patch.
    """

    style: str
    tokens_per_second: float | None
    system: str | None
    video_pad: int
    image_pad: int
    tokenize: Tokenize  # template text, special tokens recognised
    tokenize_plain: Tokenize  # a user's text: special tokens in it are letters like any others


@dataclass(frozen=True, slots=True)
class Patches:
    """The temporal patches of one chunk: their merged grid, and the stream times of the frames in each."""

    height: int  # merged tokens
    width: int
    times_ns: tuple[tuple[int, int], ...]  # first and last frame of each temporal patch, on the stream's clock
    is_image: bool = False  # image mode: one frame, outside any video

    @property
    def num_tokens(self) -> int:
        """Of the pictures alone."""
        return self.height * self.width * len(self.times_ns)

    def since(self, began_ns: int) -> "Patches":
        """The same at times that count from another instant."""
        return replace(self, times_ns=tuple((first - began_ns, last - began_ns) for first, last in self.times_ns))


@dataclass(frozen=True, slots=True)
class OpenVideo:
    """A video segment that later chunks go on with."""

    base: int  # position of its first temporal patch
    start_ns: int
    height: int
    width: int
    offset: int  # temporal offset of its newest patch


@dataclass(frozen=True, slots=True)
class LayoutState:
    """Where a stream's prompt stands."""

    next_position: int = 0
    video: OpenVideo | None = None
    is_empty: bool = True


@dataclass(frozen=True, slots=True)
class Reach:
    """Positions of the tokens of a chunk."""

    first: int = 0  # on the time axis
    base: int = 0  # the least one on the axes of height and width: in an open video that of the whole video
    extent: int = 0  # how many there are on these

    def max_shift(self, floor: int) -> int:
        """How far a chunk and all after it can move down, with none of them below `floor` and in their order."""
        # An open video keeps its height and width while its time moves down; what comes later must stay above it.
        return max(0, self.first - floor - self.extent)


@dataclass(frozen=True, slots=True)
class Rebase:
    """All positions from `floor` on move down by `shift`, and none below `floor`.

    On the axes of height and width an open video moves no further than to where it would begin if it were new, so that
    the positions are those of a shorter video.
    """

    shift: int
    floor: int

    def of(self, base: int) -> tuple[int, int, int]:
        """How far tokens move that share a base, by axis: time, height, width."""
        across = min(self.shift, base - self.floor)
        return self.shift, across, across

    def reach(self, reach: Reach) -> Reach:
        time, across, _ = self.of(reach.base)
        return Reach(reach.first - time, reach.base - across, reach.extent)


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """Tokens to append: ids (n,) and positions (3, n) in the order time, height, width; int64."""

    ids: np.ndarray
    positions: np.ndarray
    visual: np.ndarray  # (n,), bool: which tokens take vision features
    next_position: int

    def __len__(self) -> int:
        return len(self.ids)

    def first(self, num: int) -> "Span":
        """The first tokens by themselves, at least one."""
        positions = self.positions[:, :num]
        return Span(self.ids[:num], positions, self.visual[:num], int(positions.max()) + 1)

    @staticmethod
    def joined(spans: "Sequence[Span]") -> "Span":
        """Spans one after the other, each with the positions that it has."""
        if len(spans) == 1:
            return spans[0]
        return Span(
            np.concatenate([span.ids for span in spans]),
            np.concatenate([span.positions for span in spans], axis=1),
            np.concatenate([span.visual for span in spans]),
            spans[-1].next_position,
        )

    def reach(self, num_anchor: int = 0) -> Reach:
        """Positions of the tokens after an anchor."""
        time, across = self.positions[0, num_anchor:], self.positions[1:, num_anchor:]
        return Reach(int(time[0]), int(across.min()), int(across.max() - across.min()) + 1)


@dataclass(slots=True)
class _Writer:
    """Collects the pieces of a span."""

    next_position: int
    _ids: list[np.ndarray] = field(default_factory=list)
    _positions: list[np.ndarray] = field(default_factory=list)
    _visual: list[np.ndarray] = field(default_factory=list)

    def text(self, ids: list[int]) -> None:
        positions = np.arange(self.next_position, self.next_position + len(ids))
        self._add(np.array(ids, dtype=np.int64), np.broadcast_to(positions, (3, len(ids))), visual=False)

    def patch(self, pad: int, base: int, offset: int, height: int, width: int) -> None:
        """One temporal patch of height x width merged tokens, row by row."""
        rows, columns = np.divmod(np.arange(height * width), width)
        positions = np.stack([np.full_like(rows, base + offset), base + rows, base + columns])
        self._add(np.full(height * width, pad, dtype=np.int64), positions, visual=True)

    def _add(self, ids: np.ndarray, positions: np.ndarray, *, visual: bool) -> None:
        if not len(ids):
            return
        self._ids.append(ids)
        self._positions.append(positions)
        self._visual.append(np.full(len(ids), visual))
        self.next_position = max(self.next_position, int(positions.max()) + 1)

    def span(self) -> Span:
        return Span(
            np.concatenate(self._ids),
            np.concatenate(self._positions, axis=1),
            np.concatenate(self._visual),
            self.next_position,
        )


class Layout(ABC):
    """Turns chunks and questions into spans. Holds no state of any stream."""

    def __init__(self, form: Format) -> None:
        self._form = form

    @abstractmethod
    def extend(self, state: LayoutState, patches: Patches) -> tuple[Span, LayoutState]:
        """The tokens of one more chunk, and the state after it."""

    @abstractmethod
    def num_anchor(self, patches: Patches) -> int:
        """How many tokens of the first chunk of a prompt open it, so that it is no prompt without them."""

    @abstractmethod
    def question(self, state: LayoutState, text: str) -> Span:
        """What a branch appends to ask: the closing of the stream, the question, the assistant's header."""

    def rebased(self, state: LayoutState, rebase: Rebase) -> LayoutState:
        """A state once the positions have moved; an open video's clock goes on."""
        if state.is_empty:
            return state
        next_position, video = max(rebase.floor, state.next_position - rebase.shift), state.video
        if video is not None:
            time, across, _ = rebase.of(video.base)
            per_second = self._form.tokens_per_second
            video = replace(
                video,
                base=video.base - across,
                offset=max(0, video.offset - (time - across)),
                start_ns=video.start_ns + (round((time - across) / per_second * _NS) if per_second else 0),
            )
            next_position = max(next_position, video.base + max(video.height, video.width))
        return LayoutState(next_position, video, is_empty=False)

    @property
    def _system(self) -> str:
        system = self._form.system
        return f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""

    def _template(self, writer: _Writer, text: str) -> None:
        writer.text(self._form.tokenize(text))

    def _ask(self, writer: _Writer, opening: str, text: str) -> Span:
        self._template(writer, opening)
        writer.text(self._form.tokenize_plain(text))
        self._template(writer, "<|im_end|>\n<|im_start|>assistant\n")
        return writer.span()

    def _num_tokens(self, text: str) -> int:
        return len(self._form.tokenize(text))

    def _closed(self, writer: _Writer, patches: Patches) -> None:
        """A chunk whose vision blocks are closed at once."""
        pad = self._form.image_pad if patches.is_image else self._form.video_pad
        if self._form.style == "stamped":
            for first_ns, last_ns in patches.times_ns:
                seconds = (first_ns + last_ns) / 2 / _NS
                self._template(writer, f"<{seconds:.1f} seconds><|vision_start|>")
                writer.patch(pad, writer.next_position, 0, patches.height, patches.width)
                self._template(writer, "<|vision_end|>")
            return
        self._template(writer, "<|vision_start|>")
        self._run(writer, pad, _start(writer, patches), patches)
        self._template(writer, "<|vision_end|>")

    def _run(self, writer: _Writer, pad: int, video: OpenVideo, patches: Patches) -> OpenVideo:
        """Temporal patches that continue an open video."""
        for first_ns, _ in patches.times_ns:
            video = replace(video, offset=self._offset(video, first_ns))
            writer.patch(pad, video.base, video.offset, patches.height, patches.width)
        return video

    def _offset(self, video: OpenVideo, time_ns: int) -> int:
        """Temporal position of a patch within its video, never before its predecessor."""
        if self._form.tokens_per_second is None:
            return video.offset + 1
        elapsed = (time_ns - video.start_ns) * self._form.tokens_per_second / _NS
        # A tenth of a position of grace: a camera that is some milliseconds early must not fall a step back.
        return max(video.offset, int(elapsed + 0.1))


class NativeLayout(Layout):
    """The prompt that an offline run over the whole video would have had, left open at its end.

    Open style: one video segment that every chunk goes on with; its end marker comes with the question. A new
    frame size starts a new segment. Stamped style: block after block in one user turn that stays open.
    """

    def extend(self, state: LayoutState, patches: Patches) -> tuple[Span, LayoutState]:
        writer = _Writer(state.next_position)
        if state.is_empty:
            self._template(writer, self._opening)
        if patches.is_image or self._form.style == "stamped":
            self._close(writer, state.video)
            self._closed(writer, patches)
            video = None
        else:
            video = self._continue(writer, state.video, patches)
        return writer.span(), LayoutState(writer.next_position, video, is_empty=False)

    def num_anchor(self, patches: Patches) -> int:
        if patches.is_image or self._form.style == "stamped":
            return self._num_tokens(self._opening)
        return self._num_tokens(self._opening) + self._num_tokens("<|vision_start|>")

    def question(self, state: LayoutState, text: str) -> Span:
        writer = _Writer(state.next_position)
        self._close(writer, state.video)
        return self._ask(writer, self._opening if state.is_empty else "", text)

    @property
    def _opening(self) -> str:
        return f"{self._system}<|im_start|>user\n"

    def _close(self, writer: _Writer, video: OpenVideo | None) -> None:
        if video is not None:
            self._template(writer, "<|vision_end|>")

    def _continue(self, writer: _Writer, video: OpenVideo | None, patches: Patches) -> OpenVideo:
        if video is None or (video.height, video.width) != (patches.height, patches.width):
            self._close(writer, video)
            self._template(writer, "<|vision_start|>")
            video = _start(writer, patches)
        return self._run(writer, self._form.video_pad, video, patches)


class TurnsLayout(Layout):
    """Every chunk is a user turn of its own; the system prompt comes once, with the first."""

    def extend(self, state: LayoutState, patches: Patches) -> tuple[Span, LayoutState]:
        writer = _Writer(state.next_position)
        self._template(writer, self._turn(state))
        self._closed(writer, patches)
        self._template(writer, "<|im_end|>\n")
        return writer.span(), LayoutState(writer.next_position, is_empty=False)

    def num_anchor(self, patches: Patches) -> int:
        return self._num_tokens(self._turn(LayoutState()))

    def question(self, state: LayoutState, text: str) -> Span:
        return self._ask(_Writer(state.next_position), self._turn(state), text)

    def _turn(self, state: LayoutState) -> str:
        return f"{self._system if state.is_empty else ''}<|im_start|>user\n"


LAYOUTS: dict[str, type[Layout]] = {"native": NativeLayout, "turns": TurnsLayout}


def _start(writer: _Writer, patches: Patches) -> OpenVideo:
    """A video that begins here; its offset lies one before the first patch, so that a count starts at 0."""
    return OpenVideo(writer.next_position, patches.times_ns[0][0], patches.height, patches.width, offset=-1)
