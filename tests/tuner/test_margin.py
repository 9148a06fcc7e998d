"""What stays free on each GPU: less, the more is known, and never less than a person asked for."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from turbofit import api
from turbofit.core.machine import Calibration, Machine
from turbofit.core.plan import Plan
from turbofit.core.units import GIB, MIB
from turbofit.machine.spec import parse_spec
from turbofit.memory.calibrated import identity
from turbofit.tuner.resolved_request import Margin

MODEL = "qwen2-vl-2b"


def calibrated(spread: int, on: str = "1xrtx3090", engine: str = "turbomind") -> Machine:
    """A machine on which the model was measured as it is estimated."""
    machine = parse_spec(on)
    plan = api.plan(MODEL, on=machine, engine=engine)
    one = Calibration(
        model=identity(plan.model), engine=engine, engine_version=plan.engine.version,
        lmdeploy="0.18.0", gpus=(machine.gpus[0].name,), driver=str(machine.driver),
        communicator="nccl", when="2026-11-20T00:00:00+00:00", context=0, buffers=0,
        spread=spread,
    )  # fmt: skip
    return replace(machine, calibrations=(one,))


def margin(plan: Plan) -> int:
    (left,) = {gpu.margin for gpu in plan.gpus}
    return left


def said(plan: Plan) -> list[str]:
    return [reason for reason in plan.reasons if reason.startswith("margin")]


@pytest.mark.parametrize("engine", ["turbomind", "pytorch"])
def test_what_was_measured_needs_less(engine: str) -> None:
    plain = api.plan(MODEL, on="1xrtx3090", engine=engine)
    exact = api.plan(MODEL, on=calibrated(0, engine=engine), engine=engine)
    spread = api.plan(MODEL, on=calibrated(50 * MIB, engine=engine), engine=engine)
    assert [margin(plan) for plan in (plain, spread, exact)] == [256 * MIB, 114 * MIB, 64 * MIB]
    assert plain.kv.tokens < spread.kv.tokens < exact.kv.tokens
    assert said(plain) == []
    (why,) = said(spread)
    assert "64 MiB, and the 50.0 MiB by which what was measured here differed" in why


@pytest.mark.parametrize("engine", ["turbomind", "pytorch"])
def test_what_was_measured_is_believed_of_no_fuller_card(engine: str) -> None:
    def plan(taken: int, **changed: str) -> Plan:
        machine = calibrated(0, engine=engine)
        card, (one,) = machine.gpus[0], machine.calibrations
        full = replace(card, used=card.used + taken, free=card.free - taken)
        known = replace(one, free=card.free, **changed)
        on = replace(machine, gpus=(full,), calibrations=(known,))
        return api.plan(MODEL, on=on, engine=engine)

    assert margin(plan(32 * MIB)) == 64 * MIB  # a desktop never holds the same
    fuller = plan(33 * MIB)
    assert margin(fuller) == 256 * MIB
    (why,) = (one for one in fuller.reasons if one.startswith("estimates stand"))
    assert "were free on each GPU then" in why
    for changed in ({"driver": "1.2.3"}, {"engine": "another"}, {"engine_version": "0.1"}):
        other = plan(33 * MIB, **changed)
        assert not [one for one in other.reasons if one.startswith("estimates stand")]


def test_a_spread_larger_than_the_margin_adds_nothing_to_it() -> None:
    assert margin(api.plan(MODEL, on=calibrated(2 * GIB))) == 256 * MIB


def test_what_a_person_asks_for_stays() -> None:
    machine = calibrated(0)
    assert margin(api.plan(MODEL, on=machine, margin=300 * MIB)) == 300 * MIB
    assert margin(api.plan(MODEL, on=machine, margin="2%")) == int(machine.gpus[0].total * 0.02)
    budget = api.plan(MODEL, on=machine, budget=12 * GIB)
    (gpu,) = budget.gpus
    assert gpu.peak - gpu.used + 64 * MIB <= 12 * GIB


def test_a_rehearsed_plan_keeps_three_eighths() -> None:
    (gpu,) = parse_spec("1xrtx3090").gpus
    (large,) = parse_spec("1xa100-80g").gpus
    for card in (gpu, large):
        assert Margin(rehearsed=True).of(card) == int(Margin().of(card) * 3 / 8)
    assert Margin(bytes=5, rehearsed=True).of(gpu) == 5
    assert Margin(rehearsed=True).saved(gpu) == 32 * MIB
