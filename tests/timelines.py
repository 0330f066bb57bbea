"""Timelines of what a node would say."""

import msgspec
from records import NS, stream_stats

from onlooker.protocol.messages import StreamStats
from onlooker.tools.timeline import Timeline


def at(second: int, encoded: int, remembered: int, oldest_ns: int = 0, **dropped: int) -> StreamStats:
    """What a node would say after so many seconds, having encoded and dropped so many frames in all."""
    stats = stream_stats(ts=second * NS)
    num_dropped = sum(dropped.values())
    frames = msgspec.structs.replace(
        stats.frames, received=encoded + num_dropped, kept=encoded, encoded=encoded, dropped=dropped
    )
    cache = msgspec.structs.replace(stats.cache, num_frames=remembered, oldest_ns=oldest_ns)
    return msgspec.structs.replace(stats, frames=frames, cache=cache)


def told(*records: StreamStats) -> Timeline:
    timeline = Timeline()
    for record in records:
        timeline.take(record)
    return timeline
