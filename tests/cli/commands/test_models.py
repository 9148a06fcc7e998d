"""What the models and cards are that have names."""

from __future__ import annotations

import json

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


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["4090"], {"rtx4090", "rtx4090-48g", "rtx4090d"}),
        (["RTX 3080"], {"rtx3080", "rtx3080-12g", "rtx3080ti"}),
        (["a100", "80gb"], {"a100-80g", "a100-pcie-80g"}),
        (["turing"], {"t4", "rtx2080ti", "rtx2080ti-22g"}),
    ],
)
def test_words_show_the_cards_that_have_them(
    words: list[str], names: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gpus", *words, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["gpus"]) == names


def test_a_card_without_a_preset_is_answered_as_by_a_plan(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["gpus", "titan", "rtx"]) == 2
    assert "titanrtx:total=" in capsys.readouterr().err
