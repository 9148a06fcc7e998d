"""Planning, reports and a saved machine on Windows, simulated: see `without_posix`."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from tests.support.nvml import Scenario, four_3090
from turbofit.cli.main import TURBOFIT
from turbofit.cli.manual import COMMANDS
from turbofit.cli.terminal import output, screen
from turbofit.core.process import files

Patch = pytest.MonkeyPatch

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
RUNNER = [sys.executable, "-m", "tests.without_posix"]


def run(
    folder: Path, *words: str, given: str | None = None, **environ: str
) -> subprocess.CompletedProcess[str]:
    """The command line without POSIX, in a folder."""
    here = {"PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(folder)}
    return subprocess.run(
        [*RUNNER, *words],
        cwd=folder, env={**os.environ, **here, **environ}, input=given,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def said(folder: Path, *words: str, **environ: str) -> str:
    """What it answers; nothing may go wrong. Where the machine is slow, progress is on stderr."""
    done = run(folder, *words, **environ)
    told = [line for line in done.stderr.splitlines() if not re.search(r"\b\d+ s\b", line)]
    assert (done.returncode, told) == (0, [])
    return done.stdout


ANSWERED = (
    "models", "gpus", "report --schema", "serve --help",
    "plan internvl2-8b --on 4xrtx3090 --json", "report latest --json",
    "report latest --html report.html",
    "plan llama-3.2-11b-vision --on 1xv100-32g",
    "plan internvl2-8b --cluster sim:4xrtx3090@2",
    "predict internvl2-8b --on 4xrtx3090 --tp 4",
    "serve internvl2-8b --on 4xrtx3090 --dry-run",
)  # fmt: skip
REFUSED = {
    f"{name} internvl2-8b": f"error: turbofit {name} does not run on Windows\nhint: run it on Linux"
    for name in ("calibrate", "rehearse", "serve")
} | {"merge nowhere adapter out": "error: nowhere is neither a folder"}


def test_what_needs_no_engine_runs_and_what_runs_engines_says_so(tmp_path: Path) -> None:
    lines = [*ANSWERED, *REFUSED]
    done = run(tmp_path, "--each", given="\n".join(lines))
    answers, said = map(json.loads, done.stdout.splitlines()), dict[str, str]()
    for line, (code, out, err) in zip(lines, answers, strict=True):
        if line in REFUSED:
            assert (code, err.startswith(REFUSED[line])) == (2, True), (line, err)
        else:
            assert code == 0, (line, err)
            assert out
            said[line] = out
    plan, again = (said[line] for line in ANSWERED[4:6])
    assert json.loads(again) == json.loads(plan)
    assert "InternVL2-8B" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_measured_machine_is_saved_and_planned_for(
    tmp_path: Path, nvml_machine: Callable[[Scenario | None], dict[str, str]]
) -> None:
    done = run(tmp_path, "machine", "--save", "box.json", **nvml_machine(four_3090()))
    assert (done.returncode, done.stderr) == (0, "saved to box.json\n")
    assert "RTX 3090" in done.stdout
    plan = json.loads(said(tmp_path, "plan", "internvl2-8b", "--on", "box.json", "--json"))
    assert plan["fits"]
    assert plan["machine"]["host"]["shm_available"] == "NA"


def test_the_page_names_what_needs_linux() -> None:
    page = (ROOT / "docs" / "installation.md").read_text()
    named = page.partition("## Windows")[2].partition("need Linux")[0]
    commands = {name: TURBOFIT.get_command(click.Context(TURBOFIT), name) for name in COMMANDS}
    linux = {name for name, command in commands.items() if command and command.only_linux}
    assert set(re.findall(r"`(\w+)`", named)) == linux


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({"LOCALAPPDATA": r"C:\Users\ada\AppData\Local"}, r"C:\Users\ada\AppData\Local"),
        ({"LOCALAPPDATA": "", "HOME": "/ada"}, "/ada/AppData/Local"),
        ({"LOCALAPPDATA": "/c", "XDG_STATE_HOME": "/d"}, "/d"),
        ({"LOCALAPPDATA": "/c", "XDG_STATE_HOME": "d"}, "/c"),
    ],
)
def test_the_state_folder(environ: dict[str, str], folder: str, monkeypatch: Patch) -> None:
    monkeypatch.delenv("XDG_STATE_HOME")
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(files, "WINDOWS", True)
    assert files.state_dir("runs", make=False) == Path(folder, "turbofit", "runs")


def test_what_is_written_on_windows(monkeypatch: Patch) -> None:
    """In cp1252 a multiplication sign is a byte that no JSON reader takes."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252"))
    monkeypatch.setattr(screen, "WINDOWS", True)
    output.prepare_streams()
    output.answer("4 × 3090, 中文")
    assert raw.getvalue().decode("utf-8") == "4 × 3090, 中文"
    # Colour is for Windows Terminal only.
    in_terminal = {"WT_SESSION": "1"}
    environs = ({}, in_terminal, {**in_terminal, "NO_COLOR": "1"})
    assert [screen.takes_colour(one) for one in environs] == [False, True, False]
