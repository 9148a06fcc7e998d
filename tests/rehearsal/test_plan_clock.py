"""The table of a clock is the plan's own step, and there is none where no speed is known."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

import turbofit
from turbofit.core.plan import Plan
from turbofit.memory.engines import engine_of
from turbofit.planning.speed import group_rates, rates
from turbofit.rehearsal.plan_clock import ClockChoice, clock_for, step_table


def plan_of(model: str, on: str, **options: object) -> Plan:
    return turbofit.plan(model, on=on, engine="turbomind", **options)


@pytest.mark.parametrize(
    ("model", "on", "tp"),
    [("internvl2-2b", "1xrtx3090", 1), ("qwen2-vl-2b", "1xrtx3090", 1), ("llama-2-7b", "2xl4", 2)],
)
def test_the_table_has_the_seconds_of_the_plan(model: str, on: str, tp: int) -> None:
    plan = plan_of(model, on, tp=tp)
    table, engine = step_table(plan, plan.engines[0]), engine_of(plan)
    gpus = list(plan.machine.gpus)[:tp]
    group = group_rates(plan.model, plan.engines[0].settings, plan.machine, gpus, engine)
    most = engine.forward_tokens(plan.engines[0].settings)
    assert len(table.forward) == most + 1
    for tokens, pairs, cached in ((1, 0, 999), (16, 0, 5000), (most, 0.5 * most**2, 0), (77, 9, 8)):
        seconds = table.forward[tokens] + pairs * table.pair + cached * table.context
        assert seconds == pytest.approx(
            group.seconds(rates(), tokens, pairs=pairs, cached=cached), rel=1e-9
        )
    units = plan.promise.limits.units_per_request
    assert len(table.image) == max(units, plan.engines[0].units_per_forward) + 1
    assert table.image[units] == pytest.approx(group.tower_seconds(units), rel=1e-9)


def test_there_is_a_clock_where_the_speed_is_known() -> None:
    plan = plan_of("internvl2-2b", "1xrtx3090")
    assert clock_for(plan, 4.0) == ClockChoice(4.0, plan.throughput.surety.word)
    assert clock_for(plan, 4.0).words.endswith(", 4 times slower than life")
    assert clock_for(plan, 1.0).words == f"time by forecast ({plan.throughput.surety.word})"


def test_it_says_why_there_is_none() -> None:
    plan = plan_of("internvl2-2b", "1xrtx3090")
    assert clock_for(plan, 0.0).words == "no clock: --clock 0"
    other = replace(plan, backend=replace(plan.backend, name="pytorch"))
    assert clock_for(other, 1.0).words == (
        "no clock: forwards of pytorch are not read, as TurboMind's are"
    )
    none = clock_for(turbofit.plan("qwen3-30b-a3b", on="8xv100-16g", engine="turbomind"), 1.0)
    assert none.factor == 0.0
    assert "experts with turbomind on cards before Ampere" in none.words
