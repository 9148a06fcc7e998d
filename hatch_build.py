"""What hatchling makes at a build: URLs, a README for an index page, a compiled library.

An index shows README.md alone, so that its links must lead to the repository, at the version's tag.
Where the repository is stands once, in pyproject.toml: ``[tool.hatch.metadata.hooks.custom]``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

#: What resizes images (`turbofit.serving.images`), and the file with its digest and the source's.
SOURCE, LIBRARY = "turbofit/serving/images/pixels.c", "libpixels.so"
DIGEST = f"{LIBRARY}.sha256"
#: Without fused multiplications, which round differently: Pillow's wheels have none.
FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=off", "-fPIC", "-shared", "-fvisibility=hidden")
_COMPILER_SECONDS = 60
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


def compile_library(source: Path, folder: Path) -> str:
    """Compile the library into a folder, with its digest; returns why it cannot, or nothing."""
    if sysconfig.get_platform() != "linux-x86_64":
        return "this is no Linux on x86-64"
    words = os.environ.get("CC", "").split()
    words = words or [name for name in ("cc", "gcc", "clang") if shutil.which(name)][:1]
    if not words:
        return "there is no C compiler"
    library = folder / LIBRARY
    words += [*FLAGS, str(source), "-o", str(library)]
    try:
        subprocess.run(words, check=True, capture_output=True, timeout=_COMPILER_SECONDS)
        digest = sha256(source.read_bytes() + library.read_bytes()).hexdigest()
        (folder / DIGEST).write_text(digest, encoding="ascii")
    except (OSError, subprocess.SubprocessError) as exc:
        return str(exc)
    return ""


class BuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Puts the presets and a compiled library into a wheel.

    The library stays out where there is no C compiler: Pillow does the work then. ``CC=false``
    makes a wheel for every platform. An editable installation reads the checkout's presets, and
    gets the library into the checkout.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add them."""
        self._folder = tempfile.TemporaryDirectory()
        here, source = Path(self._folder.name), Path(self.root, SOURCE)
        if version == "editable":
            here = source.parent
        why = compile_library(source, here)
        if why:
            self.app.display_warning(f"images will be resized by Pillow alone: {why}")
        if version == "editable":
            return
        included, presets = build_data["force_include"], Path(self.root, "presets")
        if not why:
            build_data["tag"] = "py3-none-linux_x86_64"
            build_data["pure_python"] = False
            for name in (LIBRARY, DIGEST):
                included[str(here / name)] = str(Path(SOURCE).with_name(name))
        for file in sorted(path for path in presets.rglob("*") if path.is_file()):
            included[str(file)] = f"turbofit/_presets/{file.relative_to(presets).as_posix()}"

    def finalize(self, *_: Any) -> None:
        """The wheel is written."""
        self._folder.cleanup()
