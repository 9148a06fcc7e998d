"""A compiler is found, and what it makes is there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from turbofit.core.process.compiler import cache_folder, compile_c, find_compiler, make_folder

Patch = pytest.MonkeyPatch


def test_cache_folder_follows_xdg(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("pretend") == tmp_path / "turbofit" / "pretend"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("images") == tmp_path / ".cache" / "turbofit" / "images"


def test_cc_is_a_command_with_words_where_it_is_there(tmp_path: Path, monkeypatch: Patch) -> None:
    for name in ("mine", "gcc"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "mine -pipe")
    assert find_compiler() == ["mine", "-pipe"]
    monkeypatch.setenv("CC", "gone -pipe")
    assert find_compiler() == [str(tmp_path / "gcc")]
    (tmp_path / "gcc").unlink()
    assert find_compiler() is None


def test_a_compilers_complaint_is_one_line() -> None:
    assert compile_c(["true"]) is None
    assert (
        compile_c(["sh", "-c", "echo 1; printf 'a\\nb: error: c\\nd' >&2; false"]) == "b: error: c"
    )


def test_a_folder_that_another_process_made_meanwhile_stays(tmp_path: Path) -> None:
    target = tmp_path / "cache" / "made"

    def fill(folder: Path) -> None:
        (folder / "file").write_text("ours")
        target.mkdir()
        (target / "file").write_text("theirs")

    make_folder(target, fill)
    assert (target / "file").read_text() == "theirs"
    assert list(target.parent.iterdir()) == [target]


def test_a_folder_that_cannot_be_filled_is_not_there(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "half").touch()
        raise ValueError(folder.parent)

    with pytest.raises(ValueError, match=str(tmp_path)):
        make_folder(tmp_path / "made", fill)
    assert list(tmp_path.iterdir()) == []
