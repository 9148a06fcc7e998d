from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from turbofit.core.errors import PackageError
from turbofit.core.installation import install_command
from turbofit.launch.engine import launches as environment
from turbofit.launch.engine.launches import Lmdeploy, find_lmdeploy


def test_without_lmdeploy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_of_interpreter", lambda: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(PackageError) as caught:
        find_lmdeploy()
    assert caught.value.exit_code == 7
    assert install_command("lmdeploy") in caught.value.hint


@pytest.mark.parametrize(
    ("version", "refused", "warned"),
    [("0.15.2", True, False), ("0.16.0", False, True), ("0.17.2", False, True),
     ("0.18.0", False, False), ("0.19.0rc1", False, True), ("1.0", False, True)],
)  # fmt: skip
def test_versions(
    version: str, refused: bool, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "_of_interpreter", lambda: Lmdeploy(version, ("x",)))
    if refused:
        with pytest.raises(PackageError, match="older"):
            find_lmdeploy()
    else:
        assert (find_lmdeploy().warning is not None) == warned


def test_the_one_on_path_is_asked_through_its_own_interpreter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "lmdeploy-0.17.1.dist-info"
    site.mkdir()
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: lmdeploy\nVersion: 0.17.1\n")
    script = tmp_path / "lmdeploy"
    script.write_text(f"#!{sys.executable}\n")
    script.chmod(0o755)
    monkeypatch.setattr(environment, "_of_interpreter", lambda: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = find_lmdeploy()
    assert (found.version, found.grammars) == ("0.17.1", find_spec("xgrammar") is not None)
    (tmp_path / "xgrammar.py").touch()
    assert find_lmdeploy().grammars
    assert (found.argv[0], found.argv[-1]) == (sys.executable, "lmdeploy")
    script.write_text("no interpreter\n")
    with pytest.raises(PackageError):
        find_lmdeploy()
