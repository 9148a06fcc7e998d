"""The page of a server in a real Chromium: pictures go, answers stream, and nothing is HTML."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.support.browser import ADD_A_SCRIPT, Browser
from tests.support.gateway import (
    DONE,
    TILES,
    Answer,
    Recorder,
    data_url,
    gateway,
    picture,
    plan_for,
    stream,
)
from tests.support.waiting import until
from turbofit.gateway.http.about import memory_bars
from turbofit.gateway.http.app import Gateway
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
    until(lambda: browser.all("#pictures img"), "the picture of the file, which is the first one")
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
    page = served(lambda *_: stream(event("yes"), DONE), api_key=("k",), names={"secret": "m"})
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
    page.sees("GPU 0: 8.0 GiB in use now")
    words = browser.one("#watch").text
    assert words.count("24.0 GiB") == 2, words  # once for each group of GPUs
    assert words.count("21.6 GiB") == 2, words
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


#: What a phone shows, a wider window shows, too.
SCREENS = [pytest.param(1280, 900, marks=pytest.mark.exhaustive), (390, 844)]
WHERE = (
    "const r = arguments[0].getBoundingClientRect(); return arguments[0].contains("
    "document.elementFromPoint(r.left + r.width / 2, r.top + r.height / 2))"
)


def refused(message: str) -> Any:
    """The engine's answer to what it refuses."""
    body = json.dumps({"error": {"message": message, "type": "x", "code": 400}}).encode()
    return Answer(body, status=400)


@pytest.mark.parametrize(("width", "height"), SCREENS)
def test_an_error_stands_where_one_looks_and_the_message_comes_back(
    served: Callable[..., Page], browser: Browser, width: int, height: int
) -> None:
    answers = [stream(event("line\n\n" * 60), DONE), refused("not this one")]
    page = served(lambda *_: answers.pop(0), plan_for(TILES, limit=1, images=9))
    page.show(width=width, height=height)
    page.write("Hello" + ENTER)
    page.sees("tokens")
    browser.run("pictures = Array(9).fill(arguments[0]); showPictures()", data_url(picture(9, 9)))
    page.write("Again" + ENTER)
    until(lambda: browser.run("return at('text').value") == "Again", "the error")
    assert browser.run(WHERE, browser.one("#log [role='alert']"))
    assert browser.one("#log [role='alert']").text == "not this one"
    assert browser.run("return messages.length") == 2
    # Its pictures are back, and go at one click.
    assert len(browser.all("#pictures img")) == 9
    browser.one("#away").click()
    assert browser.all("#pictures img") == []
    assert browser.run("return at('text').value") == "Again"


def test_a_conversation_that_outgrew_the_context_loses_its_older_half_once(
    served: Callable[..., Page], browser: Browser
) -> None:
    """Until the cut and after it, each turn begins with all of the turn before, which a cache hits.

    The picture of the first turn goes along with each turn, too.
    """
    answers = [stream(event(f"{number}."), DONE) for number in range(5)]
    answers.insert(3, refused("the context has 64 tokens"))
    page = served(lambda *_: answers.pop(0), plan_for(TILES, limit=1, images=3))
    page.show()
    browser.run("pictures = [arguments[0]]; showPictures()", data_url(picture(9, 9)))
    for number in range(5):
        page.write(f"Question {number}" + ENTER)
        page.sees(f"{number}.")
        page.ended()
    page.sees("4 older messages left out: the context is full.")
    sent = [body["messages"] for body in page.recorder.bodies]
    assert [len(messages) for messages in sent] == [1, 3, 5, 7, 3, 5]
    for before, after in pairwise([sent[0], sent[1], sent[2], sent[3]]):
        assert after[: len(before)] == before
    assert sent[3][0]["content"][0]["type"] == "image_url"
    assert sent[4] == sent[3][4:]
    assert sent[5][:3] == sent[4]
    assert browser.run("return messages.length") == 6


@pytest.mark.parametrize(("width", "height"), SCREENS)
def test_the_limit_of_pictures_is_said_before_they_are_sent(
    served: Callable[..., Page], browser: Browser, width: int, height: int
) -> None:
    page = served(lambda *_: stream(event("seen"), DONE), plan_for(TILES, limit=1, images=2))
    page.show(width=width, height=height)
    most = browser.run("return model().images")
    page.sees(f"a message takes {most} pictures at most")
    add = "pictures = Array(arguments[1]).fill(arguments[0]); showPictures()"
    browser.run(add, data_url(picture(9, 9)), most + 2)
    assert browser.one("#room").text == f"a message takes {most} pictures at most: remove 2"
    assert browser.run(WHERE, browser.one("#room"))
    page.write("x" + ENTER)
    assert not browser.one("#send").is_enabled()
    for _ in range(2):
        browser.one("#pictures button").click()
    browser.one("#send").click()
    until(lambda: page.recorder.bodies, "a request")
    page.ended()
    # A new chat has none of the old one's.
    browser.run(add, data_url(picture(9, 9)), 1)
    browser.one("#clear").click()
    assert browser.all("#pictures img") == browser.all("#log .turn") == []
    # A new chat takes the text of a refused message with it, and what is no picture is marked.
    page.write("again")
    browser.one("#clear").click()
    assert browser.run("return at('text').value") == ""
    browser.run("pictures = ['data:image/png;base64,QQ==']; showPictures()")
    until(lambda: browser.run("return document.querySelectorAll('.unread').length") == 1, "a mark")


def test_on_a_phone_the_chat_has_most_of_the_window(
    served: Callable[..., Page], browser: Browser
) -> None:
    """The GPUs fold into one line, which says how full the fullest is."""
    page = served(lambda *_: stream(event("seen"), DONE), plan_for(TILES, images=2), pretend=True)
    driver = page.address.call(lambda app: app.config.memory[0].pieces[0].bytes)
    page.address.call(lambda app: setattr(app, "in_use", lambda: {0: (8 << 30) - driver, 1: 1}))
    page.show(width=390, height=844)
    page.sees("0 running · 0 waiting · GPU 0: 8.0 of 24.0 GiB")
    assert not browser.one("#memory").is_displayed()
    assert browser.run("return at('log').clientHeight") > 844 / 2
    assert browser.run("return document.documentElement.scrollWidth") <= 390
    browser.one("#cards summary").click()
    page.sees("GPU 1: ")
    assert browser.run("return at('log').clientHeight") > 100


def test_the_longest_answer_is_a_field_and_pretend_gpus_have_no_speed(
    served: Callable[..., Page], browser: Browser
) -> None:
    held = asyncio.Event()
    held.set()
    page = served(lambda *_: stream(event("a"), held, event("b"), USAGE, DONE), pretend=True)
    page.show()
    browser.one("#composer summary").click()
    browser.one("#most").send_keys("40")
    page.write("x" + ENTER)
    page.sees("7 tokens")
    page.ended()
    assert page.recorder.bodies[0]["max_tokens"] == 40
    assert "tokens/s" not in browser.one("body").text


def test_a_lost_server_is_said_with_what_to_do(
    served: Callable[..., Page], browser: Browser
) -> None:
    page = served()
    page.show()
    page.address.stop(drain=False)
    page.write("y" + ENTER)
    until(lambda: browser.all("#log [role='alert']"), "the error")
    page.ended()
    last = browser.all("#log [role='alert']")[-1].text
    assert last.startswith("The server does not answer. See on its machine whether it runs")
    assert "Failed to fetch" not in browser.one("body").text
    assert browser.run("return at('text').value") == "y"
    within = browser.run("return advice(new TypeError('network error'), 'begun')")
    assert within.startswith("The connection ended within the answer. See on its machine")
