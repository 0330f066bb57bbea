"""Questions that were asked, and what came back, made by hand."""

from collections.abc import Sequence

from onlooker.protocol.messages import Answer, AnswerTiming, CacheInfo, Choice, OptionScore, Provenance, StageTimings
from onlooker.tools.scenario import EVERYTHING, Keeping, Layout, Setting
from onlooker.tools.showing import Asked, Showing

MEMORY = Provenance(
    num_tokens=8,
    num_frames=2,
    from_ns=0,
    until_ns=1,
    until_seq=1,
    ts_kind="media",
    fingerprint_before="a",
    fingerprint_after="a",
    unchanged=True,
)
TIMING = AnswerTiming(queue_ms=0, prefill_ms=0, first_token_ms=2, decode_ms=0, total_ms=10)


def cache(num_chunks: int = 1) -> CacheInfo:
    """Ten tokens a chunk, two bytes each."""
    return CacheInfo(
        num_tokens=10 * num_chunks,
        capacity_tokens=1000,
        logical_bytes=20 * num_chunks,
        resident_bytes=2000,
        bytes_per_token=2,
        num_chunks=num_chunks,
        num_frames=4 * num_chunks,
        num_padded_frames=0,
        positions_used=10 * num_chunks,
    )


def choice(options: Sequence[str], scores: Sequence[float]) -> Choice:
    """The same score of each option under every way to rank; an option has as many tokens as words."""
    ranked = [
        OptionScore(option=option, num_tokens=len(option.split()), raw=s, normalized=s, calibrated=s, probability=0)
        for option, s in zip(options, scores, strict=True)
    ]
    index = max(range(len(scores)), key=scores.__getitem__)
    return Choice(
        index=index,
        option=options[index],
        margin=0,
        rank_by="calibrated",
        scores=ranked,
        memory=MEMORY,
        timing=TIMING,
    )


def asked(
    *,
    kind: str = "first",
    wanted: str = "red",
    text: str = "red",
    num_chunks: int = 1,
    options: Sequence[str] = (),
    scores: Sequence[float] | None = None,
    age: int | None = None,
) -> Asked:
    """A question with this reply; with scores also as a choice."""
    reply = Answer(text=text, finish="stop", num_prompt_tokens=1, num_answer_tokens=1, memory=MEMORY, timing=TIMING)
    return Asked(
        kind=kind,
        question="?",
        wanted=wanted,
        options=tuple(options),
        right=text == wanted,
        before=cache(num_chunks),
        after=cache(num_chunks),
        answer=reply,
        choice=None if scores is None else choice(options, scores),
        age=age,
    )


def showing(
    *questions: Asked,
    layout: Layout = "native",
    chunk_frames: int = 4,
    num_chunks: int = 10,
    keeping: Keeping = EVERYTHING,
    num_gated: int = 0,
) -> Showing:
    return Showing(
        seed=0,
        setting=Setting(layout, chunk_frames, keeping),
        asked=list(questions),
        memory=cache(num_chunks),
        stages=StageTimings(preprocess_ms=1.0, vision_ms=2.0, prefill_ms=5.0),
        num_storm=0,
        num_storm_traces=0,
        num_gated=num_gated,
    )
