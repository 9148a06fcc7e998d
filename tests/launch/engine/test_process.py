from __future__ import annotations

import pytest

from turbofit.launch.engine.process import command_text


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
