"""The site builds strictly, and no page of it loads anything from elsewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.report.conftest import Browser, browser  # noqa: F401 - pytest's fixture
from tests.support.waiting import until
from tests.test_site import NAV

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
_LOADED = re.compile(
    r"<(?:script|img|iframe|source)[^>]* src=\"?([^\" >]+)|<link[^>]* href=\"?([^\" >]+)"
)


def python_with_mkdocs() -> str | None:
    """This interpreter, or that of the environment that scripts/docs makes."""
    if all(map(importlib.util.find_spec, ("mkdocs", "material", "mkdocstrings"))):
        return sys.executable
    other = ROOT / ".venv-docs" / "bin" / "python"
    return str(other) if other.exists() else None


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    python = python_with_mkdocs()
    if python is None:
        pytest.skip("no MkDocs Material here: ./scripts/docs installs it")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [python, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_every_page_is_there(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        place = page.relative_to(ROOT / "docs").with_suffix(".html")
        assert (site / place).exists(), place
    assert (site / "search" / "search_index.js").exists()
    assert (site / "bench" / "rehearsal" / "RESULTS.html").exists()
    assert (site / "turbofit" / "report" / "schema" / "turbofit.plan-1.json").exists()


def test_a_page_loads_only_what_lies_beside_it(site: Path) -> None:
    for page in site.rglob("*.html"):
        for found in _LOADED.finditer(page.read_text(encoding="utf-8")):
            place = found[1] or found[2]
            assert not re.match(r"(https?:)?//", place), (page.name, place)
            if not place.startswith(("data:", "/")):
                assert (page.parent / place).exists(), (page.name, place)


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
