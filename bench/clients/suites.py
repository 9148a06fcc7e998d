"""What is run against a server: each SDK's checks, in an environment of their own."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Final, NamedTuple

from bench.clients.checks.common import picture

_HERE: Final = Path(__file__).parent
_CHECKS: Final = _HERE / "checks"
_SHOWN: Final = ("openai", "anthropic", "langchain-openai", "litellm", "pytest")
#: By name: the environment, and the program.
SUITES: Final = {
    "openai (Python)": ("sdk", "sdk_openai.py"),
    "openai (Node.js)": ("node", "sdk_openai.mjs"),
    "anthropic": ("sdk", "sdk_anthropic.py"),
    "langchain-openai": ("sdk", "sdk_langchain.py"),
    "litellm": ("litellm", "sdk_litellm.py"),
    "plain HTTP": ("sdk", "raw_http.py"),
}


class Seen(NamedTuple):
    """What one check saw, and what an error said beside it."""

    seen: str
    said: str = ""


class Environments:
    """Two of Python and one of Node.js in a folder; made once, and again when requirements change.

    Args:
        folder: where they lie.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()

    def command(self, suite: str) -> list[str]:
        """What runs the checks of one SDK, before the URL; empty where there is no Node.js."""
        kind, program = SUITES[suite]
        if kind != "node":
            return [str(self._python(kind)), str(_CHECKS / program)]
        home = self._node(program)
        return [] if home is None else ["node", str(home / program)]

    def _python(self, name: str) -> Path:
        """The interpreter of ``sdk`` or ``litellm``."""
        home, wanted = self._folder / name, _HERE / "requirements" / f"{name}.txt"
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

    def _node(self, program: str) -> Path | None:
        """The folder from which Node.js finds the openai package; None without npm."""
        npm, home = shutil.which("npm"), self._folder / "node"
        if npm is None or shutil.which("node") is None:
            return None
        home.mkdir(parents=True, exist_ok=True)
        if not (home / "node_modules" / "openai").exists():
            words = ["install", "--no-audit", "--no-fund", "--silent", "openai"]
            subprocess.run([npm, *words], cwd=home, check=True, stdout=sys.stderr)
        # Node.js looks for packages beside the file, not where it was started.
        shutil.copy(_CHECKS / program, home / program)
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


def run(command: list[str], url: str) -> dict[str, Seen]:
    """The checks of one SDK against a server."""
    if not command:
        return {}
    env = {key: value for key, value in os.environ.items() if not _is_ours(key)}
    words = [*command, url, picture()]
    done = subprocess.run(words, env=env, stdout=subprocess.PIPE, text=True, check=False)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        rows.append({"check": "the program", "seen": f"exit code {done.returncode}"})
    return {row["check"]: Seen(row["seen"], row.get("said", "")) for row in rows}


def _is_ours(key: str) -> bool:
    """Settings of this process that would lead an SDK elsewhere, or change what it imports."""
    proxies = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    return key == "PYTHONPATH" or key.upper() in proxies or key.startswith(("OPENAI_", "ANTHROPIC"))
