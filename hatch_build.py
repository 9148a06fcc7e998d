"""Metadata that hatchling makes at a build: the project's URLs, and a README for an index page.

An index shows README.md alone, so that its links must lead to the repository, at the version's tag.
Where the repository is stands once, in pyproject.toml: ``[tool.hatch.metadata.hooks.custom]``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)")


def index_readme(text: str, url: str, version: str) -> str:
    """README.md with absolute links; as it is while nobody knows the repository's address."""
    if not url:
        return text

    def absolute(link: re.Match[str]) -> str:
        way = "raw" if link[1] else "blob"
        return f"{link[1]}[{link[2]}]({url}/{way}/v{version}/{link[3]})"

    return _LINK.sub(absolute, text)


def project_urls(url: str, version: str) -> dict[str, str]:
    """What an index page links to beside the README."""
    if not url:
        return {}
    return {
        "Repository": url,
        "Documentation": f"{url}/tree/v{version}/docs",
        "Changelog": f"{url}/blob/v{version}/CHANGELOG.md",
        "Issues": f"{url}/issues",
    }


class MetadataHook(MetadataHookInterface):
    """See above."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add what `pyproject.toml` calls dynamic."""
        url, version = str(self.config.get("url", "")).rstrip("/"), metadata["version"]
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        readme = index_readme(text, url, version)
        metadata["readme"] = {"content-type": "text/markdown", "text": readme}
        metadata["urls"] = project_urls(url, version)
