"""What installs an extra, from where turbofit came; nothing that no index has is ever named."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from turbofit.core import installation
from turbofit.core.installation import install_command

REPO = Path(__file__).resolve().parents[2]

METADATA = (
    "click>=8.2",
    'cramjam>=2.9; extra == "lmdeploy"',
    'lmdeploy<0.19,>=0.16; extra == "lmdeploy"',
    'turbofit[gateway]; extra == "lmdeploy"',
    'aiohttp>=3.12; extra == "gateway"',
    'uvloop>=0.21; (sys_platform != "win32") and extra == "gateway"',
    'transformers[serving]<6,>=5.17; extra == "fallback"',
    'turbofit[fallback,lmdeploy]; extra == "all"',
)


class _Installed:
    """A distribution as importlib.metadata gives it."""

    requires = METADATA

    def __init__(self, origin: Any) -> None:
        self._origin = origin

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        if isinstance(self._origin, str | None):
            return self._origin
        return json.dumps(self._origin)


@pytest.fixture
def came_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Sets where turbofit was installed from; its code then lies in no clone."""
    site = tmp_path / "site-packages" / "turbofit" / "core"
    monkeypatch.setattr(installation, "__file__", str(site / "installation.py"))

    def install(origin: Any, *there: str) -> None:
        monkeypatch.setattr(installation, "_distribution", lambda: _Installed(origin))

        def version(name: str) -> str:
            from importlib.metadata import PackageNotFoundError

            if name in there:
                return "1"
            raise PackageNotFoundError(name)

        monkeypatch.setattr("importlib.metadata.version", version)

    return install


def test_code_of_a_clone_names_the_clone() -> None:
    """These tests run from one, whether it is installed or on PYTHONPATH."""
    words = shlex.split(install_command("lmdeploy"))
    assert words[-1] == f"{REPO}[lmdeploy]"
    assert words[:2] == ["pip", "install"]


def test_a_folder_and_a_wheel_are_named_while_there(came_from: Any, tmp_path: Path) -> None:
    clone, wheel = tmp_path / "my clone", tmp_path / "turbofit-0.1.0-py3-none-any.whl"
    clone.mkdir()
    (clone / "pyproject.toml").touch()
    wheel.touch()
    came_from({"url": clone.as_uri(), "dir_info": {}})
    assert shlex.split(install_command("parquet")) == ["pip", "install", f"{clone}[parquet]"]
    came_from({"url": wheel.as_uri(), "archive_info": {"hash": "sha256=0"}})
    assert shlex.split(install_command("parquet")) == ["pip", "install", f"{wheel}[parquet]"]
    wheel.unlink()
    assert shlex.split(install_command("lmdeploy"))[2:] == [
        "cramjam>=2.9", "lmdeploy<0.19,>=0.16", "aiohttp>=3.12", "uvloop>=0.21",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("origin", "word"),
    [
        (
            {"url": "https://git.example/turbofit",
             "vcs_info": {"vcs": "git", "commit_id": "0a1", "requested_revision": "main"}},
            "turbofit[ray] @ git+https://git.example/turbofit@main",
        ),
        (
            {"url": "https://git.example/turbofit", "vcs_info": {"vcs": "git", "commit_id": "0a1"}},
            "turbofit[ray] @ git+https://git.example/turbofit@0a1",
        ),
        (
            {"url": "https://files.example/turbofit-0.1.0.tar.gz", "archive_info": {}},
            "turbofit[ray] @ https://files.example/turbofit-0.1.0.tar.gz",
        ),
    ],
)  # fmt: skip
def test_a_repository_and_an_address_are_named(came_from: Any, origin: Any, word: str) -> None:
    came_from(origin)
    assert shlex.split(install_command("ray")) == ["pip", "install", word]


@pytest.mark.parametrize("origin", [None, "", "{", "[]", {}])
def test_without_an_origin_the_packages_that_lack_are_named(came_from: Any, origin: Any) -> None:
    came_from(origin, "cramjam", "aiohttp", "uvloop")
    assert shlex.split(install_command("lmdeploy")) == ["pip", "install", "lmdeploy<0.19,>=0.16"]
    assert "transformers[serving]<6,>=5.17" in shlex.split(install_command("all"))
    everything = shlex.split(install_command("lmdeploy", upgrade=True))
    assert everything[:4] == ["pip", "install", "-U", "cramjam>=2.9"]
    assert "lmdeploy<0.19,>=0.16" in everything


def test_nothing_that_is_said_needs_an_index() -> None:
    """Whoever registered the name there would get everybody who pastes it."""
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
        if named.search(line) and "/turbofit[" not in line
    ]
    assert not needing
