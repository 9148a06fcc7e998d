"""`turbofit plan` and `predict`: what they print is what `report` prints again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from turbofit.cli.main import main
from turbofit.core.plan import Plan

Out = pytest.CaptureFixture[str]


def test_plan_predict_and_report_agree(capsys: Out, tmp_path: Path) -> None:
    words = ["internvl2-8b", "--on", "4xrtx3090", "--tp", "4", "--json"]
    assert main(["plan", *words]) == 0
    text = capsys.readouterr().out
    plan = Plan.from_json(text)
    assert (plan.tp, plan.fits) == (4, True)
    saved = tmp_path / "plan.json"
    saved.write_text(text)
    assert main(["report", str(saved), "--json"]) == 0
    assert capsys.readouterr().out == text
    assert main(["report", str(saved)]) == 0
    assert plan.verdict.split(":")[0] in capsys.readouterr().out
    assert main(["report", str(saved), "--md"]) == 0
    assert capsys.readouterr().out.startswith("# ")
    assert main(["predict", *words]) in (0, 3)
    assert Plan.from_json(capsys.readouterr().out).considered == ()


def test_options_of_one_machine_do_not_go_with_it(capsys) -> None:
    for option in (["--on", "1xl4"], ["--gpus", "0"], ["--rehearse"]):
        assert main(["plan", "internvl2-8b", "--cluster", "sim:1xl4", "--json", *option]) == 2
        assert option[0] in json.loads(capsys.readouterr().out)["error"]["message"]
