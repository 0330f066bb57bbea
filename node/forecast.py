"""What a stream's memory will hold, told before its first frame; one that can hold nothing is refused."""

from dataclasses import replace

from msgspec import UNSET, structs

from ..protocol.errors import ErrorCode, NodeError
from ..protocol.forecast import Room, fit, seconds_of_positions, tokens_of
from ..protocol.messages import Footprint, Forecast, or_unset
from ..protocol.quantity import bytes_text
from .layout import LAYOUTS, LayoutState, Patches
from .model import VisionLanguageModel
from .options import StreamOptions
from .preprocess import encode_size

_NS = 1_000_000_000
_SHAPES = ((16, 9), (4, 3), (1, 1))  # of pictures; as small as that in pixels, and as large, the bounds alone decide
_LARGE = 1 << 12


def forecast(model: VisionLanguageModel, options: StreamOptions) -> Forecast:
    """Foretell a stream. Raises NodeError TOO_LARGE if its memory cannot hold a chunk of the smallest pictures.

    Nor may it be too small for all of the last frames, where they are what it holds.
    """
    retention, num_last = options.policy, options.last_frames // options.chunk_frames
    capacity = retention.max_tokens(options.memory_bytes // model.kv_shape.bytes_per_token)
    size = size_of(model, options, (_LARGE * _SHAPES[0][0], _LARGE * _SHAPES[0][1]))
    footprint = footprint_of(model, options, size)
    sizes = {size_of(model, options, (s * w, s * h)) for w, h in _SHAPES for s in (1, _LARGE)}
    least = min((footprint_of(model, options, size) for size in sizes), key=lambda its: its.tokens_per_chunk)
    if fit(least, capacity, options.fps).num_chunks < max(1, num_last):
        raise _too_small(options, least)
    num_chunks, limit = fit(footprint, capacity, options.fps)
    if 0 < num_last < num_chunks:
        num_chunks, limit = num_last, "memory"  # whose positions begin anew
    end_s = None if retention.forgets else seconds_of_positions(footprint, options.fps)
    num_frames = num_chunks * options.chunk_frames
    return Forecast(
        memory_bytes=options.memory_bytes,
        capacity_tokens=capacity,
        encode_size=UNSET if options.encode_size is None else size,
        footprint=footprint,
        num_chunks=num_chunks,
        # Positions that the clock uses up may end before so many chunks have come, or not.
        limit=UNSET if limit == "memory" and end_s and not options.fps else limit,
        seconds_of_memory=num_frames / options.fps if options.fps else UNSET,
        seconds_of_positions=or_unset(end_s),
    )


def within_room(options: StreamOptions, room: Room | None) -> StreamOptions:
    """A stream with the memory it asks for, or what there is on its device; None is not known.

    Raises NodeError OUT_OF_MEMORY if there is less than its least.
    """
    if room is None or options.memory_bytes <= room.num_bytes:
        return options
    if options.guaranteed_bytes <= room.num_bytes:
        return replace(options, memory_bytes=room.num_bytes, min_memory_bytes=options.guaranteed_bytes)
    raise NodeError(
        ErrorCode.OUT_OF_MEMORY,
        f"stream {options.name} needs {bytes_text(options.guaranteed_bytes)} of a device that has"
        f" {bytes_text(room.num_bytes)}: {bytes_text(room.free_bytes)} free, less {bytes_text(room.workspace_bytes)}"
        f" to work with and {bytes_text(room.safety_bytes)} left alone",
        details={"needed_bytes": options.guaranteed_bytes, "room_bytes": room.num_bytes, **structs.asdict(room)},
    )


def size_of(model: VisionLanguageModel, options: StreamOptions, picture: tuple[int, int]) -> tuple[int, int]:
    """Width and height at which a picture of some width and height is encoded. Raises ValueError."""
    low, high = options.min_pixels, options.max_pixels
    size = encode_size(picture, model.geometry, min_pixels=low, max_pixels=high, explicit=options.encode_size)
    if options.encode_scale == 1:
        return size
    width, height = (round(side * options.encode_scale) for side in size)
    return encode_size(picture, model.geometry, explicit=(width, height))


def footprint_of(model: VisionLanguageModel, options: StreamOptions, size: tuple[int, int]) -> Footprint:
    """What chunks of an encode size take, by the layout itself: the first, and one that goes on from it."""
    height, width = model.geometry.grid(size)
    # Positions follow from the longer side alone: a row of its length stands for pictures of any number of tokens.
    row = max(height, width)
    layout = LAYOUTS[options.layout](model.format)
    chunks = [_patches(options, row, number) for number in (0, 1)]
    first, state = layout.extend(LayoutState(), chunks[0])
    second, later = layout.extend(state, chunks[1])
    num_times = len(chunks[0].times_ns)
    opening, picture, per_chunk, per_second = state.next_position, 0, later.next_position - state.next_position, 0.0
    if state.video is None:
        opening -= per_chunk
    else:
        opening, picture, per_second = state.video.base, row, model.format.tokens_per_second or 0.0
        per_chunk = 0 if per_second else num_times
    return Footprint(
        bytes_per_token=model.kv_shape.bytes_per_token,
        chunk_frames=options.chunk_frames,
        opening_tokens=len(first) - len(second),
        tokens_per_chunk=len(second) + (height * width - row) * num_times,
        opening_positions=opening,
        picture_positions=picture,
        positions_per_chunk=per_chunk,
        positions_per_second=per_second,
        max_positions=model.max_positions,
    )


def _patches(options: StreamOptions, row: int, number: int) -> Patches:
    """The n-th chunk of pictures that are a row of tokens."""
    num = options.chunk_frames
    interval_ns = round(_NS / options.fps) if options.fps else 0
    times = [frame * interval_ns for frame in range(number * num, (number + 1) * num)]
    if num == 1:
        return Patches(1, row, ((times[0], times[0]),), is_image=True)
    return Patches(1, row, tuple(zip(times[::2], times[1::2], strict=True)))


def _too_small(options: StreamOptions, least: Footprint) -> NodeError:
    num_chunks = max(1, options.last_frames // options.chunk_frames)
    num_tokens = tokens_of(least, num_chunks)
    num_bytes = num_tokens * least.bytes_per_token
    held = f"the memory of the last {options.last_frames} frames" if options.last_frames else "a chunk"
    positions = max(least.picture_positions, num_chunks * least.positions_per_chunk)
    return NodeError(
        ErrorCode.TOO_LARGE,
        f"{held} of stream {options.name} takes {num_tokens} tokens or more, {bytes_text(num_bytes)}, and"
        f" {least.opening_positions + positions} of the model's"
        f" {least.max_positions} positions: it does not fit into the {bytes_text(options.memory_bytes)} of its memory",
        details={
            "memory_bytes": options.memory_bytes,
            "needed_bytes": num_bytes,
            "tokens_per_chunk": least.tokens_per_chunk,
            "bytes_per_token": least.bytes_per_token,
        },
    )
