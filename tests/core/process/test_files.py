from __future__ import annotations

import os
from pathlib import Path

import pytest

from turbofit.core.errors import UsageError
from turbofit.core.process.files import write_atomic, write_output
from turbofit.core.process.state import new_path, state_dir


def test_the_umask_decides_about_a_new_file(tmp_path: Path):
    old = os.umask(0o027)
    try:
        write_atomic(tmp_path / "a", "x")
        write_atomic(tmp_path / "read by all", "x", mode=0o644)
        write_atomic(tmp_path / "private", "x", mode=0o600)
    finally:
        os.umask(old)
    assert [mode_of(tmp_path / name) for name in ("a", "read by all", "private")] == [
        0o640, 0o644, 0o600,
    ]  # fmt: skip


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o7777


@pytest.mark.parametrize("mode", [0o600, 0o664, 0o640])
def test_what_is_replaced_keeps_its_mode(tmp_path: Path, mode: int):
    target = tmp_path / "a"
    target.touch()
    target.chmod(mode)
    write_atomic(target, "new")
    assert mode_of(target) == mode


def test_nobody_sees_another_umask_meanwhile(tmp_path: Path, monkeypatch):
    """A thread that makes a file at that moment would make it for everybody."""
    monkeypatch.delattr("os.umask")
    write_atomic(tmp_path / "a", "x")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_what_is_replaced_keeps_its_owner_and_its_group(tmp_path: Path):
    target = tmp_path / "a"
    target.touch()
    os.chown(target, 1234, 4321)
    write_atomic(target, "new")
    assert (target.stat().st_uid, target.stat().st_gid) == (1234, 4321)


def test_a_group_that_cannot_be_kept_gives_its_rights_to_no_other(tmp_path: Path, monkeypatch):
    target = tmp_path / "a"
    target.touch()
    target.chmod(0o674)
    state = target.stat()
    theirs = os.stat_result([*state[:5], state.st_gid + 1, *state[6:]])

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.fchown", refuse)
    monkeypatch.setattr(Path, "stat", lambda self, **_: theirs)
    write_atomic(target, "new")
    monkeypatch.undo()
    assert mode_of(target) == 0o644


def test_a_file_system_without_modes_takes_a_file_and_keeps_no_other(tmp_path: Path, monkeypatch):
    """Of a FUSE mount, or a share of Windows, which refuses every chmod."""
    target = tmp_path / "a"
    target.write_text("old")

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.fchmod", refuse)
    monkeypatch.setattr("os.fchown", refuse)
    before = set(os.listdir("/proc/self/fd"))
    write_atomic(target, "new")
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["a"]
    assert set(os.listdir("/proc/self/fd")) == before


def test_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch):
    target = tmp_path / "a"
    target.write_text("old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(UsageError, match="No space left on device") as caught:
        write_atomic(target, "new")
    assert caught.value.hint
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_link_stays_a_link(tmp_path: Path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    write_atomic(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"


@pytest.mark.parametrize("where", ["missing/file", "."])
def test_a_place_that_cannot_be_written(tmp_path: Path, where: str):
    with pytest.raises(UsageError, match="cannot be written"):
        write_atomic(tmp_path / where, "x")


def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path):
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        for path in (pipe, link):
            write_output(str(path), "new")
            assert os.read(reader, 99) == b"new"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


def test_a_terminal_and_a_shells_pipe_are_written_to():
    """Neither `/dev/null` nor any device that a failure of this test would replace is used."""
    terminal, device = os.openpty()
    end, begin = os.pipe()
    try:
        write_output(os.ttyname(device), "new")
        assert os.read(terminal, 99) == b"new"
        write_output(f"/dev/fd/{begin}", "new")
        assert os.read(end, 99) == b"new"
    finally:
        for descriptor in (terminal, device, end, begin):
            os.close(descriptor)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path


def test_only_the_user_reads_it(home: Path) -> None:
    folder = state_dir("runs")
    assert folder == home / "turbofit" / "runs"
    assert folder.stat().st_mode & 0o77 == 0
    assert new_path("runs", "x", ".log").stat().st_mode & 0o77 == 0
    assert new_path("runs", "x").stat().st_mode & 0o77 == 0


def test_names_are_never_shared() -> None:
    assert len({new_path("crashes", "t", ".txt") for _ in range(5)}) == 5
    assert len({new_path("runs", "m") for _ in range(5)}) == 5


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
