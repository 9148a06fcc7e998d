"""The command lines of README, docs and help pages; Chinese pages have the same."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import yaml

from turbofit.cli.manual import MANUAL

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md",
         *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))  # fmt: skip
_BLOCK = re.compile(r"^    turbofit (.+)$|^python -m turbofit (.+)$", re.MULTILINE)
_INLINE = re.compile(r"`turbofit\s([^`]+)`")
#: What a page writes for the reader's own words.
_CHOICES = re.compile(r"^[\w.]+(\|[\w.]+)+$")


class Shown(NamedTuple):
    """A command line without ``turbofit``. ``whole``: in a block of its own, as one types it."""

    page: str
    line: str
    whole: bool

    @property
    def argv(self) -> list[str]:
        """Its words, without a comment, a redirection and the commands behind a pipe."""
        return shlex.split(re.split(r" [>|] ", _one_line(self.line))[0], comments=True)

    def readings(self) -> Iterator[list[str]]:
        """Each reading of ``[OPTIONAL]`` words, left in, and of ``A|B``."""
        line = _one_line(self.line).replace("\\|", "|").replace("[OPTIONS]", "")
        line = line.replace("[", "").replace("]", "")
        words = shlex.split(re.split(r" [>&|] ?", line)[0], comments=True)
        yield from map(list, product(*(w.split("|") if _CHOICES.match(w) else [w] for w in words)))


def _one_line(line: str) -> str:
    return " ".join(line.split())


def profile() -> str:
    """The example of docs/environment.md, which its command lines read."""
    text = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert yaml.safe_load(example)["model"]
    return str(example)


def shown() -> list[Shown]:
    """All of them, page by page and in order; not those with ``…``, which leave something out.

    Also the examples of help pages.
    """
    found = [
        Shown(f"turbofit help {name}", example.removeprefix("turbofit "), whole=True)
        for name, manual in MANUAL.items()
        for example in manual.examples
    ]
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for pattern, whole in ((_BLOCK, True), (_INLINE, False)):
            lines = [next(filter(None, match.groups())) for match in pattern.finditer(text)]
            found += [Shown(page, line, whole) for line in lines if "…" not in line.split("  #")[0]]
    return [one for one in found if "──" not in one.line]
