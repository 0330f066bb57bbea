"""What a page shows, as HTML: figures, a timeline, plots of device memory, questions with their proofs.

Pure functions of what is known. Lengths are shares of 100, so that everything is as wide as its place; colours are
those of `web.css`, which knows a light and a dark theme.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import NamedTuple

from msgspec import UNSET, UnsetType

from ..protocol.messages import Choice, Event, Hello, Mark, NodeStats, OptionScore, Provenance, StreamStats
from .ask import seconds_known, visible
from .playback import Played
from .quantity import NS_PER_S, bytes_text, ms_text, reasons_text, seconds_text, time_text
from .timeline import ON_PURPOSE, Span, Timeline
from .web_session import Presence, Question, Sample, in_words
from .web_source import Player

MAX_EVENTS = 6
MAX_COLUMNS = 120
MIN_COLUMNS = 20
BAR_HEIGHT = 84  # of 100, which leaves room for the scale
NUM_TICKS = 4
_QUARTERS = (25, 50, 75, 100)
UNKNOWN = "\N{EN DASH}"

# Components of device memory: field, name, and class in web.css, from the bottom up.
COMPONENTS = (
    ("weights_bytes", "weights", "weights"),
    ("kv_bytes", "keys and values", "kv"),
    ("activations_peak_bytes", "activations, peak", "activations"),
    ("other_process_bytes", "other processes", "others"),
)

# Why frames are not in the memory, as people say it.
REASONS = {
    "sampled_out": "not wanted at this rate",
    "gated": "nothing new in them",
    "paused": "while paused",
    "reset": "on their way at a reset",
    "removed": "on their way at a removal",
    "ring_full": "came faster than they could be taken up",
    "memory_full": "no room left",
    "out_of_memory": "device out of memory",
    "decode_error": "not a readable picture",
    "too_large": "too many pixels",
    "encode_error": "the model failed on them",
    "second_publisher": "another camera has the stream",
    "after_eos": "after the end of the stream",
    "duplicate": "came twice",
    "out_of_order": "came too late",
    "time_backwards": "older than the one before",
}

_STREAM_STATES = {
    "waiting": ("quiet", "no frame yet"),
    "online": ("good", "online"),
    "offline": ("bad", "offline: no frame for a while"),
    "paused": ("warn", "paused"),
    "full": ("warn", "memory full"),
    "ended": ("quiet", "ended"),
}
_NODE_STATES = {"starting": "warn", "ready": "good", "stopping": "bad"}


def note(text: str, kind: str = "quiet") -> str:
    """A word on what was done or went wrong; `kind` is good, warn, bad or quiet."""
    return f'<div class="ol-note ol-{kind}" role="status">{escape(text)}</div>' if text else ""


# ------------------------------------------------------------------------------------------ the node


def head(hello: Hello | None, stats: NodeStats | None, presence: Presence) -> str:
    """Who the node is and how it does."""
    if not presence.has_been_seen or hello is None:
        return _head_line(_pill("waiting for a node", "warn"), "", "")
    state = stats.state if stats else "starting"
    pill = _pill(state, _NODE_STATES[state]) if presence.is_online else _pill("gone", "bad")
    model = hello.model.rstrip("/").rpartition("/")[2]
    who = f"<b>{escape(hello.node)}</b> {escape(model)}, {escape(hello.dtype)} on {escape(hello.device)}"
    return _head_line(pill, who, f"up {seconds_text(round(stats.uptime_s))}" if stats and presence.is_online else "")


def _head_line(pill: str, who: str, since: str) -> str:
    return (
        f'<div class="ol-head"><span class="ol-brand">{_EYE}Onlooker</span>'
        f'<span class="ol-who">{pill}<span>{who}</span></span><span class="ol-since">{since}</span></div>'
    )


_EYE = (
    '<svg viewBox="0 0 24 24" aria-hidden="true"><path d="M2 12s3.6-6.5 10-6.5S22 12 22 12s-3.6 6.5-10 6.5S2 12 2 12z" '
    'fill="none" stroke="currentColor" stroke-width="1.8"/><circle cx="12" cy="12" r="3.2" fill="currentColor"/></svg>'
)


def banner(presence: Presence, hello: Hello | None, own_node: str, endpoint: str) -> str:
    """What those at the page must know about the node, the most important first; empty where all is well."""
    loud: list[tuple[str, str]] = []
    quiet: list[str] = []
    if presence.refusal:
        loud.append(("bad", f"The node refuses this page's key: {presence.refusal}."))
    elif not presence.is_online and presence.has_been_seen:
        loud.append(("bad", _gone_text(presence)))
    elif not presence.has_been_seen and not own_node:
        loud.append(
            ("warn", f"No node is heard at {endpoint} yet. The page goes on by itself as soon as there is one.")
        )
    if presence.restarted_s is not None and presence.is_online:
        loud.append(("warn", f"The node was restarted at {_clock(presence.restarted_s)}: its memory began anew then."))
    if own_node:
        quiet.append(own_node)
    if hello is not None and isinstance(hello.notice, str) and presence.is_online:
        quiet.append(hello.notice)
    lines = [*loud, *([("quiet", " ".join(quiet))] if quiet else [])]
    return "".join(f'<div class="ol-banner ol-{kind}" role="status">{escape(text)}</div>' for kind, text in lines)


def _gone_text(presence: Presence) -> str:
    return (
        f"The node has been silent for {seconds_text(round(presence.silent_s))}. What is shown is the last that was "
        "heard of it; the page goes on by itself when it is back."
    )


def _pill(text: str, kind: str) -> str:
    return f'<span class="ol-pill ol-{kind}">{escape(text)}</span>'


# ---------------------------------------------------------------------------------------- the stream


def figures(stats: StreamStats | None, timeline: Timeline | None) -> str:
    """Lag and rates of a stream, and its sizes."""
    if stats is None:
        return ""
    kept = timeline.fps_kept if timeline else None
    tiles = [
        _tile("lag", *_lag(stats)),
        _tile("received", _fps(stats.fps_received), f"{stats.frames.received:,} frames"),
        _tile("kept", _fps(kept), f"{stats.frames.kept:,} frames"),
        _tile("encoded", _fps(stats.fps_encoded), f"{stats.frames.encoded:,} frames"),
    ]
    kind, state = _STREAM_STATES[stats.state]
    facts = [f"{stats.chunk_frames} a chunk", stats.layout, *_sizes(stats)]
    given_up = _pill(f"given up: {', '.join(stats.degraded)}", "warn") if stats.degraded else ""
    line = f'<div class="ol-facts">{_pill(state, kind)}<span>{escape(", ".join(facts))}</span>{given_up}</div>'
    return f'{line}<div class="ol-tiles ol-four">{"".join(tiles)}</div>'


def _lag(stats: StreamStats) -> tuple[str, str]:
    return (UNKNOWN, "no capture times") if stats.lag_ms is UNSET else (ms_text(stats.lag_ms), "until encoded")


def _sizes(stats: StreamStats) -> Iterator[str]:
    if stats.received_size is not UNSET:
        received = "\N{MULTIPLICATION SIGN}".join(map(str, stats.received_size))
        encoded = "" if stats.encoded_size is UNSET else "\N{MULTIPLICATION SIGN}".join(map(str, stats.encoded_size))
        yield f"{received} encoded as {encoded}" if encoded else received


def _tile(name: str, value: str, more: str = "") -> str:
    return f'<div class="ol-tile"><span>{escape(name)}</span><b>{escape(value)}</b><small>{escape(more)}</small></div>'


def _fps(fps: float | UnsetType | None) -> str:
    return UNKNOWN if fps is UNSET or fps is None else f"{fps:.1f} fps"


def live_picture(stream: str | None, has_pictures: bool) -> str:
    """The place of the live picture; pictures that do not come by here are explained."""
    if stream is not None and has_pictures:
        source = f"live/{escape(stream)}"
        return f'<div class="ol-picture"><img data-live="{source}" alt="live picture of {escape(stream)}"></div>'
    if stream is None:
        text = "No stream yet. Choose a video below and press Start, or take the sample."
    else:
        text = (
            f"The pictures of {stream} go straight from its camera to the node, not by this page. "
            "Their figures are below."
        )
    return f'<div class="ol-picture ol-empty"><p>{escape(text)}</p></div>'


def progress(player: Player | None) -> str:
    """How far a file has been played, or how that ended."""
    if player is None:
        return ""
    if player.error is not None:
        return note(f"Playing stopped. {in_words(player.error)} Start plays it again.", "bad")
    if player.played is not None:
        return _bar_line(1.0, _played_text(player, player.played))
    position, total_s = player.position, player.total_s
    if position is None:
        return _bar_line(0.0, "Opening the video ...")
    word = "Paused" if player.state == "paused" else "Playing"
    text = f"{word}: {seconds_text(position.played_s)}" + (f" of {seconds_text(total_s)}" if total_s else "")
    text += f", {position.num_sent} frames sent"
    return _bar_line(position.played_s / total_s if total_s else 0.0, text)


def _played_text(player: Player, played: Played) -> str:
    text = f"{'Stopped' if player.was_stopped else 'Played'}: {played.sent} frames sent"
    if played.node:
        text += f", {played.node.encoded} encoded"
        dropped = sorted(played.node.dropped.items(), key=lambda item: -item[1])
        text += "".join(f", {num} dropped: {REASONS.get(reason, reason)}" for reason, num in dropped)
    return text


def _bar_line(share: float, text: str) -> str:
    return (
        f'<div class="ol-progress"><div class="ol-track"><i style="width:{100 * min(1.0, share):.1f}%"></i></div>'
        f"<small>{escape(text)}</small></div>"
    )


# ---------------------------------------------------------------------------------------- the memory


def memory(stats: StreamStats | None) -> str:
    """How much is remembered, in tokens, bytes, frames and seconds."""
    if stats is None:
        return ""
    cache = stats.cache
    share = cache.num_tokens / cache.capacity_tokens if cache.capacity_tokens else 0.0
    span = UNKNOWN if cache.seconds is UNSET else seconds_text(cache.seconds)
    dropped = f", {cache.num_dropped_tokens:,} dropped" if cache.num_dropped_tokens else ""
    tiles = [
        _tile("seconds of memory", span, _until_full(stats)),
        _tile("frames", f"{cache.num_frames:,}", f"in {cache.num_chunks:,} chunks"),
        _tile("tokens", f"{cache.num_tokens:,}", f"of {cache.capacity_tokens:,}{dropped}"),
        _tile("bytes", bytes_text(cache.logical_bytes), f"of {bytes_text(cache.resident_bytes)} reserved"),
    ]
    kind = "warn" if cache.full or share > 0.9 else "good"
    bar = f'<div class="ol-track ol-{kind}"><i style="width:{100 * share:.2f}%"></i></div>'
    label = f'<div class="ol-between"><span>{share:.1%} full</span></div>' if share >= 0.001 else ""
    what = "The model's positions are used up" if cache.limit == "positions" else "The memory is full"
    full = note(f"{what}: new frames are dropped, answers go on. Reset it, or roll back to a mark.", "warn")
    return (full if cache.full else "") + f'<div class="ol-tiles ol-four">{"".join(tiles)}</div>{bar}{label}'


def _until_full(stats: StreamStats) -> str:
    cache = stats.cache
    if cache.full:
        return "full"
    if stats.state == "online" and cache.seconds_until_full is not UNSET:
        return f"full in {seconds_text(round(cache.seconds_until_full))}"
    return "" if cache.seconds_of_memory is UNSET else f"of {seconds_text(round(cache.seconds_of_memory))}"


class Column(NamedTuple):
    """One column of the timeline: which one from the left, and its spans as one."""

    number: int
    span: Span


def timeline(known: Timeline | None, marks: Sequence[Mark], questions: Sequence[Question]) -> str:
    """What became of the frames over time: remembered, forgotten, left out on purpose, lost."""
    if known is None or not known.spans:
        return '<div class="ol-plot ol-empty"><p>What is remembered will be drawn here, as it comes in.</p></div>'
    column_s = _column_s(known.spans[-1].end_s - known.spans[0].start_s)
    # Whole columns of the clock, as the spans themselves: none holds a part of one.
    start_s = known.spans[0].start_s // column_s * column_s
    if known.spans[0].is_earlier:
        start_s -= column_s  # a column of its own, for whatever length of time
    num_columns = max(MIN_COLUMNS, int((known.spans[-1].end_s - start_s) // column_s) + 1)
    columns = list(_columns(known.spans, start_s, column_s))
    highest = max((column.span.num_frames for column in columns if not column.span.is_earlier), default=0)
    bars = "".join(_column_svg(column, highest, 100 / num_columns) for column in columns)
    length_s = num_columns * column_s
    flags = "".join(_flags(known.spans, marks, questions, start_s, length_s))
    plot = (
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="frames over time">{bars}</svg>'
    )
    most = f"{highest:,} frames in {seconds_text(column_s)}" if highest else "all from before"
    scale = f'<span class="ol-scale" style="bottom:{BAR_HEIGHT}%">{most}</span>'
    body = f'<div class="ol-plot">{plot}{scale}{flags}</div>{_time_axis(start_s, length_s)}'
    return f"{_timeline_legend(known)}{body}"


def _column_s(length_s: float) -> int:
    """Seconds of a column, a power of two."""
    return next(2**n for n in itertools.count() if length_s / 2**n < MAX_COLUMNS)


def _columns(spans: Sequence[Span], start_s: float, column_s: float) -> Iterator[Column]:
    def index(span: Span) -> int:
        return 0 if span.is_earlier else int((span.end_s - start_s) / column_s)

    for number, group in itertools.groupby(spans, index):
        yield Column(number, functools.reduce(Span.joined, group))


def _column_svg(column: Column, highest: int, width: float) -> str:
    span, gap = column.span, 0.08 * width
    parts = [("kept", span.remembered), ("forgotten", span.forgotten), ("skipped", span.skipped), ("lost", span.lost)]
    drawn, bottom = "", 100.0
    for kind, num in parts:
        height = BAR_HEIGHT * num / (span.num_frames if span.is_earlier else highest)
        if num:
            drawn += (
                f'<rect class="ol-{kind}" x="{column.number * width + gap:.2f}" y="{bottom - height:.2f}" '
                f'width="{width - 2 * gap:.2f}" height="{height:.2f}"/>'
            )
        bottom -= height
    return f"<g><title>{escape(_column_text(span))}</title>{drawn}</g>"


def _column_text(span: Span) -> str:
    lines = [f"before {_clock(span.end_s)}" if span.is_earlier else f"{_clock(span.start_s)} to {_clock(span.end_s)}"]
    lines += [f"{span.remembered} remembered"] if span.remembered else []
    lines += [f"{span.forgotten} forgotten"] if span.forgotten else []
    lines += [f"{num} dropped: {REASONS.get(reason, reason)}" for reason, num in span.dropped.most_common()]
    return "\n".join(lines)


def _flags(
    spans: Sequence[Span], marks: Sequence[Mark], questions: Sequence[Question], start_s: float, length_s: float
) -> Iterator[str]:
    """Marks where the memory was as long as they are, and questions at the time when they were asked."""
    for mark in marks:
        if (at_s := _moment(spans, mark.num_frames)) is not None:
            yield _flag("mark", (at_s - start_s) / length_s, mark.name)
    for number, question in enumerate(questions, start=1):
        if start_s <= question.asked_s <= start_s + length_s:
            yield _flag("asked", (question.asked_s - start_s) / length_s, str(number))


def _moment(spans: Sequence[Span], num_frames: int) -> float | None:
    """When so many of the frames that are remembered had come in."""
    known = itertools.accumulate(span.remembered for span in spans)
    return next((span.end_s for span, num in zip(spans, known, strict=True) if num >= num_frames > 0), None)


def _flag(kind: str, share: float, text: str) -> str:
    side = " ol-left" if share > 0.8 else ""
    return f'<span class="ol-flag ol-{kind}{side}" style="left:{100 * share:.2f}%"><b>{escape(text)}</b></span>'


def _time_axis(start_s: float, length_s: float) -> str:
    ticks = "".join(f"<span>{_clock(start_s + length_s * i / NUM_TICKS)}</span>" for i in range(NUM_TICKS + 1))
    return f'<div class="ol-axis">{ticks}</div>'


def _timeline_legend(known: Timeline) -> str:
    dropped = sum((span.dropped for span in known.spans), start=type(known.spans[0].dropped)())
    entries = [("kept", "remembered", known.num_remembered)]
    entries.append(("forgotten", "forgotten", sum(span.forgotten for span in known.spans)))
    for reason, num in dropped.most_common():
        kind = "skipped" if reason in ON_PURPOSE else "lost"
        entries.append((kind, f"dropped: {REASONS.get(reason, reason)}", num))
    return _legend((kind, name, f"{num:,}") for kind, name, num in entries if num or kind == "kept")


def _legend(entries: Iterable[tuple[str, str, str]]) -> str:
    items = "".join(
        f'<span><i class="ol-{kind}"></i>{escape(name)} <b>{escape(value)}</b></span>' for kind, name, value in entries
    )
    return f'<div class="ol-legend">{items}</div>'


def _clock(time_s: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(time_s))


# ------------------------------------------------------------------------------------- device memory


def device_memory(samples: Sequence[Sample]) -> str:
    """Device memory by component, stacked, over time."""
    if len(samples) < 2:
        return '<div class="ol-plot ol-empty"><p>Device memory will be drawn here.</p></div>'
    known = [entry for entry in COMPONENTS if any(_size(sample, entry[0]) for sample in samples)]
    highest = max(sum(_size(sample, field) for field, _, _ in known) for sample in samples)
    top = _round_up(highest)
    start_s = samples[0].time_s
    length_s = max(float(MIN_COLUMNS), samples[-1].time_s - start_s)
    shares = [100 * (sample.time_s - start_s) / length_s for sample in samples]
    below, areas = [0] * len(samples), ""
    for field, name, kind in known:
        above = [bottom + _size(sample, field) for bottom, sample in zip(below, samples, strict=True)]
        areas += _area(kind, name, shares, below, above, top)
        below = above
    legend = _legend((kind, name, bytes_text(_size(samples[-1], field))) for field, name, kind in known)
    grid = "".join(_grid_line(share, "" if share % 50 else bytes_text(round(top * share / 100))) for share in _QUARTERS)
    svg = f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="device memory">{areas}</svg>'
    axis = _time_axis(start_s, length_s)
    return f'{legend}<div class="ol-plot">{svg}{grid}</div>{axis}{_device_text(samples[-1])}'


def _grid_line(share: int, text: str) -> str:
    label = f"<b>{text}</b>" if text else ""
    return f'<span class="ol-grid" style="bottom:{share}%">{label}</span>'


def _size(sample: Sample, field: str) -> int:
    num_bytes = getattr(sample.vram, field)
    return 0 if num_bytes is UNSET else num_bytes


def _area(kind: str, name: str, shares: Sequence[float], below: Sequence[int], above: Sequence[int], top: float) -> str:
    upper = [f"{x:.2f},{100 - 100 * y / top:.2f}" for x, y in zip(shares, above, strict=True)]
    lower = [f"{x:.2f},{100 - 100 * y / top:.2f}" for x, y in zip(shares, below, strict=True)]
    points = " ".join(upper + lower[::-1])
    return f'<polygon class="ol-{kind}" points="{points}"><title>{escape(name)}</title></polygon>'


def _device_text(sample: Sample) -> str:
    vram = sample.vram
    parts = [f"device {vram.device}"]
    if vram.free_bytes is not UNSET and vram.total_bytes is not UNSET:
        parts.append(f"{bytes_text(vram.free_bytes)} free of {bytes_text(vram.total_bytes)}")
    if vram.torch_peak_bytes is not UNSET:
        parts.append(f"torch's peak {bytes_text(vram.torch_peak_bytes)}")
    return f'<div class="ol-facts"><span>{escape(", ".join(parts))}</span></div>'


def _round_up(num_bytes: int) -> float:
    """The next number of which a quarter is easily read."""
    unit = 1.0
    while unit * 10 < num_bytes:
        unit *= 10
    return next((unit * step for step in (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10) if unit * step >= num_bytes), 1.0)


# ---------------------------------------------------------------------------------------- the answers


def conversation(questions: Sequence[Question], stream: str | None) -> str:
    """Questions about a stream with their answers, the newest first, numbered as they are on the timeline."""
    numbered = [(n, question) for n, question in enumerate(questions_of(questions, stream), start=1)]
    if not numbered:
        text = "Ask about what the stream has shown. You may ask several questions at once, also while frames come in."
        return f'<div class="ol-chat ol-empty"><p>{text}</p></div>'
    return f'<div class="ol-chat">{"".join(_card(n, question) for n, question in reversed(numbered))}</div>'


def questions_of(questions: Sequence[Question], stream: str | None) -> list[Question]:
    return [question for question in questions if question.stream == stream]


def _card(number: int, question: Question) -> str:
    asked = f'<div class="ol-asked-line"><i>{number}</i><b>{escape(question.text)}</b></div>'
    as_of = f'<small class="ol-as-of">as of mark {escape(question.as_of)}</small>' if question.as_of else ""
    return f'<article class="ol-card ol-{question.state}">{asked}{as_of}{_answer(question)}</article>'


def _answer(question: Question) -> str:
    if question.error is not None:
        partly = f'<p class="ol-text">{_text(question.answer)}</p>' if question.answer else ""
        return partly + note(in_words(question.error), "bad")
    if question.reply is None:
        return f'<p class="ol-text">{_text(question.answer)}<span class="ol-caret"></span></p>'
    reply = question.reply
    if isinstance(reply, Choice):
        return _choice(reply) + _knowledge(reply.memory, reply.timing.first_token_ms, reply.timing.total_ms)
    cut = '<small class="ol-cut">cut at the longest answer allowed</small>' if reply.finish == "length" else ""
    text = f'<p class="ol-text">{_text(reply.text) or "<em>(blank)</em>"}</p>{cut}'
    return text + _knowledge(reply.memory, reply.timing.first_token_ms, reply.timing.total_ms)


def _text(text: str) -> str:
    return escape(visible(text.strip()))


def _choice(choice: Choice) -> str:
    rows = "".join(_score(score, is_best=index == choice.index) for index, score in enumerate(choice.scores))
    second = f"ahead by {choice.margin:.2f} nats, {choice.rank_by} scores"
    return f'<div class="ol-scores">{rows}</div><small class="ol-cut">{escape(second)}</small>'


def _score(score: OptionScore, is_best: bool) -> str:
    kind = " ol-best" if is_best else ""
    return (
        f'<div class="ol-score{kind}"><span>{escape(score.option)}</span>'
        f'<div class="ol-track"><i style="width:{100 * score.probability:.1f}%"></i></div>'
        f"<b>{score.probability:.0%}</b></div>"
    )


def _knowledge(known: Provenance, first_token_ms: float, total_ms: float) -> str:
    """What an answer knew, how long it took, and the proof that it left no trace."""
    seconds = seconds_text(round(seconds_known(known), 2))
    seen_ns = known.seen_until_ns if isinstance(known.seen_until_ns, int) else known.until_ns
    facts = [
        ("as of", time_text(seen_ns, known.ts_kind) if known.ts_kind == "media" else _clock_ns(seen_ns)),
        ("in memory", f"{known.num_frames:,} frames of {seconds}, {known.num_tokens:,} tokens"),
        ("first token", ms_text(first_token_ms)),
        ("whole", ms_text(total_ms)),
    ]
    listed = "".join(f"<span>{name} <b>{escape(value)}</b></span>" for name, value in facts)
    return f'<div class="ol-known">{listed}{_proof(known)}</div>'


def _clock_ns(time_ns: int) -> str:
    return _clock(time_ns / NS_PER_S)


def _proof(known: Provenance) -> str:
    before, after = escape(known.fingerprint_before), escape(known.fingerprint_after)
    title = f"fingerprint before {before}, after {after}"
    if known.unchanged:
        return f'<span class="ol-proof ol-good" title="{title}">memory unchanged <code>{after[:12]}</code></span>'
    return f'<span class="ol-proof ol-bad" title="{title}">MEMORY CHANGED <code>{before[:8]} {after[:8]}</code></span>'


# ------------------------------------------------------------------------------------ marks and events


def marks_table(marks: Sequence[Mark]) -> str:
    """The marks of a stream."""
    if not marks:
        return '<div class="ol-facts"><span>No marks yet. A mark names the memory as it is now.</span></div>'
    rows = "".join(
        f"<li><b>{escape(mark.name)}</b> {mark.num_frames:,} frames, {mark.num_tokens:,} tokens</li>" for mark in marks
    )
    return f'<ul class="ol-list">{rows}</ul>'


def events(known: Sequence[Event]) -> str:
    """What happened lately, the newest first."""
    rows = "".join(
        f"<li><time>{_clock(event.ts / NS_PER_S)}</time> {escape(_event_text(event))}</li>"
        for event in list(known)[: -MAX_EVENTS - 1 : -1]
    )
    return f'<ul class="ol-list">{rows}</ul>' if rows else '<div class="ol-facts"><span>Nothing yet.</span></div>'


def _event_text(event: Event) -> str:
    return (
        event.message if event.stream is UNSET or event.stream in event.message else f"{event.stream}: {event.message}"
    )


def questions_line(stats: NodeStats | None) -> str:
    """What the node says of all questions, of this page and of others."""
    if stats is None:
        return ""
    counted = stats.questions
    parts = [f"{counted.answered} answered", f"{counted.running} running", f"{counted.waiting} waiting"]
    if failed := reasons_text(counted.failed):
        parts.append(f"failed: {failed}")
    trace = f"{counted.traces} left a trace" if counted.traces else "none left a trace"
    kind = "bad" if counted.traces else "good"
    text = escape(f"All questions to this node: {', '.join(parts)}")
    return f'<div class="ol-facts"><span>{text}</span>{_pill(trace, kind)}</div>'
