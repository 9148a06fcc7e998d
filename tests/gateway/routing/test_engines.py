"""Which engine is next, what each has of the promise, and when the first one is expected."""

from __future__ import annotations

import time

import pytest
from msgspec.structs import replace

import turbofit
from tests.support.gateway import (
    plan_for,
)
from turbofit.core.plan import Plan
from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.limits.gate import Cost, Gate
from turbofit.gateway.limits.request_limits import bounds_of
from turbofit.gateway.routing.engines import (
    Fleet,
    RoutedEngine,
    Turn,
)
from turbofit.gateway.server import make_gateway


def test_the_engine_that_one_more_request_fills_least_is_next() -> None:
    three = [RoutedEngine(i, "http://x", share, gate=Gate(5)) for i, share in enumerate((1, 1, 2))]
    fleet = Fleet(three)
    for _ in range(8):
        fleet.best(Cost()).outstanding += 1
    assert [engine.outstanding for engine in three] == [2, 2, 4], "by their shares"
    three[2].up = False
    assert fleet.best(Cost()) is three[0], "of equals the first"
    three[0].gate.counted = 5
    assert fleet.best(Cost()) is three[1], "the fewest units"
    three[0].up = False
    assert fleet.best(Cost(units=6)) is None, "it has no room"
    turn = Turn("a", together=2, alone=False)
    three[1].turns["its place"] = turn
    another, few = Turn("b", together=2, alone=False), Turn("c", together=1, alone=False)
    best = [fleet.best(Cost(), each) for each in (None, another, few)]
    assert (best, fleet.open) == ([three[1], three[1], None], 1)
    turn.together = 1
    assert fleet.best(Cost(), another) is None
    turn.alone = True
    assert fleet.best(Cost()) is None


def test_who_finds_no_engine_is_told_when_the_first_one_is_expected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    slow, fast = (RoutedEngine(i, "http://x") for i in range(2))
    fleet = Fleet([slow, fast])
    slow.start_seconds, fast.start_seconds = 200.0, 28.0
    assert fleet.retry_seconds == 5, "none has ended"
    slow.note_death()
    assert fleet.retry_seconds == 60, "no client waits longer"
    fast.note_death()
    assert fleet.retry_seconds == 30
    clock[0] += 29.5
    assert fleet.retry_seconds == 1
    clock[0] += 1
    assert fleet.retry_seconds == 60, "it is late, and the other one is expected later"
    slow.start_seconds = 1.0
    assert fleet.retry_seconds == 5, "both are late"
    fast.succeeded()
    assert fast.start_seconds == 30.5
    fast.note_death()
    fast.rested = True
    clock[0] += 600
    fast.succeeded()
    assert fast.start_seconds == 30.5, "it was left alone"


URLS = ["http://127.0.0.1:1", "http://127.0.0.1:2"]


@pytest.fixture(scope="module")
def plan() -> Plan:
    return turbofit.plan("internvl2-8b-awq", on="rtx3090+rtx4080")


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
