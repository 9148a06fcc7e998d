"""An engine's process: its first start needs a log."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import waiting
from turbofit.core.errors import LaunchError
from turbofit.serving.engine.process import EngineProcess


def test_a_first_start_needs_its_log_and_a_restart_goes_on_without(tmp_path: Path) -> None:
    begun, log = tmp_path / "begun", tmp_path / "nothing" / "engine-0.log"
    with pytest.raises(LaunchError, match="log cannot be written"):
        EngineProcess(["touch", str(begun)], {}, log)
    assert not begun.exists()
    process = EngineProcess(["echo", "hello"], {}, log, log_required=False)
    process.wait(waiting.HANG)
    assert process.poll() == 0
    assert process.finish(waiting.HANG) == [("hello", 1)]
    assert process.log_error == "No such file or directory"
    assert not log.parent.exists()
