"""The way from a command to the engine's process: short, and never back into the command line."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest

import turbofit
from turbofit.cli.main import main
from turbofit.launch.engine import process

HOUSE = Path(turbofit.__file__).parent
#: Files of turbofit from the command to the child.
MOST_FILES = 15

pytestmark = pytest.mark.lmdeploy


@pytest.fixture
def stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Filled by the first start of an engine: the files of turbofit on the stack, top first."""
    found: list[str] = []

    def popen(*_: Any, **__: Any) -> Any:
        files = [Path(frame.filename) for frame in traceback.extract_stack()]
        found.extend(str(file.relative_to(HOUSE)) for file in files if HOUSE in file.parents)
        raise OSError(2, "no process is started here")

    monkeypatch.setattr(process.subprocess, "Popen", popen)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("TURBOFIT_LEASES", str(tmp_path / "leases"))
    return found


@pytest.mark.parametrize(
    "words",
    [
        ["serve", "internvl2-1b", "--port", "0"],
        ["serve", "internvl2-1b", "--port", "0", "--idle", "10m"],
        ["calibrate", "internvl2-1b"],
        ["tune", "internvl2-1b", "--starts", "1"],
    ],
)
def test_from_the_command_to_the_child(words: list[str], stack: list[str]) -> None:
    main([*words, "--pretend", "--on", "1xrtx3060"])
    assert stack[-1] == "launch/engine/process.py"
    assert len(set(stack)) <= MOST_FILES, stack
    rooms = [file.partition("/")[0] for file in stack]
    first = rooms.index("launch")
    assert "cli" not in rooms[first:], stack
