"""What takes more than a second says so, on a terminal only."""

from __future__ import annotations

import sys
import time

import pytest

from turbofit.cli import output


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "_PATIENCE", 0.01)


def test_said_on_a_terminal(hurried: None, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with output.patience("planning"):
        time.sleep(0.2)
    assert capsys.readouterr().err == "planning …\n"


def test_not_where_it_was_quick(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with output.patience("planning"):
        pass
    assert capsys.readouterr().err == ""


def test_not_into_a_file(hurried: None, capsys) -> None:
    with output.patience("planning"):
        time.sleep(0.05)
    assert capsys.readouterr().err == ""
