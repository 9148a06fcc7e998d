"""What hatchling makes at a build: the project's URLs, a README for an index page, packed presets.

An index shows README.md alone, so that its links must lead to the repository, at the version's tag.
Where the repository is stands once, in pyproject.toml: ``[tool.hatch.metadata.hooks.custom]``.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

#: Rooms of presets that are one file in a wheel (`turbofit.core.presets` reads both).
PACKED = ("checkpoints", "gpus", "models")
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


class PresetsHook(BuildHookInterface):  # type: ignore[type-arg]
    """Puts presets into a wheel, those of large rooms as one file each."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add them; an editable installation reads those of the checkout."""
        if version == "editable":
            return
        self._folder = tempfile.TemporaryDirectory()
        included, presets = build_data["force_include"], Path(self.root, "presets")
        for file in sorted(path for path in presets.rglob("*") if path.is_file()):
            name = file.relative_to(presets)
            if name.parts[0] not in PACKED:
                included[str(file)] = f"turbofit/_presets/{name.as_posix()}"
        for room in PACKED:
            files = sorted((presets / room).glob("*.yaml"))
            packed = Path(self._folder.name, f"{room}.json")
            texts = {file.stem: file.read_text(encoding="utf-8") for file in files}
            packed.write_text(json.dumps(texts), encoding="utf-8")
            included[str(packed)] = f"turbofit/_presets/{packed.name}"

    def finalize(self, *_: Any) -> None:
        """The wheel is written."""
        if hasattr(self, "_folder"):
            self._folder.cleanup()
