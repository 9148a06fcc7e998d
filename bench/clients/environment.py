"""Environments of the bench's own: the SDKs are not installed beside turbofit."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

__all__ = ["NODE_CHECKS", "Environments"]

HERE = Path(__file__).parent
NODE_CHECKS = "sdk_openai.mjs"
_SHOWN = ("openai", "anthropic", "langchain-openai", "litellm", "pytest")


class Environments:
    """Two of Python and one of Node.js in a folder; made once, and again when requirements change.

    Args:
        folder: where they lie.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()

    def python(self, name: str) -> Path:
        """The interpreter of ``sdk`` or ``litellm``."""
        home, wanted = self._folder / name, HERE / "requirements" / f"{name}.txt"
        digest = hashlib.sha256(wanted.read_bytes()).hexdigest()
        stamp, python = home / "made-from", home / "bin" / "python"
        if not stamp.exists() or stamp.read_text() != digest:
            print(f"installing {wanted.name} into {home}", file=sys.stderr)
            venv.create(home, with_pip=True, clear=True)
            # The pip of older Pythons takes minutes to resolve litellm.
            for words in (["-U", "pip"], ["-r", str(wanted)]):
                pip = [str(python), "-m", "pip", "install", "--quiet", *words]
                subprocess.run(pip, check=True, stdout=sys.stderr)
            stamp.write_text(digest)
        return python

    def node(self) -> Path | None:
        """The folder from which Node.js finds the openai package; None without npm."""
        npm, home = shutil.which("npm"), self._folder / "node"
        if npm is None or shutil.which("node") is None:
            return None
        home.mkdir(parents=True, exist_ok=True)
        if not (home / "node_modules" / "openai").exists():
            words = ["install", "--no-audit", "--no-fund", "--silent", "openai"]
            subprocess.run([npm, *words], cwd=home, check=True, stdout=sys.stderr)
        # Node.js looks for packages beside the file, not where it was started.
        shutil.copy(HERE / "checks" / NODE_CHECKS, home / NODE_CHECKS)
        return home

    def versions(self) -> list[str]:
        """What is installed, as ``openai 3.52.0``."""
        found = []
        for name in ("sdk", "litellm"):
            python = self._folder / name / "bin" / "python"
            if python.exists():
                words = [str(python), "-m", "pip", "list", "--format", "json"]
                listed = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)
                found += [
                    f"{one['name']} {one['version']}"
                    for one in listed
                    if one["name"] in _SHOWN and not (name == "litellm" and one["name"] == "openai")
                ]
        package = self._folder / "node" / "node_modules" / "openai" / "package.json"
        if package.exists():
            found.append(f"openai {json.loads(package.read_text())['version']} (npm)")
        return found
