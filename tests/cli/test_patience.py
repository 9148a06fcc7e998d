"""What takes more than a second says so, on a terminal only."""

from __future__ import annotations

import sys
import threading

import pytest

from tests.waiting import HANG
from turbofit.cli import output


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "_PATIENCE", 0.01)


def test_said_on_a_terminal(hurried: None, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    said, note = threading.Event(), output.note

    def heard(text: str) -> None:
        note(text)
        said.set()

    monkeypatch.setattr(output, "note", heard)
    with output.patience("planning"):
        assert said.wait(HANG)
    assert capsys.readouterr().err == "planning …\n"


def test_not_where_it_was_quick(monkeypatch, capsys) -> None:
    monkeypatch.setattr(output, "_PATIENCE", HANG)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with output.patience("planning"):
        pass
    assert capsys.readouterr().err == ""


def test_not_into_a_file(monkeypatch, capsys) -> None:
    begun: list[object] = []
    monkeypatch.setattr(output, "Timer", lambda *words: begun.append(words))
    with output.patience("planning"):
        pass
    assert begun == []
    assert capsys.readouterr().err == ""
