"""Engines on unequal cards: each is launched, watched and mended with its own settings."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from turbofit import api
from turbofit.cli.main import main
from turbofit.core.plan import Plan
from turbofit.core.rehearsal import End
from turbofit.core.units import MIB
from turbofit.launch.engine.launches import Launch
from turbofit.launch.run import _engines
from turbofit.launch.serve.ladder import rungs
from turbofit.launch.serve.supervisor import Supervisor

MODEL, ON = "internvl2-8b-awq", "rtx3090+rtx4080"
FULLER = ("internvl2-8b", "rtx3090:free=23GiB+rtx3090:free=18GiB")


@pytest.fixture(scope="module")
def plan() -> Plan:
    return api.plan(MODEL, on=ON)


def died(phase: str, missing: int | None = None) -> End:
    return End(kind="out_of_memory", phase=phase, missing=missing)


def test_each_engine_is_watched_with_its_own_forecast(plan: Plan, tmp_path: Path) -> None:
    launches = [Launch(command, ("true",)) for command in plan.commands]
    server = Supervisor(plan, launches, tmp_path, lambda _: None)
    for engine, group_plan in zip(server.engines, plan.by_group, strict=True):
        assert engine._plan.settings == group_plan.settings
        assert engine._plan.kv == group_plan.kv
        assert [gpu.index for gpu in engine._plan.gpus] == list(plan.parallel.groups[engine.group])


@pytest.mark.parametrize("number", [0, 1])
def test_the_margin_is_of_the_engine_that_died_and_both_are_planned_again(plan, number) -> None:
    view = plan.of_group(number)
    (gpu,) = view.gpus
    rung = next(r for r in rungs(died("vision", 100 * MIB), view, {}) if "margin" in r.changes)
    left = gpu.total - gpu.reserved - gpu.peak
    assert 0 <= rung.changes["margin"] - (gpu.margin + left + 100 * MIB) < MIB
    first = next(iter(rungs(died("warm-up", 200 * MIB), view, {})))
    again = api.plan(MODEL, on=ON, **first.changes)
    for after, before in zip(again.by_group, plan.by_group, strict=True):
        assert after.settings.cache_max_entry_count < before.settings.cache_max_entry_count


def test_a_smaller_prefill_gives_no_engine_more_than_it_had() -> None:
    plan = api.plan(FULLER[0], on=FULLER[1], concurrency=8, context=8192)
    first, second = plan.by_group
    settings = replace(second.settings, max_prefill_token_num=2048)
    plan = replace(plan, by_group=(first, replace(second, settings=settings)))
    sizes = [group_plan.settings.max_prefill_token_num for group_plan in plan.by_group]
    assert len(set(sizes)) == 2
    for number in range(2):
        steps = list(rungs(died("warm-up"), plan.of_group(number), {}))
        rung = next(r for r in steps if "max_prefill_token_num" in r.changes)
        assert rung.changes["max_prefill_token_num"] == min(sizes[number] // 2, *sizes)


def test_another_ratio_of_one_engine_is_another_plan(plan: Plan) -> None:
    group_plan = plan.by_group[0]
    less = replace(group_plan, settings=replace(group_plan.settings, cache_max_entry_count=0.5))
    assert _engines(replace(plan, by_group=(less, plan.by_group[1]))) != _engines(plan)
    assert _engines(api.plan(MODEL, on=ON)) == _engines(plan)


def test_a_saved_plan_is_launched_with_the_settings_of_each(plan, tmp_path, capsys) -> None:
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    base = ["serve", "--plan", str(path), "--dry-run", "--", "--quant-policy"]
    assert main([*base, "0"]) == 0
    shown = capsys.readouterr().out
    for group_plan in plan.by_group:
        assert f"--cache-max-entry-count {group_plan.settings.cache_max_entry_count:.3f}" in shown
    assert main([*base, "8"]) == 2
    assert "the plan was made for 0\n" in capsys.readouterr().err
