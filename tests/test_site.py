"""The site of the docs: its navigation has every page; its other pages and links are made right."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import yaml

from scripts.reference import SCHEMAS, reference_pages
from turbofit.cli.command_group import COMMANDS, TURBOFIT
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


def test_nothing_is_loaded_from_a_network() -> None:
    assert CONFIG["theme"]["font"] is False
    assert "offline" in CONFIG["plugins"]
    assert "iframe-worker" in CONFIG["extra"]["polyfills"][0]  # else `offline` names a CDN's


def test_the_reference_has_every_command_field_and_schema() -> None:
    made = reference_pages()
    heads = re.findall(r"^## (.+)$", made["reference/cli.md"], re.MULTILINE)
    assert heads == [*COMMANDS, "Exit codes"]
    root = click.Context(TURBOFIT)
    for name in COMMANDS:
        command = TURBOFIT.get_command(root, name)
        assert command is not None
        section = made["reference/cli.md"].partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        for one in command.params:
            if isinstance(one, click.Option) and not one.hidden:
                assert all(re.search(rf"{word}(?![\w-])", section) for word in one.opts), one.opts
    for field in PlanRequest.model_fields:
        assert f"| `{field}` |" in made["reference/python.md"]
    for path in SCHEMAS:
        assert f"../{path.relative_to(ROOT).as_posix()})" in made["reference/schemas.md"]
