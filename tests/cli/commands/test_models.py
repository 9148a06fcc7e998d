"""``turbofit models`` as people type it."""

from __future__ import annotations

import pytest

from turbofit.cli.main import main


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
