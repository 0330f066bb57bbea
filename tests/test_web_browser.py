"""The page of `onlooker web` in a real browser, with a real node that has the built-in model.

Needs Chromium and its driver (Debian: apt install chromium chromium-driver). Screenshots go to the folder that
SCREENSHOTS names, if it does.
"""

from __future__ import annotations

import io
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from deadline import until
from PIL import Image

pytest.importorskip("selenium", reason="selenium is not installed")
if find_spec("gradio") is None:
    pytest.skip("the extra `web` is not installed", allow_module_level=True)

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from onlooker.tools.scenes import write_clip
from onlooker.tools.story import make_plain_story

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="there is no browser: apt install chromium chromium-driver"),
]

START_S = 60.0  # torch and gradio may have to be read from a cold disk
PATIENCE_S = 20.0
THINGS = ("red circle", "blue square", "green triangle")
OPTIONS = ", ".join(f"a {thing}" for thing in THINGS)
ROOT = Path(__file__).parent.parent
CLICK = "arguments[0].click()"

# What fades in and out would be caught half-way by a screenshot.
_STAND_STILL = """
document.head.insertAdjacentHTML("beforeend", "<style>* { transition: none !important }</style>")
"""
_PRESS_ENTRY = """
const entries = [...document.querySelectorAll(`#${arguments[0]} ul li, ul.options li`)];
const entry = entries.find(each => each.textContent.includes(arguments[1]));
entry?.dispatchEvent(new MouseEvent("mousedown", {bubbles: true, cancelable: true}));
return entry !== undefined;
"""


