"""Which time a memory knows, and how well: whole, with tokens dropped, thinned, or no more."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from ..protocol.messages import KnownAs, TimeRange
from .ledger import ChunkRecord, Snapshot

MAX_RANGES = 16


def time_ranges(records: Sequence[ChunkRecord], snapshot: Snapshot) -> list[TimeRange]:
    """Time ranges of a snapshot that holds `records`, old to new, at most `MAX_RANGES`; the oldest are merged.

    Chunks that are left of others one by one, with holes of one magnitude between them, make a thinned range.
    """
    ranges: list[TimeRange] = []
    until_ns, num_seen = snapshot.forgotten.from_ns, 0
    for magnitude, group in groupby(_runs(records), lambda run: run[0]):
        *thinned, newest = [run for _, run in group]
        if thinned and len(newest) == 1:
            thinned, newest = [*thinned, newest], []
        left = [record for run in thinned for record in run]
        if magnitude and until_ns is not None:
            end_ns = newest[0].first_ns if newest else left[-1].last_ns
            ranges.append(_range(until_ns, end_ns, "thinned" if left else "forgotten", left))
        for is_dropped, alike in groupby(newest, lambda record: record.num_dropped > 0):
            _add(ranges, list(alike), "dropped" if is_dropped else "whole")
        last = (newest or left)[-1]
        until_ns, num_seen = last.last_ns, last.number + 1
    end_ns = snapshot.forgotten.until_ns
    if num_seen < snapshot.num_seen and until_ns is not None and end_ns is not None:
        ranges.append(_range(until_ns, end_ns, "forgotten", []))
    while len(ranges) > MAX_RANGES:
        ranges[:2] = [_merged(*ranges[:2])]
    return ranges


def _runs(records: Sequence[ChunkRecord]) -> Iterator[tuple[int, list[ChunkRecord]]]:
    """Records that follow each other without a hole, and the magnitude of the hole before them, 0 for none."""
    run: list[ChunkRecord] = []
    magnitude, number = 0, 0  # the one that would follow
    for record in records:
        if record.number != number or not run:
            if run:
                yield magnitude, run
            run, magnitude = [], (record.number - number).bit_length()
        run.append(record)
        number = record.number + 1
    if run:
        yield magnitude, run


def _range(from_ns: int, until_ns: int, known: KnownAs, records: Sequence[ChunkRecord]) -> TimeRange:
    num_frames = sum(record.num_frames for record in records)
    return TimeRange(from_ns=from_ns, until_ns=until_ns, known=known, num_frames=num_frames)


def _add(ranges: list[TimeRange], records: Sequence[ChunkRecord], known: KnownAs) -> None:
    """Go on with the newest range if it is known as well as these records, which follow it."""
    added = _range(records[0].first_ns, records[-1].last_ns, known, records)
    if ranges and ranges[-1].known == known:
        added = _merged(ranges.pop(), added)
    ranges.append(added)


def _merged(older: TimeRange, newer: TimeRange) -> TimeRange:
    return TimeRange(
        from_ns=older.from_ns,
        until_ns=newer.until_ns,
        known=_known_together(older.known, newer.known),
        num_frames=older.num_frames + newer.num_frames,
    )


def _known_together(a: KnownAs, b: KnownAs) -> KnownAs:
    if a == b:
        return a
    return "dropped" if {a, b} == {"whole", "dropped"} else "thinned"
