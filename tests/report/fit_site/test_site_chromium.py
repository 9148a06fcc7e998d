"""The site's tables, and the site in a real Chromium, as a file: they are what `plan` says."""

from __future__ import annotations

import json
import random
import shlex
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from tests.support.browser import Browser
from tests.support.waiting import until
from tests.sweep import part
from turbofit.cli.main import main
from turbofit.core.plan import Plan
from turbofit.core.units import GIB, format_bytes, order, three_digits
from turbofit.report.fit_site.choices import (
    SiteChoice,
    SiteChoices,
    SiteRequest,
    choices_of,
    points,
)
from turbofit.report.fit_site.site import SiteTable, answer_of, write_site

pytestmark = pytest.mark.slow

#: A model with tiles and one with patches; a card that is too small and one that is not.
REQUEST = SiteRequest.of(
    models=("internvl3-8b", "qwen2.5-vl-7b-awq"),
    cards=("rtx3060", "rtx4090"),
    counts=(1, 2),
    used=(2 * GIB,),
    images=((4, (1280, 720)),),
    contexts=(8192,),
)


UNSURE = ("order", "unknown")


class Chosen(NamedTuple):
    """What the controls of one side show."""

    model: str
    card: str
    count: int
    used: SiteChoice
    images: SiteChoice
    context: SiteChoice
    requests: SiteChoice

    def keys(self) -> dict[str, str]:
        """The entry of each control."""
        return {
            "model": self.model, "card": self.card, "count": str(self.count),
            "used": self.used.key, "images": self.images.key, "context": self.context.key,
            "requests": self.requests.key,
        }  # fmt: skip

    def fragment(self) -> str:
        """The link that chooses it."""
        return "#" + "&".join(f"{name}={key}" for name, key in self.keys().items()) + "&lang=en"

    def command(self) -> list[str]:
        """The words of the command line behind `turbofit`."""
        words = f"{self.images.words} {self.context.words} {self.requests.words}".split()
        return ["plan", self.model, "--on", f"{self.count}x{self.card}{self.used.words}", *words]

    def place(self, choices: SiteChoices) -> int:
        """Where a table has its answer."""
        place = choices.counts.index(self.count)
        for every, one in (
            (choices.used, self.used), (choices.images, self.images),
            (choices.contexts, self.context), (choices.concurrencies, self.requests),
        ):  # fmt: skip
            place = place * len(every) + every.index(one)
        return place


def drawn(choices: SiteChoices, number: int) -> Iterator[Chosen]:
    """So many choices, the same ones in every run; fewer are the first of more."""
    chance = random.Random(7)
    for _ in range(number):
        yield Chosen(
            chance.choice(choices.models).name,
            chance.choice(choices.cards).name,
            chance.choice(choices.counts),
            chance.choice(choices.used),
            chance.choice(choices.images),
            chance.choice(choices.contexts),
            chance.choice(choices.concurrencies),
        )


