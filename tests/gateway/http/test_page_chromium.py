"""The page of a server in a real Chromium: pictures go, answers stream, and nothing is HTML."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.browser import ADD_A_SCRIPT, Browser
from tests.support.gateway import (
    DONE,
    TILES,
    Recorder,
    data_url,
    gateway,
    picture,
    plan_for,
    stream,
)
from tests.support.waiting import until
from turbofit.gateway.http.app import Gateway
from turbofit.gateway.http.routes import memory_bars
from turbofit.gateway.server import GatewayThread

pytestmark = pytest.mark.slow

HOSTILE = "<img src=x onerror=\"document.title='hit'\"><script>document.title='hit'</script>"
ENTER, ESCAPE = "\ue007", "\ue00c"


def event(text: str) -> bytes:
    """One event of a stream that says this."""
    return b"data: " + json.dumps({"choices": [{"delta": {"content": text}}]}).encode() + b"\n\n"


USAGE = b'data: {"choices":[],"usage":{"completion_tokens":7}}\n\n'


class Page:
    """A server with its page open, in front of an upstream that waits for ``go`` in its answer."""

    def __init__(
        self, browser: Browser, address: GatewayThread[Gateway], recorder: Recorder
    ) -> None:
        self.browser, self.address, self.recorder = browser, address, recorder

    def show(self, path: str = "/", **look: Any) -> None:
        self.browser.visit(self.address.url + path, **look)
        until(lambda: self.browser.run("return about !== null || !at('unlock').hidden"), "the page")

    def write(self, text: str) -> None:
        self.browser.one("#text").send_keys(text)

    def sees(self, words: str) -> None:
        """Wait until the page shows these words."""
        until(lambda: words in self.browser.run("return document.body.innerText"), words)

    def go(self, held: asyncio.Event) -> None:
        """Let an answer go on."""
        self.address.call(lambda _: held.set())

    def ended(self) -> None:
        until(lambda: self.browser.run("return running === null"), "the answer's end")


@pytest.fixture
def served(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Starts servers; each ends with the test."""
    opened = []

    def start(answer: Callable[..., Any] | None = None, plan: Any = None, **config: Any) -> Page:
        plan = plan or plan_for()
        config = {"names": {"m": "m"}, "port": 0, "memory": memory_bars(plan), **config}
        app, recorder = gateway(plan, recorder=Recorder(answer), **config)
        address = GatewayThread(app)
        address.start()
        opened.append(address)
        return Page(browser, address, recorder)

    yield start
    browser.driver.get("about:blank")  # its requests end before their server
    for address in opened:
        address.stop(drain=False)


PASTE = """
const bytes = Uint8Array.from(atob(arguments[0].split(',')[1]), (c) => c.charCodeAt(0));
const data = new DataTransfer();
data.items.add(new File([bytes], 'a.png', { type: 'image/png' }));
const target = document.getElementById('text');
target.dispatchEvent(arguments[1] === 'paste'
  ? new ClipboardEvent('paste', { clipboardData: data, bubbles: true })
  : new DragEvent('drop', { dataTransfer: data, bubbles: true }));
"""


