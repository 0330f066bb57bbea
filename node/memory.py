"""The memory of one stream: an arena on the device, the ledger of what is in it, and the layout between them."""

import logging

import torch
from msgspec import UNSET

from ..protocol.messages import CacheInfo
from .arena import Arena, Extent
from .chunk import Chunk, ChunkRefused, Encoded
from .layout import LAYOUTS, Patches
from .ledger import Ledger, Snapshot
from .model import VisionLanguageModel
from .options import StreamOptions
from .passes import Prefill
from .preprocess import encode_size

logger = logging.getLogger(__name__)


class StreamMemory:
    """Grows by whole chunks. What lies below a length never changes until the memory is cut back below it.

    A chunk is written to rows that nobody reads yet and counts only once all layers have it: whatever fails
    on the way leaves the memory as it was.
    """

    def __init__(self, model: VisionLanguageModel, options: StreamOptions) -> None:
        """Reserve the arena. Raises ValueError if the budget holds no token, MemoryError if it can't be had."""
        capacity = options.memory_bytes // model.kv_shape.bytes_per_token
        if capacity < 1:
            raise ValueError(
                f"memory_bytes {options.memory_bytes} is under {model.kv_shape.bytes_per_token}, one token"
            )
        self.options = options
        self.layout = LAYOUTS[options.layout](model.format)
        self.ledger = Ledger()
        self._is_full = False
        self._model = model
        self._arena = _reserve(model, capacity)

    @property
    def now(self) -> Snapshot:
        return self.ledger.now

    def extent(self, snapshot: Snapshot) -> Extent:
        """The rows that hold a snapshot."""
        return self._arena.extent(0, snapshot.num_tokens)

    def fingerprint(self, snapshot: Snapshot) -> str:
        """A digest over sampled rows of a snapshot; see `Arena.fingerprint`."""
        return self._arena.fingerprint(snapshot.num_tokens)

    def append(self, chunk: Chunk) -> Encoded:
        """Encode a chunk into the memory, or raise ChunkRefused and leave the memory as it was."""
        model, now = self._model, self.now
        size = self._encode_size(chunk)
        patches = _patches(chunk, model.geometry.grid(size))
        # Before anything of that size is made: a tiny picture may be asked for at an enormous size.
        self._check_room(patches.num_tokens, now.layout.next_position)
        span, layout = self.layout.extend(now.layout, patches)
        self._check_room(len(span), span.next_position)
        try:
            times = model.encode(
                [picture.pixels for picture in chunk.pictures],
                size,
                span,
                Prefill([self._arena.extent(0, now.num_tokens)], (self._arena, now.num_tokens)),
            )
        except torch.OutOfMemoryError as error:
            error.__traceback__ = None  # its frames hold the activations that must go
            _release_cached(model.device)
            raise ChunkRefused("out_of_memory", f"no device memory for {len(span)} tokens: {error}") from error
        self.ledger.append(chunk, len(span), layout)
        self._is_full = False
        return Encoded(len(span), size, times.preprocess_ms, times.vision_ms, times.prefill_ms)

    def info(self) -> CacheInfo:
        """The memory in figures, measured on its tensors."""
        now, model = self.now, self._model
        capacity, seconds = self._arena.capacity, now.seconds
        tokens_per_s = now.num_tokens / seconds if seconds else 0.0
        return CacheInfo(
            num_tokens=now.num_tokens,
            capacity_tokens=capacity,
            logical_bytes=self._arena.logical_bytes(now.num_tokens),
            resident_bytes=self._arena.resident_bytes,
            bytes_per_token=model.kv_shape.bytes_per_token,
            num_chunks=now.num_chunks,
            num_frames=now.num_frames,
            num_padded_frames=now.num_padded,
            positions_used=now.layout.next_position,
            positions_left=max(0, model.max_positions - now.layout.next_position),
            seconds=UNSET if seconds is None else seconds,
            oldest_ns=UNSET if now.oldest_ns is None else now.oldest_ns,
            newest_ns=UNSET if now.newest_ns is None else now.newest_ns,
            newest_seq=UNSET if now.newest_seq is None else now.newest_seq,
            seconds_until_full=(capacity - now.num_tokens) / tokens_per_s if tokens_per_s else UNSET,
            full=self._is_full,
        )

    def mark(self, name: str) -> Snapshot:
        return self.ledger.mark(name)

    def rollback(self, name: str) -> None:
        """Forget what came after a mark. Raises KeyError for an unknown one."""
        self.ledger.rollback(name)
        self._is_full = False

    def reset(self) -> None:
        self.ledger.reset()
        self._is_full = False

    def _encode_size(self, chunk: Chunk) -> tuple[int, int]:
        options = self.options
        try:
            return encode_size(
                chunk.size,
                self._model.geometry,
                min_pixels=options.min_pixels,
                max_pixels=options.max_pixels,
                explicit=options.encode_size,
            )
        except ValueError as error:
            raise ChunkRefused("encode_error", str(error)) from error

    def _check_room(self, num_tokens: int, next_position: int) -> None:
        room = self._arena.capacity - self.now.num_tokens
        if num_tokens > room:
            # One frame far larger than those before it, or than the whole memory, says nothing about the next.
            self._is_full = num_tokens < 2 * self.ledger.num_newest_tokens
            raise ChunkRefused("memory_full", f"a chunk of {num_tokens} tokens does not fit, {room} are left")
        if next_position > self._model.max_positions:
            self._is_full = True
            raise ChunkRefused("memory_full", f"position {next_position} is past {self._model.max_positions}")


def _reserve(model: VisionLanguageModel, capacity: int) -> Arena:
    try:
        return Arena(model.kv_shape, capacity)
    except (torch.OutOfMemoryError, RuntimeError) as error:  # the CPU allocator has no error class of its own
        error.__traceback__ = None  # its frames hold the layers that could be had
        num_bytes = capacity * model.kv_shape.bytes_per_token
        raise MemoryError(f"cannot reserve {num_bytes} bytes for {capacity} tokens: {error}") from error


def _release_cached(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _patches(chunk: Chunk, grid: tuple[int, int]) -> Patches:
    """A chunk's temporal patches: pairs of pictures, or a single picture by itself."""
    times = [picture.stream_ns for picture in chunk.pictures]
    if len(times) == 1:
        return Patches(*grid, ((times[0], times[0]),), is_image=True)
    return Patches(*grid, tuple(zip(times[::2], times[1::2], strict=True)))
