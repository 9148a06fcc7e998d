"""What is released: metadata, workflows, forms, the image, and an sdist with all."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import turbofit
from turbofit.core.presets import presets_dir
from turbofit.core.version import REFERENCE

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
URL = "https://example.com/owner/turbofit"
RELATIVE = re.compile(r"\]\((?!https?:|#)")


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def steps(workflow: Any) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job.get("steps", [])]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_pins_its_actions_and_calls_what_is_there(path: Path) -> None:
    workflow = read(path)
    assert True in workflow  # `on`, as YAML 1.1 reads it
    assert workflow["permissions"] == {"contents": "read"}
    used = [step["uses"] for step in steps(workflow) if "uses" in step]
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@(release/)?v\d+", action) for action in used), used
    for line in (step["run"] for step in steps(workflow) if "run" in step):
        for script in re.findall(r"\./(scripts/[\w-]+)", line):
            assert (ROOT / script).stat().st_mode & 0o111, script
        for module in re.findall(r"python -m (bench[\w.]*)", line):
            assert importlib.util.find_spec(module) is not None
    for job in workflow["jobs"].values():
        assert (ROOT / job.get("uses", "./.github/workflows/check.yml")).exists()


def test_every_python_that_the_metadata_names_is_checked_and_the_citation_is_read() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert (citation["cff-version"], citation["version"]) == ("1.2.0", turbofit.__version__)
    assert {"title", "message", "authors"} <= set(citation)
    checked = read(ROOT / ".github" / "workflows" / "check.yml")["jobs"]["quick"]
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text)
    assert checked["strategy"]["matrix"]["python"] == named
    assert f'requires-python = ">={named[0]}"' in text


def hook() -> Any:
    pytest.importorskip("hatchling")
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_is_whole_on_an_index_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert RELATIVE.search(text)
    shown = hook().index_readme(text, URL, "0.1.0")
    assert not RELATIVE.search(shown)
    assert f"]({URL}/raw/v0.1.0/docs/terminal.svg)" in shown
    assert f"]({URL}/blob/v0.1.0/docs/accuracy.md)" in shown
    assert hook().index_readme(text, "", "0.1.0") == text
    assert set(hook().project_urls(URL, "0.1.0")) == {
        "Repository", "Documentation", "Changelog", "Issues",
    }  # fmt: skip
    assert hook().project_urls("", "0.1.0") == {}


def test_the_extras_are_those_of_the_wheel() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    named = extras["all"][0].removeprefix("turbofit[").removesuffix("]").split(",")
    assert set(named) == set(extras) - {"all", "gateway"}  # which comes with each


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


def test_the_image_is_lmdeploys_and_what_the_manifests_say() -> None:
    assert last("FROM") == "openmmlab/lmdeploy:${LMDEPLOY}"
    arguments = dict(line[4:].split("=", 1) for line in LINES if line.startswith("ARG "))
    assert re.fullmatch(rf"v{REFERENCE}\.\d+-\$\{{CUDA\}}", arguments["LMDEPLOY"])
    assert re.fullmatch(r"cu\d+\.\d+", arguments["CUDA"])
    assert int(last("USER")) > 999  # a number: Kubernetes can tell that it is not root
    assert json.loads(last("ENTRYPOINT")) == ["turbofit"]
    hub, state = json.loads(last("VOLUME"))
    assert {f"HF_HOME={hub}", f"XDG_STATE_HOME={state}"} <= set(last("ENV").split())
    compose = (presets_dir() / "export" / "compose.template").read_text(encoding="utf-8")
    assert f"HF_HOME: {hub}\n      XDG_STATE_HOME: {state}\n" in compose
