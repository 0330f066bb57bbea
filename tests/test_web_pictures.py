"""What a page shows, read as text and as numbers."""

import re
from html.parser import HTMLParser

import msgspec
import pytest
from records import NS, hello, node_stats, stream_stats
from timelines import at, told

from onlooker.protocol.errors import DropReason, ErrorCode, NodeError
from onlooker.protocol.messages import (
    UNSET,
    Answer,
    AnswerTiming,
    Choice,
    Event,
    Mark,
    OptionScore,
    Provenance,
    QuestionCounters,
    Vram,
)
from onlooker.tools import web_pictures as pictures
from onlooker.tools.web_session import Presence, Question, Sample

HOSTILE = "<img src=x onerror=alert(1)>\x1b[31m"
ONLINE = Presence(is_online=True, has_been_seen=True, silent_s=0.1, num_restarts=0, restarted_s=None, refusal=None)
GONE = ONLINE._replace(is_online=False, silent_s=7.4)

KNOWN = Provenance(
    num_tokens=678,
    num_frames=24,
    from_ns=0,
    until_ns=5_750_000_000,
    seconds=5.75,
    until_seq=23,
    ts_kind="media",
    fingerprint_before="aaaabbbbccccdddd",
    fingerprint_after="aaaabbbbccccdddd",
    unchanged=True,
)
TIMING = AnswerTiming(queue_ms=1.0, prefill_ms=2.0, first_token_ms=4.69, decode_ms=8.0, total_ms=80.0)


