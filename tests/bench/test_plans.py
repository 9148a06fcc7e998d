"""Plans keep their promises: no engine without code, nothing to change unnamed, no bare bytes."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

import turbofit
from bench.plans.__main__ import judged
from bench.plans.properties import of_plan, of_refusal
from bench.plans.requests import Request, requests
from tests.sweep import part
from turbofit.core.errors import UsageError

pytestmark = pytest.mark.slow

SEED, COUNT = 22, part(40, 2)


@pytest.mark.parametrize("case", list(requests(COUNT, SEED)), ids=str)
def test_a_random_request(case: Request) -> None:
    _, broken = judged(case)
    assert broken == []


def test_what_breaks_a_property_is_told() -> None:
    plan = turbofit.plan("internvl2-8b", on="1xrtx3090")
    assert list(of_plan(plan)) == []
    bare = replace(plan, verdict="short by 1234567890")
    assert list(of_plan(bare)) == ["a number without a unit: short by 1234567890"]
    stuck = replace(plan, fits=False, remedies=())
    assert len(list(of_plan(stuck))) == 1
    newer = replace(plan.machine.gpus[0], compute_capability=(10, 3))
    other = replace(plan, machine=replace(plan.machine, gpus=(newer,)))
    assert [text.partition(" for")[0] for text in of_plan(other)] == ["TurboMind has no code"]
    assert list(of_refusal(UsageError("no", hint="")))
