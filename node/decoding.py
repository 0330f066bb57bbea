"""From logits to tokens, and from tokens to text that is certain."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

_MIN_TEMPERATURE = 1e-6  # below it scores could overflow, and nothing but the likeliest token is left anyway


class TokenChooser:
    """Greedy, or sampled with temperature and top-p by transformers' own logits processors."""

    def __init__(self, *, temperature: float = 0.0, top_p: float = 1.0, seed: int | None = None) -> None:
        self._is_greedy = temperature < _MIN_TEMPERATURE
        self._processors = LogitsProcessorList()
        if self._is_greedy:
            return
        self._processors.append(TemperatureLogitsWarper(float(temperature)))
        if top_p < 1:
            self._processors.append(TopPLogitsWarper(top_p))
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def choose(self, ids: Sequence[int], logits: Tensor, likeliest: int | None = None) -> int:
        """The next token after `ids`; logits (vocabulary,), `likeliest` the largest one's index if it is known."""
        if self._is_greedy:
            return int(logits.argmax()) if likeliest is None else likeliest
        scores = self._processors(torch.tensor([ids], device=logits.device), logits[None])  # type: ignore[arg-type]
        # Drawn on the CPU, so that a seed gives the same answer on every device.
        return int(torch.multinomial(scores[0].softmax(-1).cpu(), 1, generator=self._generator))


class TextStream:
    """Turns tokens into text as they come, and ends at a stop string.

    Held back are bytes that are no whole character yet, and text that may be the beginning of a stop string.
    """

    def __init__(self, tokenizer, stop: Sequence[str] = ()) -> None:  # type: ignore[no-untyped-def]
        self._tokenizer = tokenizer
        self._stop = [s for s in stop if s]
        self._ids: list[int] = []
        self._num_read = 0  # tokens whose text is in `_decoded`
        self._window = 0  # where decoding starts over: a token's text may depend on the one before it
        self._decoded = ""
        self._num_emitted = 0
        self.is_stopped = False

    @property
    def text(self) -> str:
        """All text so far; without the stop string, if one was found."""
        return self._decoded

    def push(self, token: int) -> str:
        """Take one more token; returns the text that is now certain."""
        self._ids.append(token)
        before = self._decode(self._window, self._num_read)
        after = self._decode(self._window, len(self._ids))
        if len(after) > len(before) and not after.endswith("\N{REPLACEMENT CHARACTER}"):
            self._window, self._num_read = self._num_read, len(self._ids)
            self._append(after[len(before) :])
        return self._emit(self._num_certain())

    def finish(self) -> str:
        """No more tokens come; returns what was held back."""
        if not self.is_stopped and self._num_read < len(self._ids):
            before = self._decode(self._window, self._num_read)
            self._append(self._decode(self._window, len(self._ids))[len(before) :])
            self._num_read = len(self._ids)
        return self._emit(len(self._decoded))

    def _append(self, text: str) -> None:
        self._decoded += text
        found = [at for at in (self._decoded.find(s, self._num_emitted) for s in self._stop) if at >= 0]
        if found:
            self.is_stopped = True
            self._decoded = self._decoded[: min(found)]

    def _num_certain(self) -> int:
        if self.is_stopped:
            return len(self._decoded)
        held = max((_overlap(self._decoded[self._num_emitted :], s) for s in self._stop), default=0)
        return len(self._decoded) - held

    def _emit(self, stop: int) -> str:
        delta = self._decoded[self._num_emitted : stop]
        self._num_emitted = max(self._num_emitted, stop)
        return delta

    def _decode(self, start: int, stop: int) -> str:
        return self._tokenizer.decode(self._ids[start:stop], skip_special_tokens=True)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
