"""The page of `onlooker web`: where everything stands, and what happens when something is pressed.

Everything that is shown is a function of what the session knows. Two timers draw it anew, and send only what has
changed; a page that is loaded again is as it was.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gradio as gr
import gradio.themes
import numpy as np

from ..protocol.errors import OnlookerError
from ..protocol.messages import NAME_PATTERN
from . import web_pictures as pictures
from .own_node import OwnNode
from .replay import stream_slug
from .web_session import Question, Session, in_words
from .web_source import Sources, make_sample, parse_settings

CSS = Path(__file__).with_name("web.css")
ICON = Path(__file__).with_name("web.svg")
SCRIPT = Path(__file__).with_name("web.js")
REFRESH_S = 0.4
NOW = "now"
WEBCAM = "webcam"
WEBCAM_EVERY_S = 0.5
CHUNKS = ["1", "2", "4", "6", "8"]
SPEEDS = [(f"{rate:g}\N{MULTIPLICATION SIGN}", rate) for rate in (0.5, 1.0, 2.0, 4.0)] + [("fastest", 0.0)]

# In the browser: which question was sent, and whether the box still holds it when the server has taken it.
_NOTE_ASKED = "(...asked) => { window.onlookerAsked = asked[1]; return asked; }"
_EMPTY_ASKED = """(question, note) => {
  const isTaken = note === "" && question === window.onlookerAsked;
  return isTaken ? "" : { __type__: "update" };  // not what it was: more may have been written since
}"""

ELSEWHERE = """
A camera, or anything else that publishes frames, sends them straight to the node; its stream then
appears above by itself.

