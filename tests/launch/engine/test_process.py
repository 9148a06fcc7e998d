from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.waiting import HANG
from turbofit.core.errors import LaunchError
from turbofit.launch.engine.process import EngineProcess, command_text


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["lmdeploy", "serve", "a model", "--tp", "2"], "lmdeploy serve 'a model' --tp 2"),
        (["x", "--api-keys", "k1", "k2", "--tp", "2"], "x --api-keys ... --tp 2"),
        (["x", "--api-keys=k1", "--api-key", "k2"], "x --api-keys --api-key ..."),
    ],
)
def test_a_command_is_shown_without_keys(words: list[str], text: str) -> None:
    assert command_text(words) == text


def test_no_engine_is_started_whose_log_cannot_be_written(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    with pytest.raises(LaunchError, match="log cannot be written"):
        EngineProcess(["touch", str(begun)], {}, tmp_path / "nothing" / "engine-0.log")
    assert not begun.exists()


def test_a_restart_goes_on_without_its_log_and_says_so(tmp_path: Path) -> None:
    log = tmp_path / "nothing" / "engine-0.log"
    process = EngineProcess(["echo", "hello"], {}, log, log_required=False)
    process.wait(HANG)
    assert process.poll() == 0
    assert process.finish(HANG) == [("hello", 1)]
    assert process.log_error == "No such file or directory"
    assert not log.parent.exists()
