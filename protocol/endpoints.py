"""Which endpoints the ask and the control socket have, what each takes, and what it answers."""

from typing import Literal, NamedTuple

from .messages import (
    Answer,
    Ask,
    AskChoice,
    CacheInfo,
    CancelRef,
    Choice,
    Empty,
    Hello,
    Mark,
    MarkRef,
    Marks,
    Message,
    NodeStats,
    Pong,
    StreamAdded,
    StreamRef,
    Streams,
    StreamSpec,
)


class Endpoint(NamedTuple):
    """The data of a request and of its final reply, and the sockets that take it."""

    request: type[Message]
    reply: type[Message]
    sockets: tuple[Literal["ask", "control"], ...] = ("control",)


ENDPOINTS: dict[str, Endpoint] = {
    "ask": Endpoint(Ask, Answer, ("ask",)),
    "ask_choice": Endpoint(AskChoice, Choice, ("ask",)),
    "hello": Endpoint(Empty, Hello, ("ask", "control")),
    "streams": Endpoint(Empty, Streams, ("ask", "control")),
    "ping": Endpoint(Empty, Pong),
    "status": Endpoint(Empty, NodeStats),
    "cache_info": Endpoint(StreamRef, CacheInfo),
    "reset": Endpoint(StreamRef, CacheInfo),
    "mark": Endpoint(MarkRef, Mark),
    "rollback": Endpoint(MarkRef, CacheInfo),
    "mark_delete": Endpoint(MarkRef, Marks),
    "marks": Endpoint(StreamRef, Marks),
    "cancel": Endpoint(CancelRef, Empty),
    "stream_add": Endpoint(StreamSpec, StreamAdded),
    "stream_remove": Endpoint(StreamRef, Empty),
    "stream_pause": Endpoint(StreamRef, Empty),
    "stream_resume": Endpoint(StreamRef, Empty),
}
