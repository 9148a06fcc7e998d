"""The page in a real Chromium: what it does, and that it says and asks nothing."""

from __future__ import annotations

import json

import pytest

from tests.report.documents import plan_page, planned
from tests.report.painters.test_html import ALL, EVIL, evil_plan, page_of
from tests.support.browser import ADD_A_SCRIPT, Browser
from tests.support.waiting import until
from turbofit.report.stored_documents import StoredPlan
from turbofit.report.views.figures import shell_words


def shown(browser: Browser, script: str) -> None:
    """Wait until a script returns true."""
    until(lambda: browser.run(script), script)


@pytest.mark.parametrize("kind", ALL)
def test_it_opens_in_silence_and_nothing_is_cut_on_a_phone(browser: Browser, kind: str) -> None:
    looks = ((False, 800), (True, 360))
    for dark, width in looks if kind == "fits" else looks[1:]:
        browser.open(page_of(kind), dark=dark, width=width)
        assert scrolls(browser) <= width
        assert browser.said() == []
        (own, *others) = browser.asked()
        assert own.startswith("file://")
        assert [url for url in others if url != "data:,"] == []
    assert browser.one("h1").text.startswith(planned_name(kind))
    cut = browser.run(
        "return Array.from(document.querySelectorAll('.scroll, .legend'))"
        ".filter((one) => one.scrollWidth > one.clientWidth + 1 && one.clientWidth)"
        ".filter((one) => !one.querySelector('table'))"
        ".map((one) => one.outerHTML.slice(0, 200))"
    )
    assert cut == []


def planned_name(kind: str) -> str:
    return planned({"run": "mixed cards", "pretend run": "fits"}.get(kind, kind)).model.name


def scrolls(browser: Browser) -> int:
    """How wide the page is."""
    return int(browser.run("return document.documentElement.scrollWidth"))


def test_a_command_is_copied_as_it_is(browser: Browser) -> None:
    browser.open(page_of("fits"))
    button = browser.one(".copy")
    assert button.accessible_name == "Copy the command"
    button.click()
    shown(browser, "return document.getElementById('status').textContent.startsWith('Copied')")
    copied = browser.copied()
    serve = planned("fits").serve
    assert serve is not None
    assert copied == shell_words(serve.argv)
    assert browser.said() == []


def test_what_others_wrote_does_nothing(browser: Browser) -> None:
    browser.open(plan_page(StoredPlan(evil_plan(), None, EVIL)))
    # It is loaded, images too; what they would set off comes before a task that begins now.
    browser.driver.execute_async_script("setTimeout(arguments[0])")
    assert browser.driver.title != "hit"
    assert browser.all("img") == []
    data = browser.run("return document.getElementById('turbofit-json').textContent")
    assert json.loads(data)["verdict"] == EVIL
    assert browser.said() == []
    # Were something to get in all the same, it would not run.
    browser.run(ADD_A_SCRIPT)
    assert browser.driver.title != "hit"
    assert any("Content Security Policy" in text for text in browser.said())