class _Words(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def text(html: str) -> str:
    parser = _Words()
    parser.feed(html)
    return " ".join(" ".join(parser.words).split())


def tags(html: str) -> set[str]:
    parser = _Words()
    parser.feed(html)
    return set(parser.tags)


def answered(answer: str = "a red circle", memory: Provenance = KNOWN, finish: str = "stop") -> Question:
    reply = msgspec.convert(
        {
            "text": answer,
            "finish": finish,
            "num_prompt_tokens": 9,
            "num_answer_tokens": 3,
            "memory": msgspec.to_builtins(memory),
            "timing": msgspec.to_builtins(TIMING),
        },
        Answer,
    )
    return Question("gate", "What was first?", answer=answer, reply=reply)


def chosen() -> Question:
    scores = [
        OptionScore(option=option, num_tokens=2, raw=-1.0, normalized=-0.5, calibrated=0.1, probability=share)
        for option, share in (("open", 0.7), ("closed", 0.3))
    ]
    reply = Choice(index=0, option="open", margin=0.8, rank_by="calibrated", scores=scores, memory=KNOWN, timing=TIMING)
    return Question("gate", "The door is", ("open", "closed"), answer="open", reply=reply)


def test_an_answer_stands_with_what_it_knew_how_long_it_took_and_its_proof() -> None:
    said = text(pictures.conversation([answered()], "gate"))
    for fact in (
        "What was first?",
        "a red circle",
        "as of 5.75 s of the file",
        "24 frames of 5.75 s, 678 tokens",
        "first token 4.69 ms",
        "memory unchanged aaaabbbbcccc",
    ):
        assert fact in said


def test_an_answer_is_as_of_the_time_until_which_nothing_new_came() -> None:
    seen = msgspec.structs.replace(KNOWN, seen_until_ns=9 * NS)
    assert "as of 9.00 s of the file" in text(pictures.conversation([answered(memory=seen)], "gate"))


def test_an_answer_that_left_a_trace_is_loud() -> None:
    changed = msgspec.structs.replace(KNOWN, fingerprint_after="eeeeffff", unchanged=False)
    html = pictures.conversation([answered(memory=changed)], "gate")
    assert "MEMORY CHANGED aaaabbbb eeeeffff" in text(html)
    assert "ol-proof ol-bad" in html


def test_an_answer_that_was_cut_says_so() -> None:
    assert "cut at the longest answer" in text(pictures.conversation([answered(finish="length")], "gate"))
    assert "cut at" not in text(pictures.conversation([answered()], "gate"))


def test_the_time_of_a_camera_is_a_time_of_day() -> None:
    memory = msgspec.structs.replace(KNOWN, ts_kind="capture", until_ns=1_700_000_000 * NS)
    assert re.search(r"as of \d\d:\d\d:\d\d in", text(pictures.conversation([answered(memory=memory)], "gate")))


def test_a_choice_has_a_bar_for_each_option() -> None:
    html = pictures.conversation([chosen()], "gate")
    assert re.findall(r"width:([\d.]+)%", html) == ["70.0", "30.0"]
    assert "open 70% closed 30% ahead by 0.80 nats, calibrated scores" in text(html)


def test_a_question_that_failed_says_why_and_keeps_what_had_come() -> None:
    question = Question("gate", "hm?", answer="a red")
    question.error = NodeError(ErrorCode.CANCELLED, "was cancelled")
    assert "hm? a red Cancelled." in text(pictures.conversation([question], "gate"))


def test_the_newest_question_is_first_and_numbered_as_on_the_timeline() -> None:
    questions = [answered("first"), Question("other", "elsewhere"), answered("second")]
    said = text(pictures.conversation(questions, "gate"))
    assert said.startswith("2 What was first? second")
    assert "elsewhere" not in said


@pytest.mark.parametrize(
    "html",
    [
        pictures.conversation([answered(HOSTILE)], "gate"),
        pictures.conversation([Question("gate", HOSTILE, as_of=HOSTILE)], "gate"),
        pictures.conversation([Question("gate", "x", error=NodeError("LATER", HOSTILE))], "gate"),
        pictures.marks_table([Mark(name=HOSTILE, num_tokens=1, num_frames=1)]),
        pictures.events([Event(ts=NS, kind="later", message=HOSTILE)]),
        pictures.timeline(told(at(1, 4, 4)), [Mark(name=HOSTILE, num_tokens=1, num_frames=1)], []),
        pictures.timeline(told(at(1, 4, 4, **{HOSTILE: 3})), [], []),
        pictures.live_picture(HOSTILE, has_pictures=False),
        pictures.head(msgspec.structs.replace(hello(), node=HOSTILE, model=HOSTILE), node_stats(), ONLINE),
        pictures.banner(ONLINE, msgspec.structs.replace(hello(), notice=HOSTILE), HOSTILE, HOSTILE),
        pictures.note(HOSTILE),
        pictures.device_memory([Sample(s, Vram(device=HOSTILE, weights_bytes=1, kv_bytes=2)) for s in (1.0, 2.0)]),
    ],
)
def test_what_comes_from_outside_is_text_and_nothing_else(html: str) -> None:
    assert "img" not in tags(html)
    assert "onerror=alert(1)" in html


def test_an_answer_cannot_steer_what_shows_it() -> None:
    assert "\x1b" not in pictures.conversation([answered(HOSTILE)], "gate")


def test_what_is_not_known_is_no_zero() -> None:
    unknown = stream_stats(lag_ms=UNSET, fps_received=UNSET, fps_encoded=UNSET)
    said = text(pictures.figures(unknown, None))
    assert f"lag {pictures.UNKNOWN} no capture times" in said
    assert f"received {pictures.UNKNOWN} 12 frames" in said
    assert "0.0" not in said


def test_the_figures_of_a_stream_are_those_that_were_told() -> None:
    said = text(pictures.figures(stream_stats(fps_received=7.9, fps_encoded=3.1), None))
    for fact in ("lag 120 ms", "received 7.9 fps 12 frames", "kept \N{EN DASH} 8 frames", "encoded 3.1 fps 8 frames"):
        assert fact in said
    assert "1920\N{MULTIPLICATION SIGN}1080 encoded as 644\N{MULTIPLICATION SIGN}364" in said


def test_what_a_stream_has_given_up_is_told() -> None:
    assert "given up: frame_rate, gate" in text(pictures.figures(stream_stats(degraded=["frame_rate", "gate"]), None))
    assert "given up" not in text(pictures.figures(stream_stats(), None))


def test_the_memory_is_told_in_seconds_frames_tokens_and_bytes() -> None:
    said = text(pictures.memory(stream_stats()))
    for fact in ("2.5 s", "frames 8 in 2 chunks", "tokens 250 of 1,000", "bytes 16 kB of 64 kB reserved", "25.0% full"):
        assert fact in said
    assert "The memory is full" not in said


def test_a_full_memory_says_what_to_do() -> None:
    cache = msgspec.structs.replace(stream_stats().cache, full=True)
    assert "The memory is full: new frames are dropped" in text(pictures.memory(stream_stats(cache=cache)))


def test_the_timeline_tells_what_became_of_every_frame() -> None:
    known = told(at(1, 8, 8), at(2, 16, 10, ring_full=2, sampled_out=5))
    said = text(pictures.timeline(known, [], []))
    assert "remembered 10 forgotten 6" in said
    assert "dropped: not wanted at this rate 5" in said
    assert "dropped: came faster than they could be taken up 2" in said


def test_columns_are_as_high_as_their_frames() -> None:
    html = pictures.timeline(told(at(1, 0, 0), at(1, 8, 8), at(9, 12, 12), at(17, 12, 12, ring_full=2)), [], [])
    heights = [float(height) for height in re.findall(r'height="([\d.]+)"', html)]
    assert heights == [pictures.BAR_HEIGHT, pictures.BAR_HEIGHT / 2, pictures.BAR_HEIGHT / 4]


def test_what_came_before_the_page_does_not_set_the_scale() -> None:
    known = told(at(100, 5000, 5000), at(101, 5004, 5004), at(102, 5006, 5006))
    html = pictures.timeline(known, [], [])
    heights = [float(height) for height in re.findall(r'height="([\d.]+)"', html)]
    assert heights == [pictures.BAR_HEIGHT, pictures.BAR_HEIGHT, pictures.BAR_HEIGHT / 2]
    assert "4 frames in 1 s" in text(html)
    assert "<title>before " in html


def test_a_long_timeline_has_no_more_columns_than_can_be_seen() -> None:
    html = pictures.timeline(told(*(at(second, second, second) for second in range(1, 4000))), [], [])
    assert 50 < html.count("<rect") <= pictures.MAX_COLUMNS + 1


def test_a_mark_stands_where_the_memory_was_as_long() -> None:
    known = told(at(0, 0, 0), at(0, 4, 4), at(10, 8, 8), at(20, 12, 12))
    html = pictures.timeline(known, [Mark(name="noon", num_tokens=1, num_frames=8)], [])
    assert re.search(r'left:47.6\d%"><b>noon', html)  # 10 of 21 columns of a second


@pytest.mark.parametrize("reason", list(DropReason)[5:])
def test_every_reason_of_a_stream_is_said_in_words_of_people(reason: DropReason) -> None:
    assert "_" not in pictures.REASONS[reason]


def test_device_memory_is_stacked_from_the_weights_up() -> None:
    vram = Vram(
        device="cuda:0", weights_bytes=6, kv_bytes=2, activations_peak_bytes=UNSET, free_bytes=8, total_bytes=16
    )
    html = pictures.device_memory([Sample(1.0, vram), Sample(21.0, vram)])
    points = [shape.split() for shape in re.findall(r'points="([^"]+)"', html)]
    assert points == [
        ["0.00,25.00", "100.00,25.00", "100.00,100.00", "0.00,100.00"],
        ["0.00,0.00", "100.00,0.00", "100.00,25.00", "0.00,25.00"],
    ]
    assert "weights 6 B keys and values 2 B" in text(html)
    assert "activations" not in text(html)
    assert "8 B free of 16 B" in text(html)


def test_a_node_that_is_gone_is_said_to_be() -> None:
    assert "gone" in text(pictures.head(hello(), node_stats(), GONE))
    assert "silent for 7 s" in text(pictures.banner(GONE, hello(), "", "tcp://x:1"))
    assert "silent" not in text(pictures.banner(ONLINE, hello(), "", "tcp://x:1"))


def test_a_node_that_never_came_is_said_not_to_be_there() -> None:
    never = GONE._replace(has_been_seen=False, silent_s=float("inf"))
    assert "waiting for a node" in text(pictures.head(None, None, never))
    assert "No node is heard at tcp://x:1 yet" in text(pictures.banner(never, None, "", "tcp://x:1"))


def test_a_restart_and_a_refused_key_are_said() -> None:
    restarted = ONLINE._replace(num_restarts=1, restarted_s=0.0)
    assert "its memory began anew" in text(pictures.banner(restarted, hello(), "", "tcp://x:1"))
    refused = GONE._replace(refusal="the key is not allowed")
    assert "refuses this page's key: the key is not allowed" in text(pictures.banner(refused, None, "", "tcp://x:1"))


def test_a_trace_anywhere_is_loud() -> None:
    counted = QuestionCounters(received=3, answered=3, failed={}, waiting=0, running=0, traces=1)
    assert "ol-bad" in pictures.questions_line(node_stats(questions=counted))
    assert "none left a trace" in pictures.questions_line(node_stats())
