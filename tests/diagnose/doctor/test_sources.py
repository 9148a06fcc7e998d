"""What is read outside Python."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.waiting import HANG
from turbofit.diagnose.doctor import sources as sources_module
from turbofit.diagnose.doctor.sources import Sources


@pytest.mark.parametrize(
    ("script", "answer"),
    [
        ("#!/bin/sh\necho sm_80 sm_90\n", ["sm_80", "sm_90"]),
        ("#!/bin/sh\nkill -STOP $$\n", None),
        ("#!/bin/sh\nexit 1\n", None),
    ],
)
def test_torch_is_asked_in_a_child_with_a_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, answer: list[str] | None
) -> None:
    python = tmp_path / "python"
    python.write_text(script)
    python.chmod(0o755)
    monkeypatch.setattr(sources_module.sys, "executable", str(python))
    monkeypatch.setattr(sources_module, "CHILD_SECONDS", 0.1 if "STOP" in script else HANG)
    assert Sources().torch_architectures() == answer
