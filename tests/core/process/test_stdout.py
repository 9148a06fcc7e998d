from __future__ import annotations

import sys

from turbofit.core.process.stdout import kept_stdout, stdout


def test_a_closed_stdout_stays_closed_in_the_block(monkeypatch, capsys) -> None:
    whole = sys.stdout
    with kept_stdout(), kept_stdout():
        assert stdout() is whole
        assert sys.stdout is sys.stderr
    monkeypatch.setattr(sys, "stdout", None)
    with kept_stdout():
        with kept_stdout():
            assert stdout() is None
            sys.stdout.write("a library's line\n")
        assert stdout() is None
    assert stdout() is None
    assert capsys.readouterr() == ("", "a library's line\n")
