"""The measure of every answer: transformers itself, with its eager attention, over a whole prompt in one pass."""

from collections.abc import Sequence

import numpy as np
import torch
import transformers
from checkpoints import Checkpoints
from torch import Tensor

from onlooker.node.chunk import Chunk
from onlooker.node.layout import LAYOUTS, LayoutState, Patches, Span
from onlooker.node.model import VisionLanguageModel
from onlooker.node.preprocess import to_patches


class OnePass:
    """A checkpoint loaded a second time, with no memory. Prompts come from the layout, which has tests of its own."""

    def __init__(self, checkpoints: Checkpoints, family: str) -> None:
        self._ours: VisionLanguageModel = checkpoints.model(family)
        self._model = transformers.AutoModelForImageTextToText.from_pretrained(
            checkpoints.path(family), dtype=torch.float32, attn_implementation="eager"
        ).eval()

    @torch.inference_mode()
    def prompt(self, layout: str, chunks: Sequence[Chunk], question: str) -> "Prompt":
        """Chunks of frames that need no resize, and a question."""
        geometry, written = self._ours.geometry, LAYOUTS[layout](self._ours.format)
        state, spans, seen = LayoutState(), [], []
        for chunk in chunks:
            frames = torch.from_numpy(np.stack([picture.pixels for picture in chunk.pictures]))
            patches = to_patches(frames, chunk.size, geometry)
            rows, columns = geometry.grid(chunk.size)
            times = [picture.stream_ns for picture in chunk.pictures]
            pairs = tuple(zip(times[::2], times[1::2], strict=True)) if len(times) > 1 else ((times[0], times[0]),)
            span, state = written.extend(state, Patches(rows, columns, pairs, is_image=len(times) == 1))
            spans.append(span)
            grid = torch.tensor([[len(pairs), rows * geometry.merge, columns * geometry.merge]])
            seen.append(self._model.model.visual(patches, grid_thw=grid, return_dict=True))
        spans.append(written.question(state, question))
        return Prompt(spans, seen)

    @torch.inference_mode()
    def logits(self, prompt: "Prompt", continuation: Sequence[int] = (), visible: np.ndarray | None = None) -> Tensor:
        """Logits (n, vocabulary) after the prompt's last token and after each of the continuation.

        visible (tokens, tokens), bool: what each token sees, if not all before it.
        """
        core = self._model.model
        last = prompt.spans[-1].next_position
        own = np.arange(last, last + len(continuation))
        ids = np.concatenate([*(span.ids for span in prompt.spans), np.array(continuation, dtype=np.int64)])
        positions = np.concatenate(
            [*(span.positions for span in prompt.spans), np.broadcast_to(own, (3, len(own)))], axis=1
        )
        visual = np.concatenate([*(span.visual for span in prompt.spans), np.zeros(len(own), dtype=bool)])
        embeds = core.get_input_embeddings()(torch.from_numpy(ids))[None]
        mask = torch.from_numpy(visual)[None]
        extra = {}
        if visible is not None:
            hidden_ones = torch.from_numpy(~visible)[None, None]
            extra["attention_mask"] = torch.zeros(hidden_ones.shape).masked_fill(hidden_ones, -torch.inf)
        if prompt.seen:
            embeds = embeds.masked_scatter(mask[..., None], torch.cat([out.pooler_output for out in prompt.seen]))
            deepstack = [getattr(out, "deepstack_features", None) for out in prompt.seen]
            if deepstack[0]:
                features = [torch.cat(layer) for layer in zip(*deepstack, strict=True)]
                extra |= {"visual_pos_masks": mask, "deepstack_visual_embeds": features}
        hidden = core.language_model(
            inputs_embeds=embeds, position_ids=torch.from_numpy(positions)[:, None], use_cache=False, **extra
        ).last_hidden_state[0]
        return self._model.lm_head(hidden[-1 - len(continuation) :])

    def greedy(self, prompt: "Prompt", max_new_tokens: int, ends: Sequence[int] = ()) -> list[int]:
        """The likeliest tokens one by one, each by a pass over everything before it."""
        ids: list[int] = []
        while len(ids) < max_new_tokens:
            token = int(self.logits(prompt, ids)[-1].argmax())
            if token in ends:
                break
            ids.append(token)
        return ids

    def log_probs(self, prompt: "Prompt", ids: Sequence[int]) -> list[float]:
        """Log-probability of each token of a continuation."""
        rows = self.logits(prompt, ids)[:-1].log_softmax(-1)
        return [float(row[token]) for row, token in zip(rows, ids, strict=True)]


class Prompt:
    """The spans of a whole prompt, and what the vision tower makes of its chunks."""

    def __init__(self, spans: list[Span], seen: list) -> None:
        self.spans = spans
        self.seen = seen
