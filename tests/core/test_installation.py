"""What installs an extra; nothing that no index has is ever named."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from turbofit.core import installation
from turbofit.core.errors import PackageError
from turbofit.core.installation import image_library, install_command

REPO = Path(__file__).resolve().parents[2]


@dataclass
class _Installed:
    """In the place of importlib.metadata's distribution; ``origin`` is its direct_url.json."""

    origin: str | None

    def read_text(self, name: str) -> str | None:
        return self.origin if name == "direct_url.json" else None


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> _Installed:
    made = _Installed(None)
    monkeypatch.setattr("importlib.metadata.distribution", lambda _: made)
    return made


@pytest.mark.parametrize(
    ("origin", "words"),
    [
        ({"url": "PLACE/clone", "dir_info": {}}, ["HERE/clone[ray]"]),
        # What is gone, or no clone, helps nobody.
        ({"url": "PLACE/gone", "dir_info": {"editable": True}}, ["-e", "CODE[ray]"]),
        ({"url": "https://h/t.whl", "archive_info": {}}, ["-e", "CODE[ray]"]),
        ("no document", ["-e", "CODE[ray]"]),
    ],
)
def test_what_turbofit_was_installed_from_is_named(
    origin: object,
    words: list[str],
    installed: _Installed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "clone").mkdir()
    for name in ("clone/pyproject.toml", "clone/README.md"):
        (tmp_path / name).touch()
    installed.origin = json.dumps(origin).replace("PLACE", tmp_path.as_uri())
    wanted = [word.replace("HERE", str(tmp_path)).replace("CODE", str(REPO)) for word in words]
    assert shlex.split(install_command("ray")) == ["pip", "install", *wanted]
    assert shlex.split(install_command("ray", upgrade=True)) == ["pip", "install", "-U", *wanted]
    monkeypatch.setattr(installation, "_CODE", tmp_path)
    installed.origin = None
    assert install_command("ray") == "pip install 'turbofit[ray]'"


@pytest.mark.parametrize(
    ("origin", "words"),
    [
        ({"url": "PLACE", "dir_info": {"editable": True}}, ["HERE"]),
        ("an index", ["--no-binary", "turbofit", "turbofit"]),
    ],
)
def test_a_library_that_is_missing_has_the_line_that_makes_it(
    origin: object,
    words: list[str],
    installed: _Installed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sysconfig.get_platform", lambda: "linux-x86_64")
    monkeypatch.setattr(installation, "_LIBRARY", tmp_path / "libpixels.so")
    (tmp_path / "pixels.c").touch()
    for name in ("pyproject.toml", "README.md"):
        (tmp_path / name).touch()
    monkeypatch.setattr(installation, "_CODE", tmp_path / "site-packages")
    installed.origin = json.dumps(origin).replace("PLACE", tmp_path.as_uri())
    with pytest.raises(PackageError, match="cannot be read: No such file") as caught:
        image_library()
    wanted = [word.replace("HERE", str(tmp_path)) for word in words]
    line = caught.value.hint.partition("; then ")[2]
    assert shlex.split(line) == ["pip", "install", "--force-reinstall", "--no-deps", *wanted]
    monkeypatch.setattr("sysconfig.get_platform", lambda: "linux-aarch64")
    with pytest.raises(PackageError, match="no Linux on x86-64") as caught:
        image_library()
    assert caught.value.hint == ""


#: A line that says of an index what is not there yet.
_LATER = re.compile("not yet|in no package index yet|没有")


def test_nothing_that_is_said_needs_an_index() -> None:
    named = re.compile(r"turbofit\[|pip install -?-?\w* ?turbofit\b")
    pages = [
        *(REPO / "turbofit").rglob("*.py"),
        *(REPO / "turbofit").rglob("*.js"),
        *(REPO / "presets").rglob("*.yaml"),
        *(REPO / "docs").rglob("*.md"),
        *REPO.glob("README*.md"),
        REPO / "Dockerfile",
    ]
    needing = [
        f"{path.relative_to(REPO)}: {line.strip()}"
        for path in pages
        for line in path.read_text(encoding="utf-8").splitlines()
        if named.search(line) and "/turbofit[" not in line and not _LATER.search(line)
    ]
    assert not needing
