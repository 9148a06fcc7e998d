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


@pytest.mark.parametrize("columns", [80, 120, 200])
def test_no_line_is_wider_than_the_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("turbofit.cli.terminal.progress_display.is_terminal", lambda _: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["models"]) == 0
    told = capsys.readouterr()
    lines = told.out.partition("Not planned for")[0].splitlines()
    assert max(map(len, lines)) <= columns
    assert ("hub id" in lines[1]) is ("hub ids are left out" not in told.err)
    assert ("hub id" in lines[1]) is (columns == 200)
