"""The Dockerfile: hadolint finds nothing, and it is made of what turbofit's manifests count on."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from turbofit.core.presets import presets_dir
from turbofit.core.version import REFERENCE

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
LINES = TEXT.replace("\\\n", " ").splitlines()


def last(instruction: str) -> str:
    """What the last such instruction says."""
    return [line for line in LINES if line.startswith(f"{instruction} ")][-1].split(" ", 1)[1]


def test_hadolint_finds_nothing() -> None:
    beside = Path(sys.executable).with_name("hadolint")
    hadolint = str(beside) if beside.exists() else shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("no hadolint here: the group `dev` brings it on Linux and x86-64")
    done = subprocess.run(
        [hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_it_is_lmdeploys_image_of_the_reference() -> None:
    assert last("FROM") == "openmmlab/lmdeploy:${LMDEPLOY}"
    arguments = dict(line[4:].split("=", 1) for line in LINES if line.startswith("ARG "))
    image = re.fullmatch(r"v(\d+\.\d+)\.\d+-\$\{CUDA\}", arguments["LMDEPLOY"])
    assert image is not None
    assert image[1] == REFERENCE
    assert re.fullmatch(r"cu\d+\.\d+", arguments["CUDA"])


def test_nobody_runs_it_as_root() -> None:
    assert int(last("USER")) > 999  # a number: Kubernetes can tell that it is not root


def test_the_manifests_fit_it() -> None:
    assert json.loads(last("ENTRYPOINT")) == ["turbofit"]
    hub, state = json.loads(last("VOLUME"))
    assert {f"HF_HOME={hub}", f"XDG_STATE_HOME={state}"} <= set(last("ENV").split())
    compose = (presets_dir() / "export" / "compose.template").read_text(encoding="utf-8")
    assert f"HF_HOME: {hub}\n      XDG_STATE_HOME: {state}\n" in compose


@pytest.mark.exhaustive
def test_what_docker_copies_is_enough(tmp_path: Path) -> None:
    """Whatever `.dockerignore` lets in makes the wheel."""
    pytest.importorskip("hatchling")
    named = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for name in (line[1:] for line in named if line.startswith("!")):
        source, ignored = ROOT / name, shutil.ignore_patterns("__pycache__")
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=ignored)
        else:
            shutil.copy(source, tmp_path / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
    done = subprocess.run(
        [*pip, "--wheel-dir", str(tmp_path / "dist"), str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "dist").glob("turbofit-*.whl"))
