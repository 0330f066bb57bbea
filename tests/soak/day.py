"""A day in an hour: as many chunks as a camera gives in a day, with questions in between, and what they cost by then.

    python tests/soak/day.py --retention window --chunks 50000 [--model builtin] [--json FILE]

Prints medians of the first and the last tenth, once the memory is full: processor time of a chunk and of a question,
the process's memory, and the highest position. Exits with 1 where bytes or positions pass their bound, or the last
tenth takes over 2 % longer or more memory than the first.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np

from onlooker.node.local import LocalNode
from onlooker.node.state import host_rss_bytes
from onlooker.protocol.messages import StreamSpec

STREAM = "cam"
INTERVAL_NS = 250_000_000
QUESTION = "Which shapes have you seen so far?"
TOLERANCE = 1.02


FIELDS = ("chunk_ms", "question_ms", "num_tokens", "resident_bytes", "positions_used", "forgotten_frames", "rss_bytes")


def watch(node: LocalNode, num_chunks: int, every: int) -> np.ndarray:
    """Feed chunks of two frames, and ask after each `every`-th; returns a row of FIELDS for each chunk.

    Times are the processor's, so that other work on the machine is no part of them; without a question it is nan.
    """
    pool = np.random.default_rng(0).integers(0, 256, (32, 56, 56, 3), dtype=np.uint8)
    samples = np.full((num_chunks, len(FIELDS)), np.nan)  # all of it at once: what is measured must not grow by itself
    for number in range(num_chunks):
        began = time.process_time()
        for seq in (2 * number, 2 * number + 1):
            node.process_frame(STREAM, pool[seq % len(pool)], ts=1 + seq * INTERVAL_NS)
        chunk_ms = (time.process_time() - began) * 1e3
        info = node.cache_info(STREAM)
        question_ms = math.nan
        if number % every == every - 1:
            began = time.process_time()
            answer = node.ask(STREAM, QUESTION, max_new_tokens=4)
            question_ms = (time.process_time() - began) * 1e3
            assert answer.memory.unchanged
        rss = host_rss_bytes()
        samples[number] = (
            chunk_ms,
            question_ms,
            info.num_tokens,
            info.resident_bytes,
            info.positions_used,
            info.num_forgotten_frames,
            rss if isinstance(rss, int) else 0,
        )
        if number % (num_chunks // 10) == 0:
            print(f"{number} chunks, {info.num_tokens} tokens, position {info.positions_used}", flush=True)
    return samples


def summary(samples: np.ndarray) -> dict[str, float]:
    """Figures of a part of the day."""
    chunk_ms, question_ms, *_, rss_bytes = samples.T
    return {
        "chunk_ms": float(np.median(chunk_ms)),
        "question_ms": float(np.nanmedian(question_ms)),
        "rss_bytes": float(rss_bytes.max()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--retention", default="window", choices=["window", "thin", "reset"])
    parser.add_argument("--chunks", type=int, default=50_000)
    parser.add_argument("--every", type=int, default=50, help="chunks between two questions")
    parser.add_argument("--tokens", type=int, default=600, help="that the memory holds")
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with LocalNode(args.model) as node:
        node.add_stream(StreamSpec(stream="probe"))
        bytes_per_token = node.cache_info("probe").bytes_per_token
        node.remove_stream("probe")
        spec = StreamSpec(
            stream=STREAM,
            chunk_frames=2,
            encode_width=56,
            encode_height=56,
            retention=args.retention,
            memory_bytes=args.tokens * bytes_per_token,
        )
        node.add_stream(spec)
        samples = watch(node, args.chunks, args.every)
        last = node.cache_info(STREAM)
    assert isinstance(last.positions_left, int)
    horizon = last.positions_used + last.positions_left
    _, _, _, resident_bytes, positions_used, forgotten_frames, _ = samples.T
    full = int(np.argmax(forgotten_frames > 0))
    tenth = (len(samples) - full) // 10
    first_tenth, last_tenth = summary(samples[full : full + tenth]), summary(samples[-tenth:])
    held = {
        "bytes never change": len(set(resident_bytes)) == 1,
        "positions stay below the horizon": bool(positions_used.max() <= horizon),
    } | {f"{name} of the last tenth": last_tenth[name] <= TOLERANCE * first_tenth[name] for name in first_tenth}
    document = {
        "retention": args.retention,
        "chunks": len(samples),
        "full_after_chunks": full,
        "first_tenth": first_tenth,
        "last_tenth": last_tenth,
        "most_positions": int(positions_used.max()),
        "horizon": horizon,
        "forgotten_frames": last.num_forgotten_frames,
        "held": held,
    }
    print(json.dumps(document, indent=2))
    if args.json:
        some = samples[:: max(1, tenth // 100)].round(3).tolist()
        args.json.write_text(json.dumps(document | {"fields": FIELDS, "samples": some}))
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