```
onlooker camera rtsp://192.168.1.20/stream1 --stream gate
onlooker camera 0 --stream desk
onlooker replay clip.mp4 --stream clip
```
"""


@dataclass(frozen=True, slots=True)
class Desk:
    """What a page works with."""

    session: Session
    sources: Sources
    folder: Path
    control: str  # the node's endpoint, for messages
    own_node: OwnNode | None = None
    no_node: str = ""  # why the page runs none of its own


def theme() -> gr.Theme:
    """Fonts of the system alone: nothing is loaded from anywhere."""
    sans = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
    mono = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
    return gradio.themes.Base(
        primary_hue=gradio.themes.colors.teal,
        neutral_hue=gradio.themes.colors.slate,
        radius_size=gradio.themes.sizes.radius_md,
        font=sans,
        font_mono=mono,
    ).set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_600",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        button_large_text_weight="600",
        button_large_text_size="*text_md",
        button_large_padding="8px 12px",
    )


class Page:
    """Builds the page and answers its events; each answer is what the components named beside it become."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._session = desk.session
        self._sources = desk.sources
        self._fed_last: str | None = None
        self._webcam_lock = threading.Lock()
        self._webcam_node: str | None = None  # session of the node that knows the webcam's stream

    def build(self) -> gr.Blocks:
        with gr.Blocks(title="Onlooker", analytics_enabled=False, fill_width=True) as page:
            self._lay_out()
            self._connect()
        return page

    # Where everything stands

    def _lay_out(self) -> None:
        self._seen = gr.State({})
        self._head = _html("head")
        self._banner = _html("banner")
        with gr.Row(elem_classes="ol-main", equal_height=False):
            with gr.Column(scale=5, min_width=330):
                self._lay_out_section("live", self._lay_out_live)
                self._lay_out_section("source", self._lay_out_sources)
                self._lay_out_section("device-section", self._lay_out_device)
            with gr.Column(scale=6, min_width=330):
                self._lay_out_section("memory-section", self._lay_out_memory)
                self._lay_out_section("ask-section", self._lay_out_ask)
                self._lay_out_section("marks-section", self._lay_out_marks)
                self._lay_out_section("events-section", self._lay_out_events)
        self._timer = gr.Timer(REFRESH_S)

    def _lay_out_section(self, name: str, lay_out: Callable[[], None]) -> None:
        with gr.Column(elem_classes="ol-section", elem_id=name):
            lay_out()

    def _lay_out_memory(self) -> None:
        _heading("Memory")
        self._memory = _html("memory")
        self._timeline = _html("timeline")

    def _lay_out_device(self) -> None:
        _heading("Device memory")
        self._device = _html("device")
        self._counted = _html("counted")

    def _lay_out_events(self) -> None:
        _heading("What happened")
        self._events = _html("events")

    def _lay_out_live(self) -> None:
        with gr.Row(elem_classes="ol-title", equal_height=True):
            _heading("Stream")
            self._stream = gr.Dropdown(
                [],
                label="Stream",
                show_label=False,
                container=False,
                interactive=True,
                elem_id="stream",
                filterable=False,
                scale=5,
                min_width=160,
            )
        self._picture = _html("picture")
        self._figures = _html("figures")
        with gr.Row(elem_classes="ol-buttons"):
            self._start = gr.Button("Start", variant="primary", elem_id="start", min_width=70)
            self._pause = gr.Button("Pause", elem_id="pause", min_width=70)
            self._stop = gr.Button("Stop", elem_id="stop", min_width=70)
            self._reset = gr.Button("Reset", elem_id="reset", min_width=70)
        self._source_note = _html("source-note")
        self._progress = _html("progress")

    def _lay_out_sources(self) -> None:
        with gr.Tabs():
            with gr.Tab("Video file"):
                self._file = gr.File(file_types=["video"], label="Video", show_label=False, elem_id="file", height=136)
                with gr.Row(elem_classes="ol-buttons"):
                    self._sample = gr.Button("No video at hand? Take the sample", size="sm", elem_id="sample")
                self._speed = gr.Radio(SPEEDS, value=1.0, label="Speed", elem_id="speed")
            with gr.Tab("Webcam"):
                self._webcam = gr.Image(
                    sources=["webcam"], streaming=True, type="numpy", show_label=False, elem_id="webcam", height=240
                )
                gr.HTML(
                    f'<div class="ol-facts"><span>Its stream is called {WEBCAM}, two pictures a second.</span></div>'
                )
            with gr.Tab("Other cameras"):
                gr.Markdown(ELSEWHERE)
        with gr.Accordion("How a new stream is encoded", open=False, elem_id="settings"):
            self._chunk = gr.Radio(CHUNKS, value="4", label="Frames encoded together", elem_id="chunk")
            with gr.Row():
                self._fps = _field("Frames a second", "all", "fps")
                self._size = _field("Encode size", "as received", "encode-size")
                self._memory_mib = _field("Memory, MiB", "default", "memory-mib")
            self._apply = gr.Button("Begin the stream anew with these", size="sm", elem_id="apply")
            self._settings_note = _html("settings-note")

    def _lay_out_ask(self) -> None:
        _heading("Ask")
        with gr.Row(elem_classes="ol-ask", equal_height=True):
            self._question = gr.Textbox(
                placeholder="What do you see now?",
                show_label=False,
                container=False,
                elem_id="question",
                scale=6,
                min_width=180,
                max_lines=3,
            )
            self._ask = gr.Button("Ask", variant="primary", elem_id="ask", scale=1, min_width=70)
        with gr.Row(equal_height=True):
            self._options = gr.Textbox(
                placeholder="a red circle, a blue square",
                label="Answers to choose from, if any",
                elem_id="options",
                scale=4,
                min_width=180,
            )
            self._as_of = gr.Dropdown(
                [NOW], value=NOW, label="Memory as of", elem_id="as-of", scale=2, min_width=110, filterable=False
            )
        with gr.Row(elem_classes="ol-buttons"):
            self._cancel = gr.Button("Cancel what is running", size="sm", elem_id="cancel", min_width=110)
            self._clear = gr.Button("Clear answers", size="sm", elem_id="clear", min_width=110)
        self._ask_note = _html("ask-note")
        self._chat = _html("chat")

    def _lay_out_marks(self) -> None:
        _heading("Marks")
        self._marks = _html("marks")
        with gr.Row(elem_classes="ol-ask", equal_height=True):
            self._mark_name = gr.Textbox(
                placeholder="before-lunch",
                show_label=False,
                container=False,
                elem_id="mark-name",
                scale=3,
                min_width=120,
            )
            self._mark = gr.Button("Mark", elem_id="mark", scale=1, min_width=70)
        with gr.Row(elem_classes="ol-ask", equal_height=True):
            self._mark_choice = gr.Dropdown(
                [], show_label=False, container=False, elem_id="mark-choice", scale=3, min_width=120, filterable=False
            )
            self._rollback = gr.Button("Roll back", elem_id="rollback", scale=1, min_width=95)
            self._delete = gr.Button("Delete", elem_id="delete", scale=1, min_width=70)
        self._mark_note = _html("mark-note")

    # What leads to what

    def _connect(self) -> None:
        shown = [self._seen, self._stream, self._as_of, self._mark_choice, *self._drawn.values()]
        self._timer.tick(
            self._refresh,
            [self._seen, self._stream],
            shown,
            show_progress="hidden",
            concurrency_limit=None,
            trigger_mode="once",
            api_visibility="private",
        )
        settings = [self._chunk, self._fps, self._size, self._memory_mib]
        on_source = [self._source_note, self._stream]
        _on(self._start.click, self._press_start, [self._stream, self._file, self._speed, *settings], on_source)
        _on(self._pause.click, self._press_pause, [self._stream], [self._source_note])
        _on(self._stop.click, self._press_stop, [self._stream], [self._source_note])
        _on(self._reset.click, self._press_reset, [self._stream], [self._source_note])
        _on(self._sample.click, self._press_sample, [self._speed, *settings], on_source)
        _on(self._apply.click, self._press_apply, [self._stream, *settings], [self._settings_note])
        self._connect_ask(self._ask.click)
        self._connect_ask(self._question.submit)
        _on(self._cancel.click, self._press_cancel, [], [self._ask_note])
        _on(self._clear.click, self._press_clear, [], [self._ask_note])
        _on(self._mark.click, self._press_mark, [self._stream, self._mark_name], [self._mark_note, self._mark_name])
        _on(self._rollback.click, self._press_rollback, [self._stream, self._mark_choice], [self._mark_note])
        _on(self._delete.click, self._press_delete, [self._stream, self._mark_choice], [self._mark_note])
        # Notes and a mark of another stream mean nothing here.
        of_one_stream = [self._settings_note, self._ask_note, self._mark_note, self._as_of]
        _on(self._stream.change, lambda: ["", "", "", NOW], [], of_one_stream)
        _on(self._stream.input, lambda: "", [], [self._source_note])
        self._webcam.stream(
            self._see,
            [self._webcam, *settings],
            on_source,
            stream_every=WEBCAM_EVERY_S,
            show_progress="hidden",
            time_limit=None,
            concurrency_limit=1,
            api_visibility="private",
        )

    def _connect_ask(self, event: Callable[..., Any]) -> None:
        """Empty the box once its question was taken, unless the next one is being written there already."""
        asked = [self._stream, self._question, self._options, self._as_of]
        taken = event(
            self._press_ask,
            asked,
            [self._ask_note],
            js=_NOTE_ASKED,
            show_progress="hidden",
            concurrency_limit=None,
            trigger_mode="multiple",
            api_visibility="private",
        )
        taken.then(None, [self._question, self._ask_note], [self._question], js=_EMPTY_ASKED, show_progress="hidden")

    @property
    def _drawn(self) -> dict[str, gr.HTML]:
        """The parts of the page that are drawn anew."""
        return {
            "head": self._head,
            "banner": self._banner,
            "picture": self._picture,
            "figures": self._figures,
            "progress": self._progress,
            "memory": self._memory,
            "timeline": self._timeline,
            "chat": self._chat,
            "device": self._device,
            "counted": self._counted,
            "marks": self._marks,
            "events": self._events,
        }

    # What is shown

    def _refresh(self, seen: dict[str, Any], stream: str | None) -> list[Any]:
        """What has changed since this browser was last told; `seen` is what it was told."""
        names = self._session.stream_names
        chosen = stream if self._is_known(stream) else self._newest_stream(names)
        names = names if chosen is None else sorted({*names, chosen})
        marks = [mark.name for mark in self._session.marks.get(chosen or "", [])]
        lists = {
            "streams": (names, chosen),
            "as_of": ([NOW, *marks], chosen),
            "mark_choice": (marks, chosen),
        }
        html = self._html_of(chosen)
        now = {**lists, **html}
        changed = {name for name, value in now.items() if seen.get(name) != value}
        return [
            now if changed else gr.skip(),
            _stream_update(names, stream, chosen) if "streams" in changed else gr.skip(),
            gr.update(choices=[NOW, *marks]) if "as_of" in changed else gr.skip(),
            gr.update(choices=marks) if "mark_choice" in changed else gr.skip(),
            *(html[name] if name in changed else gr.skip() for name in self._drawn),
        ]

    def _is_known(self, stream: str | None) -> bool:
        """Whether anything is known of a stream, be it that a node which is gone has told it."""
        with self._session.knowledge.lock:
            return stream in self._session.knowledge.timelines

    def _newest_stream(self, names: Sequence[str]) -> str | None:
        """What a page shows that has only just been opened: what was fed last from here, or any stream."""
        return self._fed_last if self._fed_last in names else next(iter(names), None)

    def _html_of(self, stream: str | None) -> dict[str, str]:
        session, knowledge = self._session, self._session.knowledge
        marks = session.marks.get(stream or "", [])
        with knowledge.lock:
            view, stats = knowledge.view, knowledge.view.streams.get(stream or "")
            presence = knowledge.presence(time.monotonic())
            timeline = knowledge.timelines.get(stream or "")
            asked = pictures.questions_of(session.questions, stream)
            return {
                "head": pictures.head(view.hello, view.stats, presence),
                "banner": pictures.banner(presence, view.hello, self._own_node_text, self._desk.control),
                "picture": pictures.live_picture(stream, self._sources.pictures.newest(stream or "") is not None),
                "figures": pictures.figures(stats, timeline),
                "progress": pictures.progress(self._sources.player(stream)),
                "memory": pictures.memory(stats),
                "timeline": pictures.timeline(timeline, marks, asked),
                "chat": pictures.conversation(session.questions, stream),
                "device": pictures.device_memory(knowledge.samples),
                "counted": pictures.questions_line(view.stats),
                "marks": pictures.marks_table(marks),
                "events": pictures.events(view.events),
            }

    @property
    def _own_node_text(self) -> str:
        return self._desk.own_node.state.text if self._desk.own_node else self._desk.no_node

    # What is pressed

    def _press_start(self, stream: str | None, file: str | None, speed: float, *settings: Any) -> list[Any]:
        """Go on with what is paused; or play the chosen file into a stream of its name, or the last one again."""
        player = self._sources.player(stream)
        if player is not None and player.state == "paused":
            player.go_on()
            return ["", gr.skip()]
        if self._resumes(stream):
            return _tried(lambda: self._resume(str(stream)), "Frames are taken in again.", gr.skip())
        again = player.source if player is not None else None
        if file is None and again is None:
            return [pictures.note("Choose a video first, or take the sample.", "warn"), gr.skip()]
        return self._play(str(file or again), speed, settings)

    def _resumes(self, stream: str | None) -> bool:
        stats = self._session.stream(stream)
        return stats is not None and stats.state == "paused"

    def _resume(self, stream: str) -> None:
        self._session.client.resume_stream(stream)

    def _press_sample(self, speed: float, *settings: Any) -> list[Any]:
        path = self._desk.folder / "sample.mp4"
        if not path.exists():
            make_sample(str(path))
        return self._play(str(path), speed, settings)

    def _play(self, file: str, speed: float, settings: tuple[Any, ...]) -> list[Any]:
        name = stream_slug(file)
        if not self._session.presence.is_online:
            return [pictures.note("There is no node to play it to yet.", "bad"), gr.skip()]
        is_known = name in self._session.stream_names

        def play() -> None:
            self._sources.play(file, name, speed, parse_settings(*settings))
            self._fed_last = name

        text = f"{name} is a stream of the node: it keeps its settings." if is_known else ""
        return _tried(play, text, gr.update(choices=sorted({*self._session.stream_names, name}), value=name))

    def _press_pause(self, stream: str | None) -> list[Any]:
        """Hold what is played from here; of other streams, let the node drop the frames."""
        player = self._sources.player(stream)
        if player is not None and not player.is_over:
            player.hold()
            return [pictures.note("Paused. Start goes on.")]
        if stream is None:
            return [pictures.note("There is no stream to pause yet.", "warn")]
        text = f"The node drops the frames of {stream} until Start is pressed; what is remembered stays."
        return _tried(lambda: self._session.client.pause_stream(stream), text)

    def _press_stop(self, stream: str | None) -> list[Any]:
        player = self._sources.player(stream)
        if player is None or player.is_over:
            return [pictures.note("Nothing is being played from here into this stream.", "warn")]
        return _tried(player.stop, "")

    def _press_reset(self, stream: str | None) -> list[Any]:
        if stream is None:
            return [pictures.note("There is no stream to reset yet.", "warn")]
        return _tried(lambda: self._session.client.reset(stream), f"Everything {stream} had shown is forgotten.")

    def _press_apply(self, stream: str | None, *settings: Any) -> list[Any]:
        if stream is None:
            return [pictures.note("There is no stream yet: a new one begins with these.", "warn")]
        text = f"{stream} begins anew with these settings and an empty memory."
        return _tried(lambda: self._sources.apply(stream, parse_settings(*settings)), text)

    def _press_ask(self, stream: str | None, text: str, options: str, as_of: str) -> str:
        """Ask, and say nothing; or say why not."""
        if stream is None:
            return pictures.note("There is no stream to ask about yet.", "warn")
        if not text.strip():
            return pictures.note("Write a question first.", "warn")
        choices = tuple(option.strip() for option in re.split(r"[,\n]", options) if option.strip())
        if len(choices) == 1:
            return pictures.note("One answer is no choice: give two or more, with commas between.", "warn")
        if not self._session.presence.is_online:
            return pictures.note("The node is not there to answer. Ask again when it is back.", "bad")
        self._session.ask(Question(stream, text.strip(), choices, None if as_of == NOW else as_of))
        return ""

    def _press_cancel(self) -> list[Any]:
        if not self._session.running:
            return [pictures.note("No question is running.", "quiet")]
        return _tried(self._session.cancel_all, "")

    def _press_clear(self) -> list[Any]:
        self._session.clear_questions()
        return [""]

    def _press_mark(self, stream: str | None, name: str) -> list[Any]:
        if stream is None:
            return [pictures.note("There is no stream to mark yet.", "warn"), gr.skip()]
        if not re.fullmatch(NAME_PATTERN, name.strip()):
            return [pictures.note("A mark's name has letters, digits, and . _ - only.", "warn"), gr.skip()]
        return _tried(lambda: self._steer_marks(stream, "mark", name.strip()), f"Marked as {name.strip()}.", "")

    def _press_rollback(self, stream: str | None, name: str | None) -> list[Any]:
        if stream is None or not name:
            return [pictures.note("Choose a mark to roll back to.", "warn")]
        text = f"Everything after {name} is forgotten."
        return _tried(lambda: self._steer_marks(stream, "rollback", name), text)

    def _press_delete(self, stream: str | None, name: str | None) -> list[Any]:
        if stream is None or not name:
            return [pictures.note("Choose a mark to delete.", "warn")]
        return _tried(lambda: self._steer_marks(stream, "delete_mark", name), f"The mark {name} is deleted.")

    def _steer_marks(self, stream: str, verb: Literal["mark", "rollback", "delete_mark"], name: str) -> None:
        getattr(self._session.client, verb)(stream, name)
        self._session.refresh_marks(stream)

    def _see(self, picture: np.ndarray | None, *settings: Any) -> list[Any]:
        """Send a picture of the browser's camera on; a node that was restarted gets its stream anew."""
        if picture is None:
            return [gr.skip(), gr.skip()]
        if not self._session.presence.is_online:
            return [pictures.note("There is no node to send the webcam to.", "bad"), gr.skip()]
        with self._webcam_lock:
            return _tried(lambda: self._send_webcam(picture, settings), "", self._webcam_choice())

    def _webcam_choice(self) -> Any:
        """Show the webcam's stream as soon as its first picture is sent, and never force it on people after that."""
        if self._webcam_node is not None and WEBCAM in self._session.stream_names:
            return gr.skip()
        return gr.update(choices=sorted({*self._session.stream_names, WEBCAM}), value=WEBCAM)

    def _send_webcam(self, picture: np.ndarray, settings: tuple[Any, ...]) -> None:
        hello = self._session.knowledge.view.hello
        if hello is not None and hello.session != self._webcam_node:
            self._sources.provide(WEBCAM, parse_settings(*settings))
            self._webcam_node, self._fed_last = hello.session, WEBCAM
        self._sources.webcam(WEBCAM).send(np.ascontiguousarray(picture))


