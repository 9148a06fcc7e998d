"""`turbofit plan MODEL --cluster …` over the real rooms below it."""

from __future__ import annotations

import json

import pytest

from turbofit.cli.main import main
from turbofit.core.cluster import ClusterPlan


def test_a_simulated_cluster_is_told_by_kind(capsys: pytest.CaptureFixture[str]) -> None:
    spec = "sim:4xrtx3090@100/8xh100@2/1xt4@7"
    assert main(["plan", "internvl2-8b", "--cluster", spec, "--concurrency", "800"]) == 0
    text = capsys.readouterr().out
    assert "simulated: machines of presets or of snapshots" in text
    assert "on 102 of 109 nodes" in text.replace("\n", " ")
    assert "97 more" in text
    assert len(text.splitlines()) < 120
    assert main(["plan", "internvl2-8b", "--cluster", spec, "--md"]) == 0
    assert "| nodes |" in capsys.readouterr().out


def test_json_is_the_whole_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "internvl2-2b", "--cluster", "sim:4xrtx3090/1xl4", "--json"]) == 0
    plan = ClusterPlan.from_json(capsys.readouterr().out)
    assert [one.name for one in plan.nodes] == ["sim-1", "sim-2"]
    assert all(one.plan is not None and one.plan.commands for one in plan.nodes)


@pytest.mark.parametrize("option", [["--on", "1xl4"], ["--gpus", "0"], ["--rehearse"]])
def test_options_of_one_machine_do_not_go_with_it(
    option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "internvl2-8b", "--cluster", "sim:1xl4", "--json", *option]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert option[0] in error["message"]
