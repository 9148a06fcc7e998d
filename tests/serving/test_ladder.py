"""The ladder of a start, and what a next start has learned of it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import msgspec
import pytest
from msgspec.structs import replace

from tests.support.plans import changed, plausible_plan
from turbofit import api
from turbofit.cli.main import main
from turbofit.core.engine_end import End, Phase
from turbofit.core.plan import Plan
from turbofit.core.promise import Promise
from turbofit.core.units import GIB, MIB
from turbofit.planning.plan import plan as plan_of
from turbofit.planning.request import PlanRequest
from turbofit.serving.engine.launches import Launch
from turbofit.serving.engine.supervised_engine import Supervision
from turbofit.serving.ladder import learned_file, recall, rungs
from turbofit.serving.proved import Learned
from turbofit.serving.start import _step_down
from turbofit.serving.supervisor import Supervisor

pytestmark = pytest.mark.usefixtures("state")


def died(phase: Phase, **facts: Any) -> End:
    return End(kind=facts.pop("kind", "out_of_memory"), phase=phase, **facts)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return api.plan("internvl2-8b", on="1xrtx3090")


def steps(ended: End, plan: Plan, **fixed: Any) -> list[str]:
    return [next(iter(rung.changes)) for rung in rungs(ended, plan, fixed)]


@pytest.mark.parametrize(
    ("ended", "wanted"),
    [
        (died("weights"), ["margin"]),
        (died("weights", missing=MIB), ["margin"]),
        (died("cache"), ["margin", "max_prefill_token_num"]),
        (died("warm-up"), ["max_prefill_token_num", "margin"]),
        (died("warm-up", missing=MIB), ["margin", "max_prefill_token_num"]),
        (died("warm-up", kind="hang"), ["max_prefill_token_num"]),
        (died("vision"), ["margin", "max_dynamic_patch", "max_prefill_token_num"]),
        (died("text"), ["margin", "max_prefill_token_num"]),
        (died("host"), []),
    ],
)
def test_each_phase_has_its_setting(ended: End, wanted: list[str], plan: Plan) -> None:
    assert steps(ended, plan) == wanted


@pytest.mark.parametrize("phase", get_args(Phase))
def test_whatever_a_log_shows_has_a_rung(phase: Phase, plan: Plan) -> None:
    """A log that shows no forward may still show that the engine served, or was checked."""
    wanted = [] if phase == "host" else ["margin"]
    assert [step for step in steps(died(phase), plan) if step == "margin"] == wanted


@pytest.mark.parametrize("phase", ["weights", "cache", "warm-up", "vision"])
def test_the_new_plan_leaves_what_was_missing(phase: str, plan: Plan) -> None:
    """With the forecast's error counted, the margin is left in truth."""
    missing = 100 * MIB
    rung = next(r for r in rungs(died(phase, missing=missing), plan, {}) if "margin" in r.changes)
    (gpu,) = plan.ledgers
    pool = next(t.bytes for t in gpu.terms if t.term == "pool_warmup")
    usable = gpu.total - gpu.reserved
    held = {
        "weights": gpu.load_peak, "cache": gpu.steady - pool, "warm-up": gpu.steady,
        "vision": gpu.peak,
    }[phase]  # fmt: skip
    wrong = missing + usable - held
    assert 0 <= rung.changes["margin"] - (gpu.margin + wrong) < MIB
    again = api.plan("internvl2-8b", on="1xrtx3090", **rung.changes)
    assert not again.fits or again.ledgers[0].headroom - wrong >= gpu.margin


def test_what_the_user_set_stays(plan: Plan) -> None:
    assert steps(died("vision"), plan, max_dynamic_patch=12) == ["margin", "max_prefill_token_num"]
    assert steps(died("text"), plan, max_prefill_token_num=4096) == ["margin"]
    fixed = {"cache_max_entry_count": 0.8, "tp": 1, "max_prefill_token_num": 4096}
    assert steps(died("text"), plan, **fixed) == []
    assert steps(died("vision"), plan, image_size=(448, 448), **fixed) == []


def test_the_ends_of_the_settings(plan: Plan) -> None:
    settings = msgspec.structs.replace(plan.engines[0].settings, max_prefill_token_num=512)
    limits = msgspec.structs.replace(plan.promise.limits, max_dynamic_patch=1)
    assert steps(died("vision"), changed(plan, settings=settings, limits=limits)) == ["margin"]
    assert "max_pixels" in steps(died("vision"), api.plan("qwen2-vl-7b", on="1xrtx3090"))
    text = api.plan("qwen2.5-7b", on="1xrtx3090")
    assert steps(died("vision"), text) == ["margin", "max_prefill_token_num"]
    two = plausible_plan(gpus=2, tp=1)  # fewer engines for the host's memory
    (rung,) = rungs(died("host", kind="host_memory"), two, {})
    assert rung.changes == {"replicas": two.replicas - 1, "tp": 1}
    assert steps(died("host"), two, replicas=2) == []


