"""The site as files."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

import pytest

from turbofit.core.errors import UsageError
from turbofit.report.fit_site import site as module
from turbofit.report.fit_site.choices import SiteRequest, choices_of
from turbofit.report.fit_site.site import index_page, write_site

FOLDER = Path(module.__file__).parent


def test_the_page_runs_its_own_script_and_what_that_loads() -> None:
    text = index_page(choices_of(SiteRequest.of(), "today"))
    script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(script) == 1
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}' 'strict-dynamic'; " in text
    assert "default-src 'none'" in text
    assert not re.search(r"https?://", text)


def test_both_languages_say_the_same_things() -> None:
    text = (FOLDER / "wording.js").read_text(encoding="utf-8")
    english, chinese = text.split("  zh: {")
    names = r"(\w+): (?:'((?:[^'\\]|\\.)*)'|\[)"
    said = [dict(re.findall(names, part)) for part in (english, chinese)]
    assert list(said[0]) == list(said[1])
    assert len(said[0]) > 50
    for name, sentence in said[0].items():
        places = [set(re.findall(r"\{\d\}", one)) for one in (sentence, said[1][name])]
        assert places[0] == places[1], name
    used = set(re.findall(r"say\('(\w+)'", "".join(
        (FOLDER / name).read_text(encoding="utf-8") for name in ("answer.js", "site.js")
    )))  # fmt: skip
    shown = re.findall(r'data-text="(\w+)"', (FOLDER / "index.html").read_text(encoding="utf-8"))
    assert (used | set(shown)) <= set(said[0])


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    request = SiteRequest.of(
        models=("internvl3-2b",), cards=("rtx4090",), counts=(1,), used=(0,), images=((1, None),)
    )
    with pytest.raises(UsageError, match="cannot be made"):
        write_site(request, tmp_path, say=str, jobs=1)
