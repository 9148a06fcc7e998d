"""A run before its first start."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.plans import plausible_plan
from turbofit.launch.engine.launches import Lmdeploy
from turbofit.launch.run import Run
from turbofit.launch.serve.config import ServeConfig
from turbofit.launch.serve.leases import Leases
from turbofit.planning import checks


@pytest.mark.parametrize("pretend", [False, True])
def test_what_a_launch_is_warned_of_is_said_unless_the_plan_says_it(
    pretend: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TURBOFIT_LEASES", str(tmp_path))
    monkeypatch.setattr(checks, "refuse", lambda _: ["of the plan", "of this launch"])
    plan, said = plausible_plan(warnings=("of the plan",)), list[str]()
    with Leases() as leases:
        config = ServeConfig(plan=plan, pretend=pretend)
        run = Run(config, leases, said.append, lmdeploy=Lmdeploy("0.18.0", ("never-run",)))
        run.plan = plan
        assert run.refuse() is plan
    assert said == ["warning: of this launch"]
