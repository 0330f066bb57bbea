"""The HTTP server of a page: the page itself, and the live pictures beside it."""

from __future__ import annotations

import socket

import gradio as gr
import uvicorn
from fastapi import FastAPI, Request, Response

from .web_page import CSS, ICON, SCRIPT, theme
from .web_source import Pictures, shown_jpeg

CLOSING_S = 1
MAX_UPLOAD = "4gb"


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
            favicon_path=str(ICON),
            head=f"<script>{SCRIPT.read_text()}</script>",
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

    def _live(self, stream: str, request: Request) -> Response:
        """The newest picture of a stream, if the browser does not have it yet."""
        shown = self._pictures.newest(stream)
        if shown is None:
            return Response(status_code=404)
        headers = {"ETag": f'"{shown.session}-{shown.number}"', "Cache-Control": "no-cache"}
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(shown_jpeg(shown.pixels), media_type="image/jpeg", headers=headers)
