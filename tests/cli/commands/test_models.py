"""``turbofit models`` as people type it."""

from __future__ import annotations

import pytest

from turbofit.cli.main import main


def test_words_choose_and_hub_ids_are_in_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "internvl3-8b"]) == 0
    told = capsys.readouterr().out
    assert "OpenGVLab" not in told
    assert max(map(len, told.splitlines())) <= 80
    assert main(["models", "internvl3-8b", "--md"]) == 0
    assert "OpenGVLab/InternVL3-8B" in capsys.readouterr().out
