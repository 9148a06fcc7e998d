"""``calibrate --pretend --clock N`` finds a table that no formula makes, under LMDeploy itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.support.serving import needs
from turbofit.cli.main import main
from turbofit.core.machine import MeasuredSteps
from turbofit.core.plan import EnginePlan, Plan
from turbofit.rehearsal.pretend.clock import StepTable
from turbofit.serving.engine import pretend_launch

pytestmark = [pytest.mark.lmdeploy, pytest.mark.exhaustive]
needs("lmdeploy", "fastapi", "torchvision")

#: What the host may hold up of the points: the others must all be right.
_LEAST_POINTS = 10


def test_it_finds_the_table_that_the_clock_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[StepTable] = []
    plain = pretend_launch.step_table

    def strange(plan: Plan, engine: EnginePlan) -> StepTable:
        """Half the bandwidth; from 32 tokens of a forward on, a step of half as much again."""
        table = plain(plan, engine)
        forward = [(2 if n < 32 else 3) * seconds for n, seconds in enumerate(table.forward)]
        image = [1.7 * seconds for seconds in table.image]
        given.append(StepTable(forward, image, pair=3 * table.pair, context=2 * table.context))
        return given[-1]

    monkeypatch.setattr(pretend_launch, "step_table", strange)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("TURBOFIT_LEASES", str(tmp_path / "leases"))
    words = (
        "calibrate", "internvl2-1b", "--on", "1xrtx3090", "--pretend", "--clock", "6", "--engine",
        "turbomind", "--max-batch-size", "32", "--max-prefill-token-num", "2048", "--json",
    )  # fmt: skip
    assert main(list(words)) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    steps = msgspec.convert(document["calibrations"][0]["steps"], MeasuredSteps)
    assert len(steps.points) >= _LEAST_POINTS, steps.left_out
    for point in steps.points:
        assert point.seconds == pytest.approx(given[0].seconds(point), rel=0.03), point
