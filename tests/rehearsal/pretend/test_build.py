"""The pretend libraries are built once, whole, and for their user alone."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from turbofit.rehearsal.pretend import build as build_module
from turbofit.rehearsal.pretend.build import build
from turbofit.rehearsal.pretend.libraries import (
    LIBRARIES,
    PretendError,
)

Patch = pytest.MonkeyPatch
pytestmark = pytest.mark.slow


def test_builds_once_and_by_content(libraries: Path, monkeypatch: Patch) -> None:
    def no_compiler() -> list[str]:
        raise AssertionError("compiled again")

    monkeypatch.setattr(build_module, "compiler", no_compiler)
    assert build(libraries.parent) == libraries
    assert {p.name for p in libraries.iterdir()} >= LIBRARIES.keys()


def test_no_compiler_and_its_error_are_one_line(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(PretendError, match="no C compiler") as caught:
        build(tmp_path)
    assert "install gcc" in caught.value.hint
    assert caught.value.exit_code == 7
    monkeypatch.undo()
    sources = shutil.copytree(build_module.SOURCES, tmp_path / "csrc")
    for path in sources.glob("*.[ch]"):
        path.write_text("#error broken\n")
    monkeypatch.setattr(build_module, "SOURCES", sources)
    with pytest.raises(PretendError, match="could not build") as caught:
        build(tmp_path)
    assert "\n" not in caught.value.message
    assert not list(tmp_path.glob("building-*"))


@pytest.fixture
def copy(libraries: Path, tmp_path: Path) -> Path:
    """The libraries in a folder of the test."""
    return shutil.copytree(libraries, tmp_path / libraries.name, symlinks=True)


@pytest.mark.parametrize("name", ["libcuda.so.1", "SHA256"])
def test_a_damaged_library_is_built_anew(
    name: str, copy: Path, libraries: Path, monkeypatch: Patch
) -> None:
    os.truncate(copy / name, 8)
    monkeypatch.setattr(
        build_module, "_compile", lambda one, _, folder, *__: shutil.copy(libraries / one, folder)
    )
    assert build(copy.parent) == copy
    assert (copy / name).read_bytes() == (libraries / name).read_bytes()
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_libraries_that_others_can_write_are_refused(copy: Path) -> None:
    copy.chmod(0o777)
    with pytest.raises(
        PretendError, match=f"cannot be kept: {copy}: others can write it"
    ) as caught:
        build(copy.parent)
    assert "XDG_STATE_HOME" in caught.value.hint
