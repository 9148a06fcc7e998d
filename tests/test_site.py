"""The site of the docs: its navigation has every page, it builds strictly and loads nothing."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from scripts.reference import SCHEMAS, reference_pages
from tests.support.browser import Browser
from tests.support.waiting import until
from turbofit.cli.command_group import COMMANDS, TURBOFIT
from turbofit.cli.usage_errors import options_by_command
from turbofit.planning.request import PlanRequest

ROOT = Path(__file__).parents[1]
#: Pages that are no file of docs: scripts/site_hook.py brings them.
OTHERS = {
    "index.md", "zh/index.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/README.md",
    "RELEASING.md", "SECURITY.md", "CODE_OF_CONDUCT.md",
}  # fmt: skip


class Loader(yaml.SafeLoader):
    """mkdocs.yml names a Python function, which is not called here."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def pages(nav: Any) -> Iterator[str]:
    """The pages of a navigation, in their order."""
    if isinstance(nav, str):
        yield nav
    else:
        for one in nav.values() if isinstance(nav, dict) else nav:
            yield from pages(one)


CONFIG = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)
NAV = list(pages(CONFIG["nav"]))


def titles(nav: Any) -> Iterator[str]:
    """What the menu calls its sections and pages; a page without a title has none."""
    for one in nav if isinstance(nav, list) else []:
        assert isinstance(one, dict), f"{one} has no title in the menu"
        yield from one
        for inside in one.values():
            yield from titles(inside)


def test_a_menu_can_be_read_at_a_glance() -> None:
    found = list(titles(CONFIG["nav"]))
    assert len(found) > 30
    assert [title for title in found if len(title.split()) > 4] == []


def test_the_start_page_has_first_steps_in_the_place_of_the_check() -> None:
    hook = (ROOT / "scripts" / "site_hook.py").read_text(encoding="utf-8")
    named = re.search(r'_CHECKS.*?r"\((.+?)\)', hook, re.DOTALL)
    assert named is not None
    readmes = ("README.md", "README.zh-CN.md")
    for name, begins in zip(readmes, named[1].split("|"), strict=True):
        assert (ROOT / name).read_text(encoding="utf-8").count(begins) == 1


def test_the_navigation_has_every_page_once() -> None:
    docs = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(NAV) == sorted({*docs, *OTHERS, *reference_pages()})
    # Nothing is loaded from a network.
    assert CONFIG["theme"]["font"] is False
    assert "offline" in CONFIG["plugins"]
    assert "iframe-worker" in CONFIG["extra"]["polyfills"][0]  # else `offline` names a CDN's


def test_the_reference_has_every_command_field_and_schema() -> None:
    made = reference_pages()
    heads = re.findall(r"^## (.+)$", made["reference/cli.md"], re.MULTILINE)
    assert heads == [*COMMANDS, "Exit codes"]
    for name, one in options_by_command(click.Context(TURBOFIT)):
        section = made["reference/cli.md"].partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        if isinstance(one, click.Option) and not one.hidden:
            assert all(re.search(rf"{word}(?![\w-])", section) for word in one.opts), one.opts
    for field in PlanRequest.model_fields:
        assert f"| `{field}` |" in made["reference/python.md"]
    for path in SCHEMAS:
        assert f"../{path.relative_to(ROOT).as_posix()})" in made["reference/schemas.md"]


_LOADED = re.compile(
    r"<(?:script|img|iframe|source)[^>]* src=\"?([^\" >]+)|<link[^>]* href=\"?([^\" >]+)"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by this interpreter, or by that of the environment that scripts/docs makes."""
    python = ROOT / ".venv-docs" / "bin" / "python"
    if all(map(importlib.util.find_spec, ("mkdocs", "material", "mkdocstrings"))):
        python = Path(sys.executable)
    if not python.exists():
        pytest.skip("no MkDocs Material here: ./scripts/docs installs it")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [python, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.slow
def test_every_page_is_there(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        place = page.relative_to(ROOT / "docs").with_suffix(".html")
        assert (site / place).exists(), place
    assert (site / "search" / "search_index.js").exists()
    assert (site / "bench" / "rehearsal" / "RESULTS.html").exists()
    assert (site / "turbofit" / "report" / "schema" / "turbofit.plan-1.json").exists()
    # Each loads only what lies beside it.
    for page in site.rglob("*.html"):
        for found in _LOADED.finditer(page.read_text(encoding="utf-8")):
            place = found[1] or found[2]
            assert not re.match(r"(https?:)?//", place), (page.name, place)
            if not place.startswith(("data:", "/")):
                assert (page.parent / place).exists(), (page.name, place)


@pytest.mark.slow
def test_the_switch_leads_to_the_twin_or_to_the_start(site: Path) -> None:
    def place(page: str) -> Path:
        return site / page.replace("README.md", "index.md").replace(".md", ".html")

    for page in NAV:
        chinese = page.startswith("zh/")
        twin = page.removeprefix("zh/") if chinese else f"zh/{page}"
        if twin not in NAV:
            twin = "index.md" if chinese else "zh/index.md"
        text = place(page).read_text(encoding="utf-8")
        links = re.findall(r"<a href=\"?([^\" ]+)[^>]* class=\"?md-select__link", text)
        leads_to = {(place(page).parent / link).resolve() for link in links}
        assert leads_to == {place(page), place(twin)}, page


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "words"), [("operations.html", "convicted"), ("zh/operations.html", "反向代理")]
)
def test_the_search_works_from_files(
    page: str, words: str, site: Path, request: pytest.FixtureRequest
) -> None:
    """There a hidden frame takes the place of the worker (scripts/iframe-worker.js)."""
    chromium: Browser = request.getfixturevalue("browser")
    chromium.media()
    chromium.said()
    chromium.asked()
    chromium.driver.get((site / page).as_uri())
    chromium.run("document.querySelector('[data-md-toggle=search]').click()")
    chromium.one("input[name=query]").send_keys(words)
    until(lambda: chromium.all(".md-search-result__link"), "results of the search")
    links = [one.get_attribute("href") for one in chromium.all(".md-search-result__link")]
    assert any(page in link for link in links)
    assert chromium.said() == []
    assert all(address.startswith(("file:", "data:")) for address in chromium.asked())