def test_a_picture_goes_and_an_answer_streams(
    served: Callable[..., Page], browser: Browser, tmp_path: Path
) -> None:
    held = asyncio.Event()
    page = served(
        lambda *_: stream(event("It is "), held, event("a square."), USAGE, DONE),
        plan_for(TILES, limit=1, images=3),
    )
    page.show()
    (tmp_path / "a.png").write_bytes(picture(448, 896))
    browser.one("#file").send_keys(str(tmp_path / "a.png"))
    for way in ("paste", "drop"):
        browser.run(PASTE, data_url(picture(64, 64)), way)
    until(lambda: len(browser.all("#pictures img")) == 3, "three pictures")
    browser.all("#pictures button")[1].click()
    page.write("What is it?" + ENTER)
    page.sees("It is")
    assert "a square" not in browser.one("#log").text
    assert browser.one("#stop").is_displayed()
    page.go(held)
    page.ended()
    page.sees("It is a square.")
    page.sees("7 tokens")
    page.sees("The server held this request to its plan: tiles of an image from 12 to 1.")
    (body,) = page.recorder.bodies
    first, second, text = body["messages"][0]["content"]
    assert first["image_url"]["url"].startswith("data:image/png;base64,")
    assert second["type"] == "image_url"
    assert text == {"type": "text", "text": "What is it?"}
    # What was said goes along.
    page.write("And now?" + ENTER)
    until(lambda: len(page.recorder.bodies) == 2, "a second request")
    page.ended()
    roles = [message["role"] for message in page.recorder.bodies[1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert browser.said() == []
    assert all(url.startswith((page.address.url, "data:")) for url in browser.asked())


def test_what_a_model_or_a_name_says_stays_text(
    served: Callable[..., Page], browser: Browser
) -> None:
    page = served(lambda *_: stream(event(HOSTILE), DONE), names={HOSTILE: "m"})
    page.show()
    assert browser.one("#model").text == HOSTILE
    page.write("x" + ENTER)
    until(lambda: page.recorder.bodies, "a request")
    page.ended()
    assert browser.one("#log .turn:last-child .text").text == HOSTILE
    assert browser.all("#log img") == []
    browser.one("#tab-limits").click()
    assert HOSTILE.replace('"', '\\"') in browser.one("#limits").text
    assert browser.all("main img") == []
    assert browser.driver.title == f"{HOSTILE} - turbofit"
    assert browser.said() == []
    # Were something to get in all the same, it would not run.
    browser.run(ADD_A_SCRIPT)
    assert browser.driver.title != "hit"
    assert any("Content Security Policy" in text for text in browser.said())


def test_a_key_is_asked_for_and_kept_in_the_page_alone(
    served: Callable[..., Page], browser: Browser
) -> None:
    page = served(lambda *_: stream(event("yes"), DONE), api_keys=("k",), names={"secret": "m"})
    page.show()
    assert "secret" not in browser.driver.page_source
    assert not browser.one("#chat").is_displayed()
    browser.one("#key").send_keys("wrong" + ENTER)
    page.sees("The server does not take this key.")
    browser.one("#key").send_keys("k" + ENTER)
    until(lambda: browser.one("#chat").is_displayed(), "the chat")
    page.write("x" + ENTER)
    page.sees("yes")
    kept = (
        "return [localStorage.length, Object.keys(sessionStorage), document.cookie, location.href]"
    )
    assert browser.run(kept) == [0, ["messages"], "", page.address.url + "/"]
    assert "k" not in browser.one("#key").get_attribute("value")
    browser.one("#tab-limits").click()
    assert "$API_KEY" in browser.one("#limits").text
    page.show()
    assert browser.one("#unlock").is_displayed()


def test_the_keyboard_alone_asks_stops_and_changes_tabs(
    served: Callable[..., Page], browser: Browser
) -> None:
    from selenium.webdriver import ActionChains

    held = asyncio.Event()
    page = served(lambda *_: stream(event("begun"), held, DONE), names={"a": "a", "b": "b"})
    page.show()
    press = lambda keys: ActionChains(browser.driver).send_keys(keys).perform()  # noqa: E731
    press("Hello" + ENTER)  # the text has the focus
    page.sees("begun")
    press(ESCAPE)
    page.sees("Stopped.")
    until(lambda: page.recorder.answers[-1].closed, "the engine stops")
    page.ended()
    browser.run("at('model').focus()")
    press("b")
    assert browser.run("return model().name") == "b"
    browser.run("at('tab-limits').focus()")
    press(ENTER)
    assert browser.one("#limits").is_displayed()
    page.go(held)
    page.show("/docs")
    assert "/metrics" in browser.one("#routes").text


def test_the_server_now_stands_beside_the_chat(
    served: Callable[..., Page], browser: Browser
) -> None:
    """What `/health` and `/metrics` say is asked again and again."""
    page = served()
    driver = page.address.call(lambda app: app.config.memory[0].pieces[0].bytes)
    page.show()
    page.sees("0 running · 0 waiting")
    page.recorder.pages = 'lmdeploy:num_requests_waiting{model_name="a }b"} 2.0\n'
    page.address.call(lambda app: setattr(app, "in_use", lambda: {0: (8 << 30) - driver, 9: 1}))
    page.sees("GPU 0: 8.0 GiB in use; 21.6 GiB at most by the plan, 256 MiB margin, of 24.0 GiB")
    page.sees("2 waiting")
    assert browser.run("return at('used-0').style.width + at('used-1').style.width")[:4] == "33.3"
    page.address.stop(drain=False)
    page.sees("The server does not answer.")


def test_pictures_go_as_far_as_the_server_takes_them_and_a_reload_keeps_the_chat(
    served: Callable[..., Page], browser: Browser
) -> None:
    page = served(lambda *_: stream(event("seen"), DONE), plan_for(TILES, limit=2, images=1))
    page.show()
    most = browser.run("return model().images")
    for number in range(most + 1):
        browser.run(PASTE, data_url(picture(8, 8 + number)), "paste")
        until(lambda: browser.all("#pictures img"), "a picture")
        page.write("What is it?" + ENTER)
        until(lambda count=number + 1: len(page.recorder.bodies) == count, "a request")
        page.ended()
    page.sees(f"1 earlier picture left out: a request may have {most} images.")
    sent = [
        sum(isinstance(message["content"], list) and len(message["content"]) == 2
            for message in body["messages"])
        for body in page.recorder.bodies
    ]  # fmt: skip
    assert sent == [*range(1, most + 1), most]
    page.show()
    assert len(browser.all("#log .mine img")) == most + 1
    assert len(browser.all("#log .turn")) == 2 * (most + 1)
    page.write("And all?" + ENTER)
    until(lambda: len(page.recorder.bodies) == most + 2, "a request")
    page.ended()
    assert len(page.recorder.bodies[-1]["messages"]) == 2 * (most + 1) + 1
    browser.one("#clear").click()
    page.show()
    assert browser.all("#log .turn") == []


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_an_error_stands_where_one_looks_and_the_message_comes_back(
    served: Callable[..., Page], browser: Browser, width: int, height: int
) -> None:
    page = served(lambda *_: stream(event("line\n\n" * 60), DONE))
    page.show(width=width, height=height)
    page.write("Hello" + ENTER)
    page.sees("tokens")
    browser.run("pictures = Array(90).fill(arguments[0]); showPictures()", data_url(picture(9, 9)))
    page.write("Again" + ENTER)
    until(lambda: browser.run("return at('text').value") == "Again", "the error")
    where = (
        "const r = arguments[0].getBoundingClientRect(); return arguments[0].contains("
        "document.elementFromPoint(r.left + r.width / 2, r.top + r.height / 2))"
    )
    assert browser.run(where, browser.one("#log [role='alert']"))
    assert browser.run("return messages.length") == 2
