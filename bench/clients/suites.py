"""What is run against a server: the SDKs' checks, and LMDeploy's own REST tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from bench.clients.environment import NODE_CHECKS, Environments

__all__ = ["REST", "SUITES", "Seen", "run_rest", "run_suite"]

_CHECKS = Path(__file__).with_name("checks")
_PLUGIN = "bench_api_client"
_LONGEST = 3600.0
#: Processes of tests at once; each imports torch first.
_WORKERS = 2
#: By name: the environment, and the program.
SUITES = {
    "openai (Python)": ("sdk", "sdk_openai.py"),
    "openai (Node.js)": ("node", NODE_CHECKS),
    "anthropic": ("sdk", "sdk_anthropic.py"),
    "langchain-openai": ("sdk", "sdk_langchain.py"),
    "litellm": ("litellm", "sdk_litellm.py"),
    "plain HTTP": ("sdk", "raw_http.py"),
}
REST = "LMDeploy's REST tests"
#: Files of the repository whose tests talk to a server that runs already, and the parameters among
#: them: all models are the server's own in fact, since tests ask it for its name.
_FILES = (
    "anthropic_sdk_messages", "anthropic_v1", "chat_completions_v1", "completions_v1", "generate",
)  # fmt: skip
_ONE_OF_EACH = "Qwen/Qwen3-0.6B and turbomind"


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


def run_rest(
    environments: Environments, repository: Path, folder: Path, url: str, only: str = ""
) -> dict[str, Seen]:
    """LMDeploy's own REST tests, by their names.

    Args:
        environments: the ``sdk`` one is used, with this process's LMDeploy.
        repository: a checkout of InternLM/lmdeploy that has ``autotest`` (0.16 is meant).
        folder: for the results.
        url: of the server.
        only: which of them, as pytest's ``-k`` has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{_PLUGIN}.py").write_text(_API_CLIENT)
    results = (folder / "junit.xml").resolve()
    results.unlink(missing_ok=True)
    tests = "autotest/interface/restful/test_restful_{}.py"
    words = [str(environments.beside_lmdeploy("sdk")), "-m", "pytest", "-q", "--tb=line"]
    words += ["-p", _PLUGIN, "-p", "no:cacheprovider", "-p", "no:rerunfailures"]
    chosen = f"{_ONE_OF_EACH} and ({only})" if only else _ONE_OF_EACH
    words += ["-n", str(_WORKERS), "-k", chosen]
    words += [f"--junitxml={results}", *(tests.format(name) for name in _FILES)]
    env = {key: value for key, value in os.environ.items() if not _is_ours(key)}
    env |= {
        "PYTHONPATH": os.pathsep.join([str(repository / "autotest"), str(folder.resolve())]),
        "LMDEPLOY_PORT": str(urlsplit(url).port), "TEST_ENV": "a100", "HF_HUB_OFFLINE": "1",
        "CONFIG_COMPARE_SKIP_MKDIRS": "1", "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    with (folder / "pytest.log").open("w") as log:
        subprocess.run(
            words, cwd=repository, env=env, stdout=log, stderr=log, timeout=_LONGEST, check=False
        )
    if not results.exists():
        raise SystemExit(f"error: LMDeploy's tests did not run\nhint: see {log.name}")
    return {_name(case): _outcome(case) for case in ET.parse(results).iter("testcase")}


def _name(case: ET.Element) -> str:
    where = str(case.get("classname")).partition("test_restful_")[2]
    name = str(case.get("name")).replace("[Qwen/Qwen3-0.6B-turbomind]", "")
    return f"{where}.{name}"


def _outcome(case: ET.Element) -> Seen:
    for part in case:
        if part.tag in ("failure", "error", "skipped"):
            said = " ".join(str(part.get("message")).split())[:300]
            return Seen(part.tag.replace("failure", "failed"), said)
    return Seen("passed")


#: LMDeploy 0.18 has no ``APIClient``, which the tests of 0.16 use: theirs is loaded in its place.
_API_CLIENT = """\
import importlib.util
import pathlib
import sys

NAME = "lmdeploy.serve.openai.api_client"


def pytest_configure(config):
    if importlib.util.find_spec(NAME) is None:
        path = pathlib.Path.cwd().joinpath(*NAME.split(".")).with_suffix(".py")
        spec = importlib.util.spec_from_file_location(NAME, path)
        sys.modules[NAME] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[NAME])
"""