class Screen:
    """A browser that looks at the page. Nothing outside this machine can be reached from it."""

    def __init__(self, served: Served) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        for flag in (
            *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"),
            *("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"),
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        ):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
        self.address = served.address
        self.resize(1280)
        self.driver.get(f"{self.address}/?__theme=light")
        self.wait("#head", "Onlooker")
        self.driver.execute_script(_STAND_STILL)

    def resize(self, width: int) -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def dress(self, theme: str) -> None:
        self.driver.execute_script("document.body.classList.toggle('dark', arguments[0] === 'dark')", theme)

    def text(self, css: str) -> str:
        """What is written there; empty where there is nothing."""
        return self.driver.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map(each => each.innerText).join(' ')", css
        )

    def wait(self, css: str, pattern: str, timeout_s: float = PATIENCE_S) -> re.Match[str]:
        """Wait until a pattern is written somewhere."""
        try:
            match = until(lambda: re.search(pattern, self.text(css)), timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{css} never said {pattern!r} but {self.text(css)!r}") from error
        assert match is not None
        return match

    def width_of(self, css: str) -> int:
        """The width of a picture in pixels; 0 as long as there is none."""
        script = "return document.querySelector(arguments[0])?.naturalWidth ?? 0"
        return self.driver.execute_script(script, css)

    def press(self, name: str) -> None:
        self.driver.execute_script(CLICK, self.driver.find_element(By.ID, name))

    def click(self, css: str) -> None:
        """Press the first that fits, as soon as it is there."""
        found = until(lambda: self.driver.find_elements(By.CSS_SELECTOR, css), PATIENCE_S)
        self.driver.execute_script(CLICK, found[0])

    def write(self, name: str, text: str) -> None:
        """Write into a field, in the place of what is there."""
        css = f"#{name} textarea, #{name} input"
        field = until(lambda: self.driver.find_elements(By.CSS_SELECTOR, css), PATIENCE_S)[0]
        self.driver.execute_script("arguments[0].select()", field)
        field.send_keys(text)

    def choose(self, name: str, text: str) -> None:
        """Press the one of several buttons that reads so."""
        labels = self.driver.find_elements(By.CSS_SELECTOR, f"#{name} label, #{name} button")
        self.driver.execute_script(CLICK, next(label for label in labels if label.text == text))

    def value(self, name: str) -> str:
        """What stands in a field."""
        return self.driver.execute_script("return document.querySelector(arguments[0]).value", f"#{name} input")

    def choose_in_list(self, name: str, text: str) -> None:
        """Open a list and choose the first entry that reads so."""
        field = self.driver.find_element(By.CSS_SELECTOR, f"#{name} input")
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", field)
        until(lambda: self._press_entry(field, name, text), PATIENCE_S)

    def _press_entry(self, field: WebElement, name: str, text: str) -> bool:
        """Open the list if it is closed; it opens and closes with a fade."""
        if not self.driver.execute_script(_PRESS_ENTRY, name, text):
            self.driver.execute_script("document.activeElement.blur()")
            field.click()
            return False
        return True

    def upload(self, video: Path) -> None:
        for button in self.driver.find_elements(By.CSS_SELECTOR, '#file button[aria-label="Clear"]'):
            self.driver.execute_script(CLICK, button)
        field = until(lambda: self.driver.find_elements(By.CSS_SELECTOR, "#file input[type=file]"), PATIENCE_S)[0]
        field.send_keys(str(video))
        self.wait("#file", re.escape(video.stem[:8]))

    def ask(self, question: str, options: str = "") -> None:
        self.write("question", question)
        self.write("options", options or " ")
        self.press("ask")

    def keep(self, name: str) -> None:
        """Keep a screenshot of the whole page, where one is wanted."""
        folder = os.environ.get("SCREENSHOTS")
        if not folder:
            return
        # A window as high as the page: pictures beyond a window's edge come out shifted.
        width, height = self.driver.execute_script(
            "return [window.innerWidth, document.querySelector('.gradio-container').scrollHeight]"
        )
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        picture = Image.open(io.BytesIO(self.driver.get_screenshot_as_png()))
        picture.quantize(256).save(ROOT / folder / f"{name}.png", optimize=True)
        self.resize(width)

    def close(self) -> None:
        self.driver.quit()

    def log(self, kind: str) -> list[dict[str, Any]]:
        return self.driver.get_log(kind)


class Served:
    """`onlooker web` in a process of its own, with a node that it starts itself."""

    def __init__(self, folder: Path) -> None:
        places = [part for name in ("frames", "ask", "control", "telemetry") for part in _place(folder, name)]
        self._log = (folder / "web.log").open("w")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "onlooker.tools.cli", "web", "--port", "0", *places],
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=folder,
        )
        self._folder = folder

    @cached_property
    def address(self) -> str:
        """Where the page is, once it is served."""
        assert self._process.stdout is not None
        assert select.select([self._process.stdout], [], [], START_S)[0], "the page was not served in time"
        match = re.search(r"http://[0-9.:]+", self._process.stdout.readline())
        assert match, (self._folder / "web.log").read_text()
        return match[0]

    @property
    def pid(self) -> int:
        return self._process.pid

    def end(self) -> int:
        """Ask it to end, and return its status."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(10.0)

    def kill(self) -> None:
        """Leave nothing running."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(10.0)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()


def _place(folder: Path, name: str) -> tuple[str, str]:
    return f"--{name}", f"ipc://{folder / name}"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("web"))
    yield served
    served.kill()


@pytest.fixture(scope="module")
def screen(served: Served) -> Iterator[Screen]:
    screen = Screen(served)
    try:
        yield screen
    finally:
        screen.close()


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("videos") / "story.mp4"
    write_clip(make_plain_story(11, THINGS, show_s=2.0, split="test"), path, fps=8.0)
    return path


@pytest.fixture
def told(screen: Screen, story: Path) -> Screen:
    """A page whose stream `story` has shown everything."""
    screen.wait("#head", "ready", START_S)
    if screen.value("stream") != "story":
        play(screen, story, "fastest")
    screen.wait("#progress", r"(Played|Stopped): \d+ frames sent")
    screen.wait("#timeline", "remembered [1-9]")
    return screen


