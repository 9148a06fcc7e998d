from __future__ import annotations

from pathlib import Path

import pytest

from turbofit.core.process.state import new_file, new_folder, state_dir


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path


def test_only_the_user_reads_it(home: Path) -> None:
    folder = state_dir("runs")
    assert folder == home / "turbofit" / "runs"
    assert folder.stat().st_mode & 0o77 == 0
    assert new_file("runs", "x", ".log").stat().st_mode & 0o77 == 0
    assert new_folder("runs", "x").stat().st_mode & 0o77 == 0


def test_names_are_never_shared() -> None:
    assert len({new_file("crashes", "t", ".txt") for _ in range(5)}) == 5
    assert len({new_folder("runs", "m") for _ in range(5)}) == 5


@pytest.mark.parametrize("chosen", ["", "state", "./state"])
def test_the_home_folder_without_an_absolute_path(
    chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative one would be another folder in each folder that a person works in."""
    monkeypatch.setenv("XDG_STATE_HOME", chosen)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert state_dir("runs") == tmp_path / ".local/state/turbofit/runs"


def test_a_folder_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null")
    with pytest.raises(OSError, match="/dev/null"):
        state_dir("runs")
