"""Plans that are rehearsed before they are believed."""

from __future__ import annotations

from functools import partial
from typing import Any

import msgspec
import pytest

from bench.common.plans import plausible_plan
from turbofit import api
from turbofit.core.errors import PackageError
from turbofit.core.plan import Death, Plan, Rehearsal, RehearsedCache
from turbofit.launch.planner import Planner

CACHE = RehearsedCache(free=(), region=(), object_size=None, slab_size=None, tokens=None)


def rehearsed(outcome: Any, *, fits: bool) -> Plan:
    death = Death(phase="warm-up", where="somewhere", asked=2, left=1)
    rehearsal = Rehearsal(
        outcome=outcome, seconds=1.0, engine_version="0.18.0", cases=(), cache=CACHE, death=death
    )
    return msgspec.structs.replace(plausible_plan(), fits=fits, rehearsal=rehearsal)


def planner(said: list[str], seen: Plan | Exception, **options: Any) -> Planner:
    def plan_with(**keywords: Any) -> Plan:
        if not keywords.get("rehearse"):
            return plausible_plan()
        if isinstance(seen, Exception):
            raise seen
        return seen

    return Planner(plan_with, {}, None, said.append, rehearse=True, **options)


def test_what_a_rehearsal_shows_counts() -> None:
    said: list[str] = []
    served = rehearsed("served", fits=True)
    assert planner(said, served).make({}) is served
    dead = rehearsed("out_of_memory", fits=False)
    assert planner(said, dead).make({}) is dead
    assert all(text.startswith("rehearsing") for text in said)


@pytest.mark.parametrize(
    "seen", [rehearsed("failed", fits=False), PackageError("no compiler", hint="install one")]
)
def test_a_rehearsal_that_cannot_be_held_costs_nothing_but_itself(seen: Plan | Exception) -> None:
    said: list[str] = []
    assert planner(said, seen).make({}).fits
    assert said[-1].startswith("not rehearsed: ")


def test_pretend_plans_are_neither_measured_nor_reserved() -> None:
    one = Planner(partial(api.plan, "internvl2-1b"), {"on": "1xrtx3060"}, None, print,
                  rehearse=False)  # fmt: skip
    plan = one.make({"max_prefill_token_num": 2048})
    assert plan.settings.max_prefill_token_num == 2048
    assert one.settle(plan, {}) is plan
    one.take(plan)


@pytest.mark.slow
@pytest.mark.lmdeploy
def test_the_real_engine_rehearses() -> None:
    pytest.importorskip("lmdeploy")
    said: list[str] = []
    one = Planner(partial(api.plan, "internvl2-1b"), {"on": "1xrtx3060"}, None, said.append,
                  rehearse=True)  # fmt: skip
    plan = one.make({})
    assert plan.fits
    assert plan.rehearsal is not None
    assert plan.rehearsal.outcome == "served"
    assert said == ["rehearsing: LMDeploy's own engine on pretend GPUs, some seconds"]
