"""``python scripts/release.py vVERSION``: what keeps the tag from being released, a line each."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def missing(tag: str, root: Path = ROOT) -> list[str]:
    """What is not ready; nothing where all is."""

    def text(name: str) -> str:
        return (root / name).read_text(encoding="utf-8")

    def said(pattern: str, name: str) -> str:
        found = re.search(pattern, text(name), re.MULTILINE)
        return found[1] if found else ""

    version = said(r'^__version__ = "(.+)"$', "turbofit/core/version.py")
    found = [] if tag == f"v{version}" else [f"the tag is {tag}, the version {version}"]
    if not re.search(rf"^## {re.escape(version)}\b", text("CHANGELOG.md"), re.MULTILINE):
        found.append(f"CHANGELOG.md has no section {version}")
    unreleased = said(r"^## Unreleased$((?:\n(?!## ).*)*)", "CHANGELOG.md")
    if re.search("^- ", unreleased, re.MULTILINE):
        found.append("CHANGELOG.md has unreleased changes")
    if (cited := said(r'^version: "?([^"\n]+)"?$', "CITATION.cff")) != version:
        found.append(f"CITATION.cff is of {cited}")
    if not said(r'^url = "(https://.+?)"', "pyproject.toml"):
        found.append("pyproject.toml has no address of the repository (url, of the metadata hook)")
    return found


if __name__ == "__main__":
    FOUND = missing(sys.argv[1])
    sys.stdout.write("".join(f"release: {line}\n" for line in FOUND))
    sys.exit(bool(FOUND))
