"""What is run against a server: the SDKs' checks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from bench.clients.environment import NODE_CHECKS, Environments

__all__ = ["SUITES", "Seen", "run_suite"]

_CHECKS = Path(__file__).with_name("checks")
_LONGEST = 3600.0
#: By name: the environment, and the program.
SUITES = {
    "openai (Python)": ("sdk", "sdk_openai.py"),
    "openai (Node.js)": ("node", NODE_CHECKS),
    "anthropic": ("sdk", "sdk_anthropic.py"),
    "langchain-openai": ("sdk", "sdk_langchain.py"),
    "litellm": ("litellm", "sdk_litellm.py"),
    "plain HTTP": ("sdk", "raw_http.py"),
}


class Seen(NamedTuple):
    """What one check saw, and what an error said beside it."""

    seen: str
    said: str = ""


def run_suite(environments: Environments, name: str, url: str) -> dict[str, Seen]:
    """The checks of one SDK; empty where there is no Node.js."""
    kind, program = SUITES[name]
    if kind == "node":
        home = environments.node()
        if home is None:
            return {}
        words = ["node", str(home / program), url, _picture()]
    else:
        words = [str(environments.python(kind)), str(_CHECKS / program), url]
    env = {key: value for key, value in os.environ.items() if not _is_ours(key)}
    done = subprocess.run(
        words, env=env, stdout=subprocess.PIPE, text=True, timeout=_LONGEST, check=False
    )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        rows.append({"check": "the program", "seen": f"exit code {done.returncode}", "said": ""})
    return {row["check"]: Seen(row["seen"], row["said"]) for row in rows}


def _is_ours(key: str) -> bool:
    """Settings of this process that would lead an SDK elsewhere, or change what it imports."""
    proxies = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    return key == "PYTHONPATH" or key.upper() in proxies or key.startswith(("OPENAI_", "ANTHROPIC"))


def _picture() -> str:
    words = [sys.executable, "-c", "from common import picture; print(picture())"]
    done = subprocess.run(words, cwd=_CHECKS, capture_output=True, text=True, check=True)
    return done.stdout.strip()
