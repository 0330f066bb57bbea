"""The HTTP server of a page: the page itself, and the live pictures beside it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable

import gradio as gr
import uvicorn
from fastapi import FastAPI
from fastapi.responses import Response, StreamingResponse

from .web_page import CSS, theme
from .web_source import Pictures, shown_jpeg

PICTURE_PERIOD_S = 0.1
CLOSING_S = 2
MAX_UPLOAD = "4gb"

_BOUNDARY = "picture"


class PageServer:
    """Serves a page at `address` until Ctrl-C or SIGTERM."""

    def __init__(self, page: gr.Blocks, pictures: Pictures, host: str, port: int) -> None:
        """Take the port, or a free one for 0. Raises OSError if it cannot be had."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family)
        shown_host = f"[{host}]" if ":" in host else host
        self.address = f"http://{shown_host}:{self._socket.getsockname()[1]}"
        app = FastAPI(openapi_url=None)
        app.get("/live/{stream}")(self._live)
        gr.mount_gradio_app(
            app,
            page,
            path="/",
            theme=theme(),
            css_paths=CSS,
            footer_links=[],
            ssr_mode=False,
            show_error=True,
            max_file_size=MAX_UPLOAD,
        )
        self._pictures = pictures
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=CLOSING_S, access_log=False)
        self._server = uvicorn.Server(config)

    def run(self) -> None:
        """Serve. Ctrl-C and SIGTERM end it; they are raised again once the server is closed."""
        self._server.run(sockets=[self._socket])

    async def _live(self, stream: str) -> Response:
        """The pictures of a stream as they come, one in the place of the other."""
        if self._pictures.newest(stream) is None:
            return Response(status_code=404)
        parts = live_parts(self._pictures, stream, lambda: self._server.should_exit)
        return StreamingResponse(parts, media_type=f"multipart/x-mixed-replace; boundary={_BOUNDARY}")


async def live_parts(pictures: Pictures, stream: str, is_over: Callable[[], bool]) -> AsyncIterator[bytes]:
    """Each new picture as one part of an answer that never ends."""
    number = -1
    while not is_over():
        shown = pictures.newest(stream)
        if shown is not None and shown.number != number:
            number = shown.number
            jpeg = await asyncio.to_thread(shown_jpeg, shown.pixels)
            part = _part(jpeg)
            yield part
            # A browser shows a part when it sees that the next one begins.
            yield part if number == 0 else b""
        await asyncio.sleep(PICTURE_PERIOD_S)


def _part(jpeg: bytes) -> bytes:
    header = f"--{_BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
    return header.encode() + jpeg + b"\r\n"