def play(screen: Screen, video: Path, speed: str) -> None:
    """Upload a video and start it; the page then shows its stream."""
    screen.click('#source button[role="tab"]:nth-child(1)')
    screen.upload(video)
    screen.choose("speed", speed)
    screen.press("start")
    until(lambda: screen.value("stream") == video.stem, PATIENCE_S)


def copied(video: Path, path: Path) -> Path:
    """The same video under another name, which makes it another stream."""
    shutil.copy(video, path)
    return path


def cards(screen: Screen) -> list[str]:
    """What is written on each question, the newest first."""
    return screen.driver.execute_script(
        "return [...document.querySelectorAll('#chat .ol-answered, #chat .ol-failed')].map(each => each.innerText)"
    )


def test_a_video_is_uploaded_played_and_asked_about_while_it_plays(screen: Screen, story: Path) -> None:
    screen.wait("#head", "ready", START_S)
    screen.keep("web_start")
    play(screen, story, "1\N{MULTIPLICATION SIGN}")
    screen.wait("#timeline", "remembered [1-9]")
    tokens = screen.wait("#memory", r"([\d,]+)\s+of [\d,]+\s+bytes")[1]
    screen.write("question", f"What was the first thing?{Keys.ENTER}")
    screen.ask("What do you see now?", OPTIONS)
    until(lambda: len(cards(screen)) == 2, PATIENCE_S)
    assert "Playing: " in screen.text("#progress")
    for card in cards(screen):
        assert re.search(r"as of [\d.]+ s of the file", card)
        assert re.search(r"in memory [\d,]+ frames of [\d.]+ s", card)
        assert re.search(r"first token [\d.]+ ms", card)
        assert "memory unchanged" in card
    choice = next(card for card in cards(screen) if "nats" in card)
    assert sum(map(int, re.findall(r"(\d+)%", choice))) in range(99, 102)
    assert screen.wait("#memory", r"([\d,]+)\s+of [\d,]+\s+bytes")[1] != tokens
    screen.wait("#timeline", "remembered (2[4-9]|3[0-9])")
    screen.keep("web_running")
    screen.wait("#progress", "Played: 48 frames sent, 48 encoded")
    screen.wait("#timeline", "remembered 48")


def test_the_answers_are_right(screen: Screen, story: Path, tmp_path: Path) -> None:
    screen.wait("#head", "ready", START_S)
    play(screen, copied(story, tmp_path / "answers.mp4"), "fastest")
    screen.wait("#timeline", "remembered 48")
    screen.ask("What have you seen so far, in order?")
    screen.ask("What was the first thing?")
    screen.ask("What do you see now?")
    screen.ask("What was the last thing?", OPTIONS)
    until(lambda: len(cards(screen)) == 4, PATIENCE_S)
    screen.keep("web_answer")
    last, now, first, _ = cards(screen)
    assert "a red circle" in first
    assert "a green triangle" in now
    assert max(THINGS, key=lambda thing: int(re.findall(rf"a {thing}\s+(\d+)%", last)[0])) == "green triangle"


def test_a_paused_video_goes_on_where_it_was(screen: Screen, story: Path, tmp_path: Path) -> None:
    play(screen, copied(story, tmp_path / "held.mp4"), "1\N{MULTIPLICATION SIGN}")
    screen.wait("#progress", "Playing: .* frames")
    screen.press("pause")
    sent = screen.wait("#progress", r"Paused: .* (\d+) frames")[1]
    assert int(sent) < 40
    screen.press("start")  # at the same speed: faster, it could be over before anybody has looked
    screen.wait("#progress", r"Playing: .* frames")
    screen.press("stop")
    screen.wait("#progress", r"Stopped: \d+ frames sent")