def test_kept_for_the_same_kind_of_start_only(state: Path, monkeypatch) -> None:
    plan = plausible_plan(gpus=1, tp=1)
    file = learned_file(plan, "0.18.0", pretend=False)

    def known(plan: Plan = plan, lmdeploy: str = "0.18.0", *, pretend: bool = False) -> Any:
        return recall(plan, lmdeploy, pretend=pretend)

    def learn() -> None:
        file.write(Learned(changes={"margin": 5}))

    assert known() == {}
    learn()
    assert known() == {"margin": 5}
    other = msgspec.structs.replace(plan.model, name="other", hub_id="a/other")
    assert known(lmdeploy="0.18.1") == known(pretend=True) == {}
    assert known(plausible_plan(gpus=2, tp=1)) == {}
    assert known(msgspec.structs.replace(plan, model=other)) == {}
    assert file.forget()
    assert not file.forget()
    assert known() == {}
    for text in ("", "{", "[]", '{"schema": "x", "changes": {"a": 1}}'):
        learn()
        (path,) = (state / "learned").glob("*/changes-*")
        path.write_text(text)
        assert known() == {}
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/none")  # which cannot be written
    learn()
    assert known() == {}
    assert not file.forget()


# Engines on unequal cards: each is launched, watched and mended with its own settings.


MODEL, ON = "internvl2-8b-awq", "rtx3090+rtx4080"


@pytest.fixture(scope="module")
def pair() -> Plan:
    return api.plan(MODEL, on=ON)


def test_each_engine_is_watched_with_its_own_forecast(pair: Plan, tmp_path: Path) -> None:
    launches = [
        Launch(engine.command, ("true",), group=group) for group, engine in enumerate(pair.engines)
    ]
    server = Supervisor(pair, launches, tmp_path, Supervision(lambda _: None))
    for engine, group_plan in zip(server.engines, pair.engines, strict=True):
        assert engine.planned == group_plan


@pytest.mark.parametrize("number", [0, 1])
def test_the_margin_is_of_the_engine_that_died_and_both_are_planned_again(pair, number) -> None:
    (gpu,) = pair.engines[number].ledgers
    steps = rungs(replace(died("vision", missing=100 * MIB), group=number), pair, {})
    rung = next(step for step in steps if "margin" in step.changes)
    left = gpu.total - gpu.reserved - gpu.peak
    assert 0 <= rung.changes["margin"] - (gpu.margin + left + 100 * MIB) < MIB
    end = replace(died("warm-up", missing=200 * MIB), group=number)
    again = api.plan(MODEL, on=ON, **next(iter(rungs(end, pair, {}))).changes)
    for after, before in zip(again.engines, pair.engines, strict=True):
        assert after.settings.cache_max_entry_count < before.settings.cache_max_entry_count


def test_a_smaller_prefill_gives_no_engine_more_than_it_had() -> None:
    on = "rtx3090:free=23GiB+rtx3090:free=18GiB"
    plan = api.plan("internvl2-8b", on=on, concurrency=8, context=8192)
    first, second = plan.engines
    settings = replace(second.settings, max_prefill_token_num=2048)
    plan = replace(plan, engines=(first, replace(second, settings=settings)))
    sizes = [group_plan.settings.max_prefill_token_num for group_plan in plan.engines]
    assert len(set(sizes)) == 2
    for number in range(2):
        steps = list(rungs(replace(died("warm-up"), group=number), plan, {}))
        rung = next(r for r in steps if "max_prefill_token_num" in r.changes)
        assert rung.changes["max_prefill_token_num"] == min(sizes[number] // 2, *sizes)


def test_one_engine_less_is_another_plan_though_its_settings_are_the_same() -> None:
    make = partial(api.plan, "internvl2-2b", on="2xrtx3090")
    two, config = make(replicas=2, tp=1), SimpleNamespace(plan=None)
    planner = SimpleNamespace(make=lambda changes, _promise: make(**changes))
    run: Any = SimpleNamespace(config=config, planner=planner, fixed={}, changes={})
    step = _step_down(run, two, died("host", kind="host_memory", group=1), 1)
    assert step is not None
    assert (step[0].replicas, step[0].engines[0].settings) == (1, two.engines[0].settings)


def test_a_saved_plan_is_launched_with_the_settings_of_each(pair, tmp_path, capsys) -> None:
    path = tmp_path / "pair.json"
    path.write_text(pair.to_json())
    assert main(["serve", "--plan", str(path), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for group_plan in pair.engines:
        assert f"--cache-max-entry-count {group_plan.settings.cache_max_entry_count:.3f}" in shown


def test_a_step_down_keeps_the_promise_or_says_that_none_does() -> None:
    """A smaller cache shortened the context, or half the image limit was promised, in silence."""
    request = PlanRequest.of(model="internvl2-8b", on="1xrtx3090")
    first, said, asked = plan_of(request), list[str](), list[Promise | None]()

    def make(changes: dict[str, Any], promise: Promise | None) -> Plan:
        asked.append(promise)
        return plan_of(request.changed(**changes), promise=promise)

    config, planner = SimpleNamespace(plan=None), SimpleNamespace(make=make)
    run: Any = SimpleNamespace(
        config=config, planner=planner, fixed={}, changes={}, say=said.append
    )
    step = _step_down(run, first, died("vision", missing=256 * MIB), 1)
    assert step is not None
    assert step[0].promise == replace(first.promise, requests=step[0].promise.requests)
    assert (asked, said) == ([first.promise], [])
    # A cache that held no more than the context holds less now.
    request = PlanRequest.of(model="internvl2-8b", on="1xl4:free=19GiB")
    first = plan_of(request)
    step = _step_down(run, first, died("weights", missing=GIB), 1)
    assert step is not None
    assert not step[0].promise.keeps(first.promise, first.model.image_rule)
    assert asked[-1] is None
    assert said[-1].startswith("ladder: no settings keep the promise")
