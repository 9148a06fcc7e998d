"""What a plan's gateway holds requests to, and what each engine has of the promise."""

from __future__ import annotations

import msgspec
import pytest
from msgspec.structs import replace

import turbofit
from tests.support.gateway import plan_for
from tests.support.plans import changed
from turbofit.core.plan import Plan
from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.limits.gate import UNSTATED, Cost, KvCache
from turbofit.serving.plan_gateway import bounds_of, make_gateway

URLS = ["http://127.0.0.1:1", "http://127.0.0.1:2"]


@pytest.fixture(scope="module")
def plan() -> Plan:
    return turbofit.plan("internvl2-8b-awq", on="rtx3090+rtx4080")


def test_gate_and_cache_count_only_where_the_plan_paid_less_and_it_may_run_out() -> None:
    paid = bounds_of(plan_for(units_per_forward=10**6))
    assert (paid.gate, paid.engines[0].kv) == (None, KvCache())
    plan = plan_for(units_per_forward=20)
    assert not plan.may_evict()
    assert (bounds_of(plan).gate, bounds_of(plan).engines[0].kv.tokens) == (20, UNSTATED)
    settings = msgspec.structs.replace(plan.engines[0].settings, max_batch_size=1024)
    more = bounds_of(changed(plan, settings=settings))
    assert (paid.answer_tokens, bounds_of(plan).answer_tokens, more.answer_tokens) == (0, 0, 1024)
    kv = KvCache(tokens=plan.engines[0].kv.tokens, longest=32768, block=64, ahead=2)
    assert more.engines[0].kv == kv


def test_engines_have_the_shares_of_their_cards(plan: Plan) -> None:
    gateway = make_gateway(plan, URLS, GatewayConfig())
    shares = [engine.share for engine in gateway.engines]
    assert shares == [group_plan.requests for group_plan in plan.engines]
    assert gateway.fleet.best(Cost()).share == max(shares)
    # Engines that were not planned take the same.
    for other, urls in ((plan, [*URLS, "http://127.0.0.1:3"]), (plan_for(), URLS)):
        gateway = make_gateway(other, urls, GatewayConfig())
        assert [engine.share for engine in gateway.engines] == [1.0] * len(urls)


def test_requests_are_held_to_the_poorest_card(plan: Plan) -> None:
    bounds = bounds_of(plan)
    longest, batches = zip(
        *((one.kv.longest_request_tokens, one.settings.max_batch_size) for one in plan.engines),
        strict=True,
    )
    assert (bounds.promise.context, bounds.limits.n) == (min(longest), min(batches))
    assert bounds.gate is None  # it is paid for on each card
    first, second = plan.engines
    poorer = replace(second, units_per_forward=20, requests=3)
    assert bounds_of(replace(plan, engines=(first, poorer))).gate == 20


def test_each_engine_has_its_own_gate_and_cache(plan: Plan) -> None:
    """All engines were held to the smallest cache and to the least units of any engine."""
    first, second = plan.engines
    poorer = replace(second, units_per_forward=20, kv=replace(second.kv, tokens=40_000))
    gateway = make_gateway(replace(plan, engines=(first, poorer)), URLS, GatewayConfig())
    one, two = gateway.engines
    assert (one.gate.units, two.gate.units) == (None, 20)
    assert (two.gate.kv.tokens, two.gate.kv.longest) == (40_000, 32_768)
    for engine in gateway.engines:
        engine.gate.take(Cost(units=13))
    large = Cost(units=13)
    assert (one.fits(large), two.fits(large)) == (True, False)
    richer = replace(first, units_per_forward=26)
    gateway = make_gateway(replace(plan, engines=(richer, poorer)), URLS, GatewayConfig())
    assert [engine.gate.units for engine in gateway.engines] == [26, 20]
    caches = [engine.gate.kv.tokens for engine in gateway.engines]
    assert caches == [richer.kv.tokens, poorer.kv.tokens]
