"""``turbofit models`` as people type it."""

from __future__ import annotations

import pytest

from turbofit.cli.main import main


def test_a_word_shows_the_models_that_have_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "awq"]) == 0
    heading, columns, *rows = capsys.readouterr().out.splitlines()
    assert heading == "Models"
    assert "hub id" in columns
    assert len(rows) > 5
    assert all("awq" in row.lower() for row in rows)