def test_marks_are_set_asked_about_and_rolled_back_to(told: Screen, story: Path) -> None:
    told.write("mark-name", "whole-story")
    told.press("mark")
    marked = int(told.wait("#marks", r"whole-story (\d+) frames")[1])
    told.wait("#timeline", "whole-story")
    told.press("start")
    told.wait("#progress", "Playing")
    until(lambda: int(told.wait("#timeline", r"remembered (\d+)")[1]) > marked, PATIENCE_S)
    told.press("stop")
    told.choose_in_list("mark-choice", "whole-story")
    told.press("rollback")
    told.wait("#timeline", rf"remembered {marked}\s+forgotten")


def test_a_full_memory_is_said_and_answers_go_on(screen: Screen, story: Path, tmp_path: Path) -> None:
    screen.wait("#head", "ready", START_S)
    screen.click("#settings button")
    screen.write("memory-mib", "0.5")
    play(screen, copied(story, tmp_path / "brim.mp4"), "fastest")
    screen.wait("#memory", "The memory is full")
    screen.wait("#timeline", "dropped: no room left")
    screen.ask("What was first?")
    until(lambda: cards(screen), PATIENCE_S)
    screen.keep("web_full")
    assert "memory unchanged" in cards(screen)[0]


def test_the_browser_s_camera_is_a_camera(screen: Screen) -> None:
    screen.wait("#head", "ready", START_S)
    screen.click('#source button[role="tab"]:nth-child(2)')
    screen.click('#webcam [title="grant webcam access"] button')
    screen.click("#webcam button.capture-button:not([disabled])")
    screen.wait("#figures", r"encoded\s+[\d.]+ fps\s+[1-9]\d* frames")
    screen.wait("#timeline", "remembered [1-9]")
    until(lambda: screen.width_of("#picture img[data-live='live/webcam']"), PATIENCE_S)
    screen.click("#webcam button.capture-button")


def test_mistakes_are_said_where_they_happen(told: Screen) -> None:
    told.press("ask")
    told.wait("#ask-note", "Write a question first")
    told.ask("Which?", "circle")
    told.wait("#ask-note", "One answer is no choice")
    told.write("mark-name", "two words")
    told.press("mark")
    told.wait("#mark-note", "letters, digits")


def test_the_page_is_no_wider_than_its_window(told: Screen) -> None:
    for width, theme, name in (
        *((1280, "light", ""), (1280, "dark", "web_dark")),
        *((390, "light", "web_phone"), (390, "dark", "web_phone_dark")),
    ):
        told.resize(width)
        told.dress(theme)
        assert told.driver.execute_script("return document.documentElement.scrollWidth") == width
        if name:
            told.keep(name)
    told.resize(1280)
    told.dress("light")


def test_the_page_goes_on_when_the_node_was_killed(told: Screen) -> None:
    pid = int(told.wait("#banner", r"process (\d+)")[1])
    os.kill(pid, signal.SIGKILL)
    told.wait("#banner", "has been silent for")
    told.wait("#head", "gone")
    told.ask("Are you there?")
    told.wait("#ask-note", "The node is not there")
    told.keep("web_gone")
    told.wait("#banner", "The node was restarted at", START_S)
    told.wait("#head", "ready")
    told.wait("#timeline", "remembered 0")
    told.press("start")
    told.wait("#timeline", "remembered [1-9]")


def test_nothing_is_asked_of_the_network(screen: Screen) -> None:
    messages = [json.loads(entry["message"])["message"] for entry in screen.log("performance")]
    asked = [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]
    assert asked
    assert [url for url in asked if not url.startswith((screen.address, "data:", "blob:"))] == []


def test_the_page_s_process_has_no_torch(served: Served, screen: Screen) -> None:
    assert "libtorch" not in Path(f"/proc/{served.pid}/maps").read_text()


def test_it_ends_when_asked_and_takes_its_node_along(served: Served, screen: Screen) -> None:
    pid = int(screen.wait("#banner", r"process (\d+)")[1])
    assert served.end() == 0
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
