"""The lines that install turbofit: run in a fresh environment, or resolved if they bring much."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git here: an sdist"),
]

_PAGES = (ROOT / "README.md", ROOT / "docs" / "installation.md")
_PIP = re.compile(r'^    pip install "?\.(?:\[([a-z,]+)\])?"?(?:\s|$)', re.MULTILINE)
EXTRAS = sorted({found for page in _PAGES for found in _PIP.findall(page.read_text("utf-8"))})
#: What pip and uv say where no registry answers, or an offline one has not everything.
_NO_REGISTRY = re.compile(
    r"No matching distribution|NewConnectionError|Could not fetch|Failed to fetch|error sending "
    r"request|not found in the (?:package registry|provided package locations)"
)


def succeeded(argv: list[str], **options: object) -> str:
    """The output; skips the test where the registry is the cause of a failure."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    if done.returncode and (why := _NO_REGISTRY.search(done.stderr)):
        pytest.skip(f"the registry does not have everything: {why[0]}")
    assert done.returncode == 0, done.stderr[-2000:]
    return str(done.stdout)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What git keeps of the package, in a folder of its own."""
    parts = ("turbofit", "presets", "pyproject.toml", "hatch_build.py", "README.md", "LICENSE")
    names = subprocess.run(
        ["git", "ls-files", *parts],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in filter(lambda name: (ROOT / name).exists(), names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.mark.exhaustive
def test_the_first_line_of_the_readme_plans(clone: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^    (python3 -m venv .*turbofit plan .*)$", text, re.MULTILINE)
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env |= {"XDG_STATE_HOME": str(clone / "state"), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    line = line.replace("python3", shlex.quote(sys.executable), 1)
    said = succeeded(["bash", "-c", line], cwd=clone, env=env)
    assert "fits: InternVL2-8B" in said
    (site,) = (clone / ".venv").glob("lib/python*/site-packages")
    assert not list(site.glob("torch*"))


@pytest.mark.parametrize("tool", ["uvx", "pipx"])
def test_it_runs_without_an_environment(tool: str, clone: Path) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"no {tool} here")
    page = (ROOT / "docs" / "installation.md").read_text(encoding="utf-8")
    (line,) = re.findall(rf"^    ({tool} .*turbofit plan .*)$", page, re.MULTILINE)
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    caches = {"UV_CACHE_DIR": "uv", "PIPX_HOME": "pipx", "XDG_STATE_HOME": "state"}
    env |= {name: str(clone / folder) for name, folder in caches.items()}
    assert "fits: InternVL2-8B" in succeeded(shlex.split(line), cwd=clone, env=env)


def test_the_lines_name_extras() -> None:
    assert {"", "all", "lmdeploy", "lmdeploy,ray"} <= set(EXTRAS)


@pytest.mark.parametrize("extras", EXTRAS, ids=lambda extras: extras or "none")
def test_a_line_resolves(extras: str) -> None:
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("no uv here, and pip would download gigabytes to resolve it")
    options = [word for extra in extras.split(",") if extra for word in ("--extra", extra)]
    options += ["--python-platform", "x86_64-manylinux_2_28", "--python-version", "3.12"]
    options += ["--only-binary", ":all:", "--no-binary", "docopt", "--no-python-downloads"]
    said = succeeded(
        [uv, "pip", "compile", "--quiet", "--no-header", *options, "pyproject.toml"], cwd=ROOT
    )
    assert re.search(r"^click==", said, re.MULTILINE)
    assert ("lmdeploy" in extras.split(",") or extras == "all") == ("lmdeploy==" in said)
