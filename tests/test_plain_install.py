"""Every command in an environment of `pip install .` alone: it runs, or says what is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from tests.support.processes import sharing_libraries
from turbofit.cli.manual import COMMANDS

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomllib")

ROOT = Path(__file__).resolve().parents[1]
#: Without what would lead an interpreter to other packages, or set options of a command.
ENVIRON = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("PYTHON", "TURBOFIT_", "VIRTUAL_ENV"))
}
PLAN = "internvl2-2b --on 1xrtx3090"
NOBODY = "http://127.0.0.1:9"
#: The cheapest line of each command that comes as far as its first foreign package.
LINES = {
    "plan": PLAN,
    "predict": PLAN,
    "rehearse": PLAN,
    "pretend": f"--on 1xrtx3090 -- {sys.executable} -c pass",
    "serve": f"{PLAN} --pretend",
    "cluster": "status",
    "chat": NOBODY,
    "ps": "",
    "logs": "",
    "stop": "",
    "calibrate": f"{PLAN} --pretend",
    "tune": f"{PLAN} --pretend",
    "bench": NOBODY,
    "batch": f"requests.jsonl answers.jsonl --url {NOBODY}",
    "gateway": f"--plan plan.json --upstream {NOBODY}",
    "merge": "base adapter merged",
    "quantize": "internvl3-2b-hf --on 1xrtx3090",
    "machine": "",
    "export": f"systemd {PLAN}",
    "report": "latest",
    "which": "internvl2-2b",
    "doctor": "",
    "diagnose": "Killed",
    "models": "",
    "gpus": "",
    "completion": "bash",
}
#: Commands that need a package which an extra installs.
MISSING = {"rehearse", "serve", "cluster", "calibrate", "tune", "bench", "batch", "gateway"}
#: Runs all lines in one process, in which a module that is missing once is missing always.
PROGRAM = """
import contextlib, io, json, sys
from turbofit.cli.main import main
def run(words):
    out, err = io.TextIOWrapper(io.BytesIO(), write_through=True), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    return code, out.buffer.getvalue().decode(), err.getvalue()
lines = json.loads(sys.argv[1])
with open("plan.json", "w") as file:
    file.write(run(["plan", *lines["plan"].split(), "--json"])[1])
print(json.dumps({name: run([name, *line.split()]) for name, line in lines.items()}))
"""


def required(names: list[str]) -> dict[str, Distribution]:
    """The installed distributions that requirements need, and those that these need."""
    found: dict[str, Distribution] = {}
    left = [Requirement(name) for name in names]
    while left:
        wanted = left.pop()
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        if wanted.name not in found:
            found[wanted.name] = distribution(wanted.name)
            left += map(Requirement, found[wanted.name].requires or ())
    return found


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with what pyproject.toml requires, linked from this one."""
    folder = tmp_path_factory.mktemp("plain")
    venv.EnvBuilder(symlinks=True).create(folder)
    (site,) = folder.glob("lib/python*/site-packages")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for found in required(project["dependencies"]).values():
        for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            (site / top).symlink_to(Path(str(found.locate_file(top))))
    (site / "turbofit.pth").write_text(f"{ROOT}\n")
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def said(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The exit code, stdout and stderr of each command's line."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "requests.jsonl").touch()
    state = {"HOME": str(folder), "XDG_STATE_HOME": sharing_libraries(folder / "state")}
    done = subprocess.run(
        [plain, "-c", PROGRAM, json.dumps(LINES)],
        cwd=folder, env=ENVIRON | state, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    answers: dict[str, Any] = json.loads(done.stdout)
    return answers


def test_there_is_a_line_for_each_command() -> None:
    assert LINES.keys() == COMMANDS.keys()


@pytest.mark.parametrize("name", LINES)
def test_a_command_runs_or_says_what_is_missing(name: str, said: dict[str, Any]) -> None:
    code, _, err = said[name]
    assert "Traceback" not in err
    assert code != 1, err
    assert (code == 7) == (name in MISSING), err
    if name in MISSING:
        assert "pip install" in err


def test_an_extra_is_named_that_brings_all_that_a_command_needs(said: dict[str, Any]) -> None:
    assert "[ray]" in said["cluster"][2]
    assert "[gateway]" in said["bench"][2]


def test_doctor_says_that_lmdeploy_is_not_installed(said: dict[str, Any]) -> None:
    _, out, _ = said["doctor"]
    assert "LMDeploy is not installed in this environment" in out


@pytest.mark.exhaustive
def test_what_pip_makes_of_the_checkout(tmp_path: Path) -> None:
    """README's first command, of which the links above are a copy."""
    venv.EnvBuilder(symlinks=True, with_pip=True).create(tmp_path / "v")
    python, env = tmp_path / "v" / "bin" / "python", ENVIRON | {"HOME": str(tmp_path)}
    subprocess.run([python, "-m", "pip", "install", "-q", ROOT], env=env, check=True)
    done = subprocess.run(
        [python, "-m", "turbofit", "doctor", "--json"],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 1, done.stdout + done.stderr
    assert "LMDeploy is not installed in this environment" in done.stdout
