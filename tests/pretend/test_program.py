"""Which Python a command runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from turbofit.core.errors import UsageError
from turbofit.pretend import run
from turbofit.pretend.run import site_of


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A Python whose torch is a CUDA build, as far as its files say."""
    library = tmp_path / "site" / "torch" / "lib"
    library.mkdir(parents=True)
    (library / "libtorch_cuda.so").touch()
    (tmp_path / "site" / "torch" / "__init__.py").touch()
    script = tmp_path / "bin" / "python3"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / "site"} exec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return script


def test_a_python_is_asked(python: Path) -> None:
    assert site_of([str(python), "train.py"]) == python.parents[1] / "site"


def test_a_script_names_its_python(python: Path) -> None:
    for first in (f"#!{python}\n", f"#!/usr/bin/env {python}\n"):
        script = python.with_name("lmdeploy")
        script.write_text(f"{first}pass\n")
        script.chmod(0o755)
        assert site_of([str(script), "serve"]) == python.parents[1] / "site"


def test_of_anything_else_it_is_this_one(
    python: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(run, "cuda_site", lambda: tmp_path)
    assert site_of(["sh", "-c", "true"]) == tmp_path
    assert site_of(["no-such-command"]) == tmp_path
    assert site_of(["sh", "-c", "true"], str(python)) == python.parents[1] / "site"


def test_cpu_torch_wants_nothing(python: Path) -> None:
    (python.parents[1] / "site" / "torch" / "lib" / "libtorch_cuda.so").unlink()
    assert site_of([str(python)]) is None


def test_no_such_python() -> None:
    with pytest.raises(UsageError, match="no Python"):
        site_of(["sh"], "/no/python")
