from __future__ import annotations

from pathlib import Path

import pytest

from turbofit.pretend import build as build_module
from turbofit.pretend.build import build, cache_folder
from turbofit.pretend.libraries import LIBRARIES, PretendError

pytestmark = pytest.mark.slow


def test_builds_once_and_by_content(libraries: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler() -> list[str]:
        raise AssertionError("compiled again")

    monkeypatch.setattr(build_module, "compiler", no_compiler)
    assert build(libraries.parent) == libraries
    assert {p.name for p in libraries.iterdir()} >= {library.name for library in LIBRARIES}


def test_changed_source_builds_anew(
    libraries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = tmp_path / "csrc"
    sources.mkdir()
    for path in build_module.SOURCES.glob("*.[ch]"):
        (sources / path.name).write_bytes(path.read_bytes())
    (sources / "cublas.c").open("a").write("\n/* changed */\n")
    monkeypatch.setattr(build_module, "SOURCES", sources)
    compiled: list[str] = []
    monkeypatch.setattr(build_module, "_compile", lambda one, *_: compiled.append(one.name))
    assert build(tmp_path).name != libraries.name
    assert compiled == [library.name for library in LIBRARIES]


def test_no_compiler_is_one_line_and_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(PretendError, match="no C compiler") as caught:
        build(tmp_path)
    assert "install gcc" in caught.value.hint
    assert caught.value.exit_code == 7


def test_compiler_error_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "csrc"
    sources.mkdir()
    for path in build_module.SOURCES.glob("*.[ch]"):
        (sources / path.name).write_text("#error broken\n")
    monkeypatch.setattr(build_module, "SOURCES", sources)
    with pytest.raises(PretendError, match="could not build") as caught:
        build(tmp_path)
    assert "\n" not in caught.value.message
    assert not list(tmp_path.glob("building-*"))


def test_cache_folder_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "turbofit" / "pretend"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "turbofit" / "pretend"
