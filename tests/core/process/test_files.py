from __future__ import annotations

import os
from pathlib import Path
from unittest.mock import Mock

import pytest

from turbofit.core.errors import UsageError
from turbofit.core.process.files import (
    new_path,
    private_folder,
    state_dir,
    write_atomic,
    write_output,
)


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def test_the_umask_decides_about_a_new_file_and_what_is_replaced_keeps_its_mode(
    tmp_path: Path, monkeypatch
):
    target, link = tmp_path / "a", tmp_path / "link"
    link.symlink_to(target)
    old = os.umask(0o027)
    try:
        # A thread that makes a file while another umask holds would make it for everybody.
        monkeypatch.delattr("os.umask")
        for name, mode in (("a", None), ("read by all", 0o644), ("private", 0o600)):
            write_atomic(tmp_path / name, "x", mode=mode)
            assert mode_of(tmp_path / name) == (mode or 0o640)
        for mode in (0o600, 0o664):
            target.chmod(mode)
            write_atomic(link, f"{mode}")
            assert mode_of(target) == mode
            assert (link.is_symlink(), target.read_text()) == (True, f"{mode}")
    finally:
        monkeypatch.undo()
        os.umask(old)


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
    monkeypatch.setattr("os.fchown", refuse)
    monkeypatch.setattr(Path, "stat", lambda self, **_: theirs)
    write_atomic(target, "new")
    monkeypatch.undo()
    assert mode_of(target) == 0o644


def refuse(*_):
    raise PermissionError(1, "Operation not permitted")


def test_a_file_system_without_modes_takes_a_file_and_keeps_no_other(tmp_path: Path, monkeypatch):
    """Of a FUSE mount, or a share of Windows, which refuses every chmod."""
    target = tmp_path / "a"
    target.write_text("old")
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
    monkeypatch.setattr("os.fsync", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(UsageError, match="No space left on device") as caught:
        write_atomic(target, "new")
    assert caught.value.hint
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]
    for place in (tmp_path / "missing/file", tmp_path):
        with pytest.raises(UsageError, match="cannot be written"):
            write_atomic(place, "x")


def test_a_pipe_a_terminal_and_a_shells_pipe_are_written_to_and_stay(tmp_path: Path):
    """Neither `/dev/null` nor any device that a failure of this test would replace is used."""
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    terminal, device = os.openpty()
    end, begin = os.pipe()
    try:
        for path, read in (
            (pipe, reader), (link, reader),
            (os.ttyname(device), terminal), (f"/dev/fd/{begin}", end),
        ):  # fmt: skip
            write_output(str(path), "new")
            assert os.read(read, 99) == b"new"
    finally:
        for descriptor in (reader, terminal, device, end, begin):
            os.close(descriptor)
    assert pipe.is_fifo()
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


def test_only_the_user_reads_a_folder_or_file_of_the_state(state: Path) -> None:
    folder = state_dir("runs")
    assert folder == state / "runs"
    for path in (folder, new_path("runs", "x", ".log"), new_path("runs", "x")):
        assert path.stat().st_mode & 0o77 == 0
    for ending in ("", ".txt"):
        assert len({new_path("runs", "m", ending) for _ in range(5)}) == 5


@pytest.mark.parametrize("chosen", ["", "state", "./state"])
def test_the_home_folder_without_an_absolute_path(
    chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative one would be another folder in each folder that a person works in."""
    monkeypatch.setenv("XDG_STATE_HOME", chosen)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert state_dir("runs") == tmp_path / ".local/state/turbofit/runs"


def test_a_private_folder_is_made_for_this_user_alone(tmp_path: Path):
    (tmp_path / "link").symlink_to("real")
    old = os.umask(0o002)
    try:
        made = private_folder(tmp_path / "link" / "turbofit" / "pretend")
    finally:
        os.umask(old)
    assert made == tmp_path.resolve() / "real" / "turbofit" / "pretend"
    assert {mode_of(path) for path in (made, made.parent, made.parent.parent)} == {0o700}
    with pytest.raises(FileNotFoundError):
        private_folder(made / "other", make=False)


@pytest.mark.parametrize(
    ("outer", "inner", "refused"),
    [
        (0o755, 0o755, ""),
        (0o1777, 0o700, ""),  # as /tmp
        (0o777, 0o700, "outer"),
        (0o775, 0o700, "outer"),  # the group is not this user's own
        (0o755, 0o1777, "inner"),  # others may put libraries in, though not replace them
    ],
)
def test_a_folder_that_others_can_write_is_not_private(
    outer: int, inner: int, refused: str, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr("grp.getgrgid", lambda _: Mock(gr_name="users", gr_mem=["other"]))
    folder = tmp_path / "outer" / "inner"
    folder.mkdir(parents=True)
    folder.chmod(inner)
    folder.parent.chmod(outer)
    if os.geteuid() == 0:
        os.chown(folder.parent, 0, 4321)
    if not refused:
        assert private_folder(folder) == folder.resolve()
        return
    with pytest.raises(PermissionError, match="others can write it") as caught:
        private_folder(folder)
    assert Path(caught.value.filename).name == refused


def test_a_group_of_this_user_alone_is_no_other(tmp_path: Path, monkeypatch):
    me = Mock(pw_name="me")
    monkeypatch.setattr("pwd.getpwuid", lambda _: me)
    monkeypatch.setattr("grp.getgrgid", lambda _: Mock(gr_name="me", gr_mem=["me"]))
    folder = tmp_path / "umask-002"
    folder.mkdir()
    folder.chmod(0o775)
    if os.geteuid() == 0:
        os.chown(folder, 0, 4321)
    assert private_folder(folder) == folder.resolve()
    monkeypatch.setattr("grp.getgrgid", lambda _: Mock(gr_name="me", gr_mem=["me", "other"]))
    with pytest.raises(PermissionError):
        private_folder(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_folder_of_another_user_is_not_private(tmp_path: Path):
    (tmp_path / "theirs").mkdir()
    os.chown(tmp_path / "theirs", 65534, 65534)
    with pytest.raises(PermissionError, match="others can write it"):
        private_folder(tmp_path / "theirs" / "turbofit")
