from __future__ import annotations

import os
from pathlib import Path

import pytest

from turbofit.core.errors import UsageError
from turbofit.core.process.files import write_atomic, write_output


def test_writes_text_and_bytes(tmp_path: Path):
    write_atomic(tmp_path / "a", "täxt")
    write_atomic(str(tmp_path / "b"), b"\x00\xff")
    assert (tmp_path / "a").read_text() == "täxt"
    assert (tmp_path / "b").read_bytes() == b"\x00\xff"
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_mode_is_lowered_by_the_umask(tmp_path: Path):
    old = os.umask(0o027)
    try:
        write_atomic(tmp_path / "a", "x", mode=0o666)
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


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
        for one in (terminal, device, end, begin):
            os.close(one)
