"""``turbofit report`` lists what it can show; ``latest`` says which it is."""

from __future__ import annotations

from pathlib import Path

import pytest

import turbofit
from turbofit.cli.main import main
from turbofit.report.stored_documents import keep


def test_it_lists_and_latest_says_which(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report"]) == 0
    assert "nothing was planned" in capsys.readouterr().out
    keep(turbofit.plan("internvl2-1b", on="1xl4"), "plan")
    (state / "plans" / "broken.json").write_text("{")
    assert main(["report", "--md"]) == 0
    broken, kept = capsys.readouterr().out.splitlines()[2:4]
    assert "broken.json" in broken
    assert "InternVL2-1B on 1xl4" in kept
    (state / "plans" / "broken.json").unlink()
    assert main(["report", "latest"]) == 0
    assert f"latest is {state}" in capsys.readouterr().err
    assert main(["report", "--html", "page.html"]) == 2
