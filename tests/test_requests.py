"""Envelopes, and the replies kept for duplicates."""

import pytest

from onlooker.node.requests import MAX_ENVELOPE_FRAMES, StoredReplies, split_envelope

PEER, ID, BODY = b"peer", b"\x00\x00\x00\x01", b"body"


@pytest.mark.parametrize(
    ("parts", "envelope", "body"),
    [
        pytest.param([PEER, b"", BODY], (PEER, b""), [BODY], id="REQ"),
        pytest.param([PEER, ID, b"", BODY], (PEER, ID, b""), [BODY], id="REQ with CORRELATE"),
        pytest.param([PEER, BODY], (PEER,), [BODY], id="DEALER without an empty frame"),
        pytest.param([PEER, b""], (PEER, b""), [], id="no body"),
        pytest.param([PEER], (PEER,), [], id="nothing at all"),
        pytest.param(
            [PEER, b"", BODY, b"", BODY], (PEER, b""), [BODY, b"", BODY], id="only the first empty frame counts"
        ),
        pytest.param([PEER, b"x" * 300, b"", BODY], (PEER,), [b"x" * 300, b"", BODY], id="no socket makes that"),
        pytest.param(
            [PEER, *[ID] * MAX_ENVELOPE_FRAMES, b"", BODY],
            (PEER,),
            [*[ID] * MAX_ENVELOPE_FRAMES, b"", BODY],
            id="too deep",
        ),
    ],
)
def test_a_reply_begins_with_all_up_to_the_first_empty_frame(parts, envelope, body):
    assert split_envelope(parts) == (envelope, body)


def test_the_oldest_stored_reply_makes_room():
    replies = StoredReplies(max_replies=2)
    for name in ("a", "b", "a", "c"):
        replies.put(("session", name), b"", name.encode())
    assert replies.get(("session", "b")) is None
    assert [replies.get(("session", name)).reply for name in ("a", "c")] == [b"a", b"c"]  # type: ignore[union-attr]
    assert len(replies) == 2


def test_a_stored_reply_is_forgotten_in_time():
    replies = StoredReplies(keep_s=0)
    replies.put(("session", "a"), b"", b"reply")
    assert replies.get(("session", "a")) is None
    assert len(replies) == 0