def _stream_update(names: list[str], stream: str | None, chosen: str | None) -> Any:
    """The list of streams. A choice that was made meanwhile stays: only one that cannot be is replaced."""
    return gr.update(choices=names) if chosen == stream else gr.update(choices=names, value=chosen)


def _html(name: str) -> gr.HTML:
    return gr.HTML("", elem_id=name, apply_default_css=False, js_on_load=None)


def _field(label: str, placeholder: str, name: str) -> gr.Textbox:
    return gr.Textbox("", label=label, placeholder=placeholder, elem_id=name, min_width=110)


def _heading(text: str) -> None:
    gr.HTML(f"<h2>{text}</h2>", apply_default_css=False, js_on_load=None)


def _on(event: Callable[..., Any], fn: Callable[..., Any], inputs: list[Any], outputs: list[Any]) -> None:
    event(fn, inputs, outputs, show_progress="hidden", concurrency_limit=None, api_visibility="private")


def _tried(action: Callable[[], object], text: str, *others: Any) -> list[Any]:
    """Do it, and say that it is done, or why not; then the other components stay as they are."""
    try:
        action()
    except OnlookerError as error:
        return [pictures.note(in_words(error), "bad"), *(gr.skip() for _ in others)]
    except ValueError as error:
        return [pictures.note(str(error), "bad"), *(gr.skip() for _ in others)]
    return [pictures.note(text, "good"), *others]
