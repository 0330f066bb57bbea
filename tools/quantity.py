"""Quantities as people read and write them."""

import re
from datetime import UTC, datetime

from msgspec import UNSET

from ..protocol.messages import CacheInfo
from ..protocol.quantity import bytes_text as bytes_text

NS_PER_S = 1_000_000_000

_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*(|k|M|G|T|Ki|Mi|Gi|Ti)B?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def num_bytes_of(text: str) -> int:
    """`512MiB`, `1.5 GB` or a plain number. Raises ValueError."""
    match = _BYTES.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"a size such as 512MiB or 1.5GB is wanted, got {text}")
    unit = match[2].lower()
    return int(float(match[1]) * (1024 if unit.endswith("i") else 1000) ** _POWERS[unit.removesuffix("i")])


def seconds_text(seconds: float) -> str:
    """`12.5 s`, `3 min 20 s` or `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def horizon_text(cache: CacheInfo) -> str:
    """`holds 12 min once full, 3900 positions left`, as far as it is known."""
    parts = []
    if cache.seconds_of_memory is not UNSET:
        parts.append(f"holds {seconds_text(cache.seconds_of_memory)} once full")
    if cache.positions_left is not UNSET:
        parts.append(f"{cache.positions_left} positions left")
    return ", ".join(parts)


def ms_text(milliseconds: float) -> str:
    """`0.42 ms`, `62 ms` or `1.3 s`."""
    return f"{milliseconds:.3g} ms" if milliseconds < 999.5 else seconds_text(milliseconds / 1000)


def time_text(time_ns: int, kind: str) -> str:
    """The time written on a frame: of day for a clock's, from the start for a file's own."""
    if kind == "media":
        return f"{time_ns / NS_PER_S:.2f} s of the file"
    return datetime.fromtimestamp(time_ns / NS_PER_S, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3] + " UTC"


def reasons_text(counts: dict[str, int]) -> str:
    """`queue_full 3, stale 1`, the most frequent first."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{reason} {num}" for reason, num in ranked if num)
