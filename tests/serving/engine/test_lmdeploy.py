"""The LMDeploy that is found beside turbofit, and what is said where none is."""

from __future__ import annotations

import importlib.metadata

import pytest

from turbofit.cli.main import main
from turbofit.core.errors import PackageError
from turbofit.core.installation import install_command, without_gpu
from turbofit.serving.engine.lmdeploy import find_lmdeploy


@pytest.mark.parametrize(
    ("version", "refused", "warned"),
    [("0.15.2", True, False), ("0.16.0", False, True), ("0.18.0", False, False),
     ("0.19.0rc1", False, True), ("1.0", False, True)],
)  # fmt: skip
def test_versions(version: str, refused: bool, warned: bool, monkeypatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    if refused:
        with pytest.raises(PackageError, match="too old"):
            find_lmdeploy()
    else:
        assert (find_lmdeploy().warning is not None) == warned


def test_without_lmdeploy_the_install_command_is_told(monkeypatch, capsys) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "lmdeploy":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert main(["serve", "internvl2-1b", "--pretend", "--on", "1xrtx3060"]) == 7
    hint = f"hint: install it with {install_command('lmdeploy')}, or turbofit where LMDeploy is"
    assert without_gpu().startswith("; for pretend GPUs alone ")  # of a clone
    assert f"{hint}{without_gpu()}\n" in capsys.readouterr().err
