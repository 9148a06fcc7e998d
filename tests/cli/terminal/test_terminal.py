from __future__ import annotations

import io
from collections.abc import Mapping

import pytest

from turbofit.cli.terminal import progress_display as terminal


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environ", "redraws", "colour"),
    [
        ({"TERM": "xterm"}, True, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, True, False),
        ({"TERM": "dumb"}, False, False),
    ],
)
def test_what_a_terminal_takes(environ: Mapping[str, str], redraws: bool, colour: bool) -> None:
    assert terminal.redraws(Terminal(), environ) is redraws
    assert terminal.takes_colour(environ) is colour
    assert not terminal.redraws(io.StringIO(), environ)


def test_the_width_is_what_columns_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "132")
    assert terminal.width() == 132
    for nothing in ("", "0", "wide"):
        monkeypatch.setenv("COLUMNS", nothing)
        assert terminal.width(io.StringIO()) == 80