def planned(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What `turbofit plan … --json` says, once for each."""
    key = tuple(words)
    if key not in _PLANNED:
        main([*words, "--json"])
        _PLANNED[key] = json.loads(capsys.readouterr().out)
    return _PLANNED[key]


_PLANNED: dict[tuple[str, ...], dict[str, Any]] = {}


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site's page, with its tables beside it."""
    folder = tmp_path_factory.mktemp("site")
    write_site(REQUEST, folder, say=str, jobs=1)
    return folder / "index.html"


@pytest.fixture(scope="session")
def choices() -> SiteChoices:
    """What its controls offer."""
    return choices_of(REQUEST, "today")


#: Everything that a side shows, as text.
READ = """
const side = document.querySelectorAll('article')[arguments[0]];
const texts = (query) => Array.from(side.querySelectorAll(query), (one) => one.textContent);
const rows = (query) => Array.from(side.querySelectorAll(query + ' tbody tr'),
  (row) => Array.from(row.cells, (one) => one.textContent));
const tiles = Array.from(side.querySelectorAll('.tiles > div'), (one) => one.children);
return {
  fits: side.dataset.fits, title: texts('h2')[0], sentence: texts('.sentence')[0],
  commands: texts('code'), bar: texts('.words')[0], warnings: texts('ul.notes li'),
  tiles: Object.fromEntries(tiles.map((one) => [one[0].textContent, one[1].textContent])),
  below: Object.fromEntries(tiles.map((one) => [one[0].textContent, one[2].textContent])),
  limits: rows('table.limits'), remedies: rows('table:not(.limits)'),
};
"""
DONE = "return Boolean(document.body.dataset.shown)"


@pytest.fixture(scope="module")
def address(browser: Browser, request: pytest.FixtureRequest) -> str:
    """Of the small site; none is written where there is no browser."""
    assert browser is not None
    return str(request.getfixturevalue("site").as_uri())


def shown(browser: Browser, side: int = 0) -> dict[str, Any]:
    """What one side shows, once it is there."""
    until(lambda: browser.run(DONE), "the answer")
    found: dict[str, Any] = browser.run(READ, side)
    return found


def number(text: str) -> float:
    return float(text.replace(",", ""))


def figure(value: float, surety: dict[str, Any]) -> str:
    """The value to three digits, or the nearest order where no more is sure."""
    return f"about {order(value)}" if surety["word"] in UNSURE else three_digits(value)


def compare(said: dict[str, Any], plan: dict[str, Any]) -> None:
    """What is shown is what the plan says."""
    if "error" in plan:
        assert said["fits"] == "false"
        assert said["tiles"] == {}
        return
    assert said["sentence"] == plan["verdict"]
    assert said["fits"] == str(plan["fits"]).lower()
    assert said["warnings"] == plan["warnings"]
    fullest = min(plan["gpus"], key=lambda gpu: gpu["headroom"])
    need = format_bytes(max(fullest["peak"], fullest["load_peak"]))
    assert f": {need} of {format_bytes(fullest['total'])} in use" in said["bar"]
    if not plan["fits"]:
        assert (said["tiles"], said["limits"]) == ({}, [])
        remedies = [[one["change"], one["effect"]] for one in plan["remedies"][:3]]
        assert said["remedies"] == remedies
        return
    tiles, speed = said["tiles"], plan["throughput"]
    assert number(tiles["KV tokens"]) == plan["kv"]["total_tokens"]
    assert number(tiles["context"]) == plan["settings"]["session_len"]
    assert number(tiles["tokens of the images"]) == plan["limits"]["image_tokens_per_request"]
    first, rate = "seconds to the first token", tiles["requests/s, forecast"]
    assert rate == figure(speed["requests_per_second"], speed["surety"])
    assert tiles[first] == figure(speed["seconds_to_first_token_alone"], speed["first_token_alone"])
    among = figure(speed["seconds_to_first_token"], speed["first_token"])
    assert said["below"][first] == f"forecast, alone; {among} among others"
    assert len(said["limits"]) == len(plan["limit_costs"])
    for cells, cost in zip(said["limits"], plan["limit_costs"], strict=True):
        assert cells[0] == cost["option"]
        assert [number(one) for one in cells[1:4]] == [
            cost["image_tokens"], cost["kv_tokens"], cost["requests_at_once"]
        ]  # fmt: skip
        assert cells[4] == figure(cost["requests_per_second"], speed["surety"])
        assert cells[5] == figure(cost["seconds_to_first_token"], speed["first_token"])


def test_tables_are_what_plan_says(
    site: Path, choices: SiteChoices, capsys: pytest.CaptureFixture[str]
) -> None:
    for chosen in drawn(choices, part(200, 20)):
        script = (site.parent / "data" / chosen.model / f"{chosen.card}.js").read_text()
        document = script.removeprefix("turbofitTable(").removesuffix(");\n")
        table = msgspec.json.decode(document, type=SiteTable)
        assert len(table.order) == len(list(points(choices)))
        plan = planned(chosen.command(), capsys)
        answer = table.answers[table.order[chosen.place(choices)]]
        assert "error" in plan or answer == answer_of(Plan.from_json(json.dumps(plan)))
        assert "error" not in plan or answer.memory is None


def test_choices_are_what_plan_says(
    browser: Browser, address: str, choices: SiteChoices, capsys: pytest.CaptureFixture[str]
) -> None:
    browser.visit(address)
    for place, chosen in enumerate(drawn(choices, part(200, 20))):
        if place % 2:
            browser.visit(address + chosen.fragment())
        else:
            select(browser, chosen)
        command = shlex.join(["turbofit", *chosen.command()])
        until(partial(has_command, browser, command), command)
        compare(shown(browser), planned(shlex.split(command)[1:], capsys))
        assert browser.said() == []


def has_command(browser: Browser, command: str) -> bool:
    """Whether the page shows the answer that this gives."""
    return bool(shown(browser)["commands"][-1:] == [command])


def select(browser: Browser, chosen: Chosen) -> None:
    """Choose by the controls, and tell the page once: a browser ignores very many changes."""
    browser.run(
        "for (const [name, key] of Object.entries(arguments[0]))"
        " document.getElementById(name).value = key;"
        "document.getElementById('model').dispatchEvent(new Event('change', {bubbles: true}))",
        chosen.keys(),
    )


def test_a_link_restores_the_choice(browser: Browser, address: str) -> None:
    link = (
        "#model=internvl3-8b&card=rtx4090&count=2&used=2GiB&images=1&context=8192&beside=rtx3060"
        "&besideCount=2&lang=zh"
    )
    browser.visit(address + link)
    first, second = shown(browser, 0), shown(browser, 1)
    assert first["title"] == "2 × NVIDIA GeForce RTX 4090"
    assert second["title"] == "2 × NVIDIA GeForce RTX 3060"
    assert first["commands"] == [
        "turbofit serve internvl3-8b --images 1 --context 8192 --max-dynamic-patch 12",
        "turbofit plan internvl3-8b --on 2xrtx4090:used=2GiB --context 8192",
    ]
    assert browser.run("return document.documentElement.lang") == "zh-CN"
    assert browser.run("return window.location.hash") == link
    browser.one("#copy-link").click()
    until(lambda: browser.one("#status").text, "the link is copied")
    copied = browser.copied()
    assert copied == address + link
    browser.visit(copied)
    assert shown(browser, 1) == second


def test_a_link_to_what_is_not_there_says_so(browser: Browser, address: str) -> None:
    browser.visit(f"{address}#model=internvl9&card=rtx4090&count=2&lang=en")
    assert shown(browser)["title"] == "2 × NVIDIA GeForce RTX 4090"
    said = browser.one("#status").text
    assert said == "The link names model=internvl9, which this page does not have."


def test_a_table_that_is_missing(
    browser: Browser, address: str, site: Path, choices: SiteChoices, tmp_path: Path
) -> None:
    (tmp_path / "index.html").write_bytes(
        site.read_bytes()
    )  # the page without its folder of tables
    browser.visit(f"{(tmp_path / 'index.html').as_uri()}#lang=en")
    until(lambda: browser.run(DONE), "the answer")
    table = f"{choices.models[0].name}/{choices.cards[0].name}"
    assert f"The table {table} is missing" in browser.one("article").text


@pytest.mark.parametrize(
    ("width", "language"),
    [
        (360, "zh"),
        (1100, "en"),
        pytest.param(360, "en", marks=pytest.mark.exhaustive),
        pytest.param(1100, "zh", marks=pytest.mark.exhaustive),
    ],
)
def test_nothing_is_cut(browser: Browser, address: str, language: str, width: int) -> None:
    for dark, choice in (
        (False, "model=internvl3-8b&card=rtx3060"),
        (True, "model=qwen2.5-vl-7b-awq&card=rtx4090&beside=rtx3060"),
    ):
        browser.visit(f"{address}#{choice}&lang={language}", dark=dark, width=width)
        shown(browser)
        assert browser.run("return document.documentElement.scrollWidth") <= width
        cut = browser.run(
            "return Array.from(document.querySelectorAll('.scroll, h2, .tiles *, .legend'))"
            ".filter((one) => one.scrollWidth > one.clientWidth + 1 && one.clientWidth)"
            ".map((one) => one.outerHTML.slice(0, 90))"
        )
        assert cut == []
        assert browser.said() == []
        assert {url.split(":")[0] for url in browser.asked()} <= {"file", "data"}


def test_the_languages_and_the_themes(browser: Browser, address: str) -> None:
    browser.visit(f"{address}#lang=en", dark=True)
    shown(browser)
    ground = "return getComputedStyle(document.body).backgroundColor"
    dark = browser.run(ground)
    browser.one("#theme").click()
    assert browser.run(ground) == "rgb(255, 255, 255)" != dark
    browser.one("#language").click()
    shown(browser)
    assert browser.one("h1").text == "显存够不够?"
    assert browser.one("#theme").text == "主题:浅色"
    assert browser.run("return document.title") == "显存够不够? - turbofit"
    browser.one("#language").click()
    assert browser.one("h1").text == "Will it fit?"


def test_the_keyboard_alone_does_it(browser: Browser, address: str) -> None:
    from selenium.webdriver import ActionChains

    browser.visit(f"{address}#lang=en")
    before = shown(browser)
    seen: list[str] = []
    while "model" not in seen:
        ActionChains(browser.driver).send_keys("\ue004").perform()  # tab
        seen.append(browser.run("return document.activeElement.id"))
        assert len(seen) < 9
    ActionChains(browser.driver).send_keys("q").perform()  # Qwen
    until(lambda: browser.run("return document.getElementById('model').value") != "", "a model")
    until(lambda: shown(browser)["commands"] != before["commands"], "another answer")
    assert "qwen2.5-vl-7b-awq" in shown(browser)["commands"][0]
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    for _ in range(30):
        ActionChains(browser.driver).send_keys("\ue004").perform()
        name = browser.run("return document.activeElement.className || document.activeElement.id")
        if browser.run("return document.activeElement === document.body"):
            break
        assert browser.run(outline) != "none", name
        seen.append(name)
    assert {"card", "used", "beside", "copy-link", "copy"} <= set(seen)


def test_everything_has_a_name(browser: Browser, address: str) -> None:
    browser.visit(f"{address}#card=rtx4090&lang=en")
    shown(browser)
    for one in browser.all("button, select, summary, [role='img'], [role='group']"):
        if one.is_displayed():
            assert one.accessible_name, one.get_attribute("outerHTML")[:80]


def test_it_opens_with_a_usual_image_and_says_of_what_its_figures_are(
    browser: Browser, address: str
) -> None:
    browser.visit(f"{address}#card=rtx4090&lang=en")
    assert "--image-size 1280x720" in shown(browser)["commands"][-1]
    assert "Usual figures: images a request, 4 of 1280 × 720 pixels." in browser.one("article").text
    browser.visit(f"{address}#card=rtx4090&images=1&lang=en")
    assert "--image-size" not in shown(browser)["commands"][-1]
    assert "Worst figures: images a request, 1 of the worst size." in browser.one("article").text


def test_a_list_with_one_entry_is_no_menu(browser: Browser, address: str) -> None:
    browser.visit(f"{address}#card=rtx4090&lang=en")
    shown(browser)
    seen = {one.get_attribute("id") for one in browser.all("select") if one.is_displayed()}
    assert "requests" not in seen  # this site has one choice of it
    assert {"model", "card", "images", "context"} <= seen
