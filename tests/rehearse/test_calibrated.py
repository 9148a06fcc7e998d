"""Pretend cards are charged with what a calibration has measured, as with the estimates."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from turbofit import api
from turbofit.core.machine import Calibration
from turbofit.core.plan import Plan
from turbofit.core.units import MIB
from turbofit.machine.source import machine_from
from turbofit.memory.calibrated import identity
from turbofit.rehearse.planned import charged


def plans(engine: str, context: int, buffers: int) -> tuple[Plan, Plan]:
    """Without and with a calibration, at the same ratio."""
    machine = machine_from("1xrtx3090")
    plan = api.plan("qwen2-vl-2b", on=machine, engine=engine, cache_max_entry_count=0.5)
    one = Calibration(
        model=identity(plan.model), engine=engine, engine_version=plan.engine.version,
        lmdeploy="0.18.0", gpus=(machine.gpus[0].name,), driver=str(machine.driver),
        communicator="nccl", when="2026-11-20T00:00:00+00:00", context=context * MIB,
        buffers=buffers * MIB,
    )  # fmt: skip
    known = replace(machine, calibrations=(one,))
    return plan, api.plan("qwen2-vl-2b", on=known, engine=engine, cache_max_entry_count=0.5)


@pytest.mark.parametrize(("context", "buffers"), [(-60, -38), (25, 140)])
def test_turbominds_twin_has_the_corrections(context: int, buffers: int) -> None:
    (before,), (after,) = (charged(plan).gpus for plan in plans("turbomind", context, buffers))
    assert after.used - before.used == context * MIB
    assert after.late - before.late == buffers * MIB


def test_no_twin_has_less_than_nothing() -> None:
    _, plan = plans("turbomind", -5000, -5000)
    (gpu,) = charged(plan).gpus
    assert gpu.used == gpu.late == 0


@pytest.mark.parametrize("buffers", [-20, 140])
def test_the_pytorch_engines_twin_has_them(buffers: int) -> None:
    before, after = (charged(plan).gpus[0] for plan in plans("pytorch", 0, buffers))
    assert after.late - before.late == buffers * MIB
