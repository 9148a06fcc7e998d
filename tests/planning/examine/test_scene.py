"""What the checks read of this machine and this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.waiting import HANG
from turbofit.planning.examine import scene
from turbofit.planning.examine.scene import Sources


@pytest.mark.parametrize(
    ("script", "answer"),
    [("echo sm_80 sm_90", ["sm_80", "sm_90"]), ("kill -STOP $$", None), ("exit 1", None)],
)
def test_torch_is_asked_in_a_child_with_a_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, answer: list[str] | None
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(scene.sys, "executable", str(python))
    monkeypatch.setattr(scene, "CHILD_SECONDS", 0.1 if "STOP" in script else HANG)
    assert Sources().torch_architectures() == answer
