"""Engines of unequal cards behind one gateway: shares, and one gate that none exceeds."""

from __future__ import annotations

from collections import Counter

import pytest
from msgspec.structs import replace

import turbofit
from tests.support.gateway import plan_for
from turbofit.core.plan import GroupPlan, Plan
from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.limits.gate import Cost
from turbofit.gateway.limits.request_limits import bounds_of
from turbofit.gateway.routing.engines import Fleet, RoutedEngine
from turbofit.gateway.server import make_gateway

URLS = ["http://127.0.0.1:1", "http://127.0.0.1:2"]


@pytest.fixture(scope="module")
def plan() -> Plan:
    return turbofit.plan("internvl2-8b-awq", on="rtx3090+rtx4080")


@pytest.mark.parametrize(
    ("shares", "wanted"), [((3.25, 4.75), (3, 5)), ((2.0, 6.0), (2, 6)), ((1.0, 1.0), (4, 4))]
)
def test_eight_requests_go_as_the_plan_counts_them(shares, wanted) -> None:
    found = [RoutedEngine(i, URLS[i], share) for i, share in enumerate(shares)]
    for _ in range(8):
        Fleet(found).best(Cost()).outstanding += 1
    assert tuple(engine.outstanding for engine in found) == wanted


def test_alone_a_request_goes_to_the_engine_of_the_larger_share(plan: Plan) -> None:
    gateway = make_gateway(plan, URLS, GatewayConfig())
    shares = [engine.share for engine in gateway.engines]
    assert shares == [group_plan.at_once for group_plan in plan.by_group]
    assert gateway.fleet.best(Cost()).share == max(shares)


def test_engines_that_were_not_planned_take_the_same(plan: Plan) -> None:
    three = make_gateway(plan, [*URLS, "http://127.0.0.1:3"], GatewayConfig())
    assert Counter(engine.share for engine in three.engines) == {1.0: 3}
    equal = make_gateway(plan_for(), URLS, GatewayConfig())
    assert {engine.share for engine in equal.engines} == {1.0}


def test_what_is_paid_for_on_each_card_needs_no_gate(plan: Plan) -> None:
    assert len({group_plan.units_per_forward for group_plan in plan.by_group}) == 1
    assert bounds_of(plan).gate is None


def test_the_gate_is_that_of_the_card_that_paid_least(plan: Plan) -> None:
    first, second = plan.by_group
    poorer = (
        first,
        GroupPlan(settings=second.settings, kv=second.kv, units_per_forward=20, at_once=3),
    )
    assert bounds_of(replace(plan, by_group=poorer)).gate == 20


def test_requests_are_held_to_what_the_smallest_cache_promises(plan: Plan) -> None:
    least = min(group_plan.kv.longest_request_tokens for group_plan in plan.by_group)
    assert bounds_of(plan).longest_request_tokens == least
    assert bounds_of(plan).limits.n == min(
        group_plan.settings.max_batch_size for group_plan in plan.by_group
    )
