"""The page in a real Chromium: what it does, and that it says and asks nothing."""

from __future__ import annotations

import base64
import json

import pytest

from tests.report.documents import plan_page, planned
from tests.report.page.test_html import ALL, EVIL, evil_plan, page_of
from tests.support.browser import ADD_A_SCRIPT, Browser
from tests.support.waiting import until
from turbofit.core.plan import Plan
from turbofit.core.units import mib
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
    browser.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    cut = browser.run(
        "return Array.from(document.querySelectorAll('.scroll, .legend, .ticks'))"
        ".filter((one) => one.scrollWidth > one.clientWidth + 1 && one.clientWidth)"
        ".filter((one) => !one.querySelector('table'))"
        ".map((one) => one.outerHTML.slice(0, 200))"
    )
    assert cut == []


def planned_name(kind: str) -> str:
    names = {"run": "mixed cards", "pretend run": "fits"}
    return planned(names.get(kind, kind)).model.name


def scrolls(browser: Browser) -> int:
    """How wide the page is."""
    return int(browser.run("return document.documentElement.scrollWidth"))


def test_arrow_keys_go_through_a_bar(browser: Browser) -> None:
    browser.open(page_of("fits"))
    bar, readout = browser.one(".bar"), browser.one(".readout")
    idle = readout.text
    browser.run("arguments[0].focus()", bar)
    bar.send_keys("\ue014")  # right
    assert readout.text.startswith("GPU 0: driver: 450.0 MiB, 1.8 % of the card")
    bar.send_keys("\ue014")
    assert "cuda_context" in readout.text
    assert len(browser.all(".on")) == 1
    bar.send_keys("\ue010")  # end
    assert "margin" in readout.text
    bar.send_keys("\ue012")  # left
    assert "free: " in readout.text
    bar.send_keys("\ue00c")  # escape
    assert readout.text == idle
    assert browser.all(".on") == []
    second = browser.all(".gpuset")[1]
    bars = second.find_elements("css selector", ".bar")
    browser.run("arguments[0].focus()", bars[2])
    bars[2].send_keys("\ue011")  # home; what it is was told by the first of its set
    assert second.find_element("css selector", ".readout").text.startswith("GPU 3: driver")


def test_the_pointer_does_the_same(browser: Browser) -> None:
    from selenium.webdriver import ActionChains

    browser.open(page_of("fits"))
    ActionChains(browser.driver).move_to_element(browser.one(".k-cache i")).perform()
    cache = next(term for term in planned("fits").gpus[0].ledger if term.term == "kv_cache")
    assert f"kv_cache (KV cache): {mib(cache.bytes)} MiB" in browser.one(".readout").text


def test_candidates_sort_by_number_and_back(browser: Browser) -> None:
    browser.open(page_of("mixed cards"))
    heads = browser.all("table.sortable th")
    until(lambda: any(head.text for head in heads), "the table is drawn")
    column = next(i for i, head in enumerate(heads) if head.text == "KV tokens")
    button = heads[column].find_element("css selector", "button")

    def shown() -> list[str]:
        rows = "document.querySelectorAll('table.sortable tbody tr')"
        script = (
            f"return Array.from({rows}, (row) => row.querySelectorAll('td')[{column}].innerText)"
        )
        return list(browser.run(script))

    before = shown()
    button.click()
    up = [int(text.replace(",", "")) for text in shown() if text != "-"]
    assert up == sorted(up)
    assert heads[column].get_attribute("aria-sort") == "ascending"
    button.send_keys("\ue007")  # enter: by keyboard too
    down = [int(text.replace(",", "")) for text in shown() if text != "-"]
    assert down == up[::-1]
    assert heads[column].get_attribute("aria-sort") == "descending"
    assert sorted(shown()) == sorted(before)
    assert browser.one("#status").text == "Sorted by KV tokens, down."


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


def test_the_json_is_copied_and_saved(browser: Browser) -> None:
    browser.open(page_of("served"))
    browser.one("#copy-json").click()
    shown(browser, "return document.getElementById('status').textContent.startsWith('Copied')")
    copied = browser.copied()
    assert Plan.from_json(copied) == planned("served")
    browser.one("#save-json").click()
    assert browser.one("#status").text == "Saved as turbofit.json."
    assert browser.said() == []


def test_themes(browser: Browser) -> None:
    ground = "return getComputedStyle(document.body).backgroundColor"
    browser.open(page_of("fits"), dark=True)
    dark = browser.run(ground)
    theme = browser.one("#theme")
    theme.click()
    assert theme.text == "Theme: light"
    light = browser.run(ground)
    assert light == "rgb(255, 255, 255)" != dark
    theme.click()
    assert browser.run(ground) == dark
    theme.click()
    assert theme.text == "Theme: system"
    browser.media(dark=False)
    assert browser.run(ground) == light


def test_tab_reaches_everything_in_order_and_shows_where(browser: Browser) -> None:
    from selenium.webdriver import ActionChains

    browser.open(page_of("served"))
    seen = []
    for _ in range(90):
        ActionChains(browser.driver).send_keys("\ue004").perform()
        name, outline = browser.run(
            "const e = document.activeElement;"
            "return [e.id || e.className || e.tagName, getComputedStyle(e).outlineStyle]"
        )
        if name == "BODY" or (seen and name == seen[0]):
            break
        assert outline != "none", name
        seen.append(name)
    assert seen[:5] == ["theme", "print", "PRE", "copy", "A"]
    assert {"SUMMARY", "bar", "copy", "copy-json", "save-json"} <= set(seen)


def test_paper(browser: Browser) -> None:
    browser.open(page_of("served"), dark=True)
    browser.run("window.dispatchEvent(new Event('beforeprint'))")
    assert browser.run("return document.querySelectorAll('details:not([open])').length") == 0
    browser.media(dark=True, paper=True)
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == (
        "rgb(255, 255, 255)"
    )
    hidden = "return getComputedStyle(document.querySelector(arguments[0])).display"
    assert browser.run(hidden, ".copy") == "none"
    browser.run("window.dispatchEvent(new Event('afterprint'))")
    assert browser.run("return document.querySelectorAll('details[open]').length") == 0
    printed = base64.b64decode(browser.driver.print_page())
    assert printed.startswith(b"%PDF")
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


def test_without_its_script_all_is_there_but_the_buttons(browser: Browser) -> None:
    browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.open(page_of("served"))
        shown = [button.text for button in browser.all("button") if button.is_displayed()]
        heads = [head.text for head in browser.all("table.sortable th")]
        assert shown == heads
        assert browser.one(".legend b").text == "450 MiB"
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_everything_that_takes_the_focus_has_a_name(browser: Browser) -> None:
    browser.open(page_of("mixed cards"))
    for one in browser.all("button, summary, a, [tabindex='0']"):
        if one.is_displayed() and one.tag_name != "pre":
            assert one.accessible_name, one.get_attribute("outerHTML")[:80]
