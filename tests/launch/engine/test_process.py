from __future__ import annotations

from pathlib import Path

import pytest

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
