"""Engines on unequal cards: their settings, their one promise, and their shares of requests."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest
from msgspec.structs import replace

import turbofit
from tests.planning.conftest import keeps_promises, random_request, with_used
from tests.sweep import sweep
from turbofit.core.errors import UsageError
from turbofit.core.plan import Plan
from turbofit.core.units import MIB
from turbofit.machine.source import machine_from
from turbofit.memory.engines import LMDEPLOY, engine_named
from turbofit.planning.choose import plan_of
from turbofit.planning.resolved_request import ResolvedRequest
from turbofit.planning.search.evaluate import evaluate, evenly, share_out
from turbofit.planning.search.search import search
from turbofit.planning.search.shapes import (
    PREFILL_SIZES,
    Shape,
    dtype_for,
)
from turbofit.planning.search.sizing import SearchState
from turbofit.planning.speed import Speed

pytestmark = pytest.mark.slow

#: A machine, a model, and KV tokens of all engines when all ran the settings of the tightest card.
GROWN = [
    ("rtx3090+rtx4080", "internvl2-8b-awq", 190_976),
    ("2xrtx3090+1xl4:free=12GiB", "internvl2-2b", 415_296),
    ("a100-80g+rtx3090+l4", "qwen2-vl-7b", 437_760),
    ("rtx3090:free=23GiB+rtx3090:free=18GiB", "internvl2-8b", 47_616),
]


@pytest.mark.parametrize(("on", "model", "before"), GROWN)
def test_each_card_holds_more_than_under_common_settings_and_one_promise_stands(
    on: str, model: str, before: int
) -> None:
    plan = turbofit.plan(model, on=on, tp=1, concurrency=8, context=8192)
    assert plan.fits
    assert plan.kv_tokens > before
    assert plan.kv_tokens == sum(own.kv.tokens for own in plan.engines)
    weakest = min(plan.engines, key=lambda engine: engine.kv.tokens)
    assert weakest.kv.tokens == min(own.kv.tokens for own in plan.engines)
    assert plan.promise.context == weakest.settings.session_len
    for own in plan.engines:
        same = replace(
            own.settings,
            cache_max_entry_count=weakest.settings.cache_max_entry_count,
            max_prefill_token_num=weakest.settings.max_prefill_token_num,
            max_batch_size=weakest.settings.max_batch_size,
        )
        assert same == weakest.settings
        assert own.kv.tokens >= plan.promise.context
        assert own.settings.max_batch_size >= max(plan.promise.limits.n, own.requests)
    assert plan.promise.limits.n == min(own.settings.max_batch_size for own in plan.engines)
    assert sum(own.requests for own in plan.engines) == pytest.approx(8, abs=0.01)


@pytest.mark.parametrize(
    ("name", "value"),
    [("cache_max_entry_count", 0.5), ("max_prefill_token_num", 2048), ("max_batch_size", 12),
     ("session_len", 9000), ("quant_policy", 8)],
)  # fmt: skip
def test_what_the_user_sets_holds_for_every_engine(name: str, value: object) -> None:
    plan = turbofit.plan("internvl2-8b-awq", on="rtx3090+rtx4080", **{name: value})
    assert plan.fits
    assert [getattr(own.settings, name) for own in plan.engines] == [value, value]


def test_a_group_sees_its_own_plan_and_counts_by_its_own_share() -> None:
    plan = turbofit.plan("internvl2-8b-awq", on="rtx3090+rtx4080")
    for number, own in enumerate(plan.engines):
        assert tuple(ledger.index for ledger in own.ledgers) == own.gpus == plan.groups[number]
        command = own.command
        assert command.env["CUDA_VISIBLE_DEVICES"] == str(number)
        ratio = command.argv[command.argv.index("--cache-max-entry-count") + 1]
        assert ratio == f"{own.settings.cache_max_entry_count:.3f}"
    row = plan.considered[0]
    assert row.why_not == ""
    batches = [own.settings.max_batch_size for own in plan.engines]
    assert [one["max_batch_size"] for one in row.settings["engines"]] == batches


def random_mixed(seed: int) -> ResolvedRequest:
    """Two or three kinds of card, partly full."""
    rng = random.Random(seed)
    known = ["rtx3090", "rtx4090", "l4", "a100-40g", "rtx4080", "l40s"]
    cards = rng.sample(known, rng.choice([2, 3]))
    machine = machine_from("+".join(f"{rng.choice([1, 1, 2])}x{card}" for card in cards))
    used = [rng.choice([0, 0, 300, 1500, 4000]) * MIB for _ in machine.gpus]
    context = rng.random() < 0.75
    request = random_request(rng, context=context, machine=with_used(machine, used))
    return replace(request, workload=replace(request.workload, queue_images=None))


SEEDS = sweep(range(40), 20)


@pytest.mark.parametrize("name", LMDEPLOY)
def test_own_settings_are_never_worse_than_common_ones(name: str) -> None:
    assert sum(own_settings_compared(name, seed) for seed in SEEDS) >= len(SEEDS)


def own_settings_compared(name: str, seed: int) -> int:
    """Put each evaluation of its own settings beside common ones; return how many there were."""
    request, engine, compared = random_mixed(seed), engine_named(name), 0
    if request.workload.context is None:  # the longest that each shape holds is no one context
        request = replace(request, workload=replace(request.workload, context=4096))
    try:
        found = search(request, engine)
    except UsageError:
        return 0
    for one in found.evaluations:
        if len(one.parts) == 1 or not one.fits or one.shape.units_per_forward is not None:
            continue
        groups = one.shape.groups
        if (
            one.shape.image_limit != request.requested_image_limit
            or len({len(g) for g in groups}) > 1
        ):
            continue
        gpus = [request.machine.gpu(index) for group in groups for index in group]
        compared += 1
        for prefill in PREFILL_SIZES:
            shape = Shape(
                tp=one.shape.tp, groups=groups, max_prefill_token_num=prefill,
                image_limit=request.requested_image_limit, dtype=dtype_for(request.model, gpus)[0],
            )  # fmt: skip
            common = evaluate(SearchState(request, engine), shape)
            assert not common.fits or one.rank >= (*common.worth[:-1], common.score * (1 - 1e-8))
    return compared


@pytest.mark.parametrize("name", LMDEPLOY)
def test_every_engine_keeps_every_promise(name: str) -> None:
    plans = []
    for seed in SEEDS:
        request = random_mixed(1000 + seed)
        with suppress(UsageError):
            fit = search(request, engine_named(name))
            plans.append((request, plan_of(fit).document))
    fitting = [(request, plan) for request, plan in plans if plan.fits]
    assert len(fitting) > len(SEEDS) / 2
    for request, plan in fitting:
        keep_the_promise(request, plan)


def keep_the_promise(request: ResolvedRequest, plan: Plan) -> None:
    keeps_promises(plan)
    for own, group in zip(plan.engines, plan.groups, strict=True):
        assert own.settings.tp == len(group)
        assert plan.promise.context == own.settings.session_len <= own.kv.tokens
    there = sum(own.requests for own in plan.engines)
    assert there == pytest.approx(request.workload.concurrency, abs=0.01)


@pytest.mark.parametrize("on", ["rtx3090+rtx4090", "2xrtx3090+2xrtx4090", "rtx3090+l4"])
def test_all_cards_serve_where_that_is_faster(on: str) -> None:
    plan = turbofit.plan("internvl2-8b", on=on)
    names = {gpu.index: gpu.name for gpu in plan.machine.gpus}
    groups = plan.groups
    assert sorted(index for group in groups for index in group) == sorted(names)
    assert all(len({names[index] for index in group}) == 1 for group in groups)
    assert plan.fits
    assert len(plan.engines) == len(groups)
    assert all(ledger.headroom >= ledger.margin for ledger in plan.ledgers)
    for card in set(names.values()):
        own = ",".join(str(index) for index, name in names.items() if name == card)
        alone = turbofit.plan("internvl2-8b", on=on, gpus=own).throughput
        assert plan.throughput.requests_per_second > alone.requests_per_second


def test_cards_too_small_are_left_out_and_types_are_not_mixed() -> None:
    plan = turbofit.plan("internvl2-8b", on="rtx3060+rtx3090+rtx4080+rtx4090")
    assert plan.groups == ((1,), (3,))
    old = turbofit.plan("internvl2-8b", on="rtx3090+v100-32g")
    assert len(old.groups) == 1  # bfloat16 and float16 are no one setting


def test_what_was_asked_is_kept() -> None:
    on = "2xrtx3090+2xrtx4090"
    for replicas in (1, 2, 4):
        plan = turbofit.plan("internvl2-8b", on=on, tp=1, replicas=replicas)
        assert len(plan.groups) == replicas
    assert turbofit.plan("internvl2-8b", on=on, tp=2, replicas=2).groups == ((0, 1), (2, 3))


def test_kinds_are_split_by_degrees_of_their_own() -> None:
    plan = turbofit.plan("internvl2-8b", on="2xrtx4080+rtx3090")
    assert (plan.groups, plan.tp) == (((0, 1), (2,)), 2)
    for own, tp in zip(plan.engines, (2, 1), strict=True):
        command = own.command
        assert (own.settings.tp, command.argv[command.argv.index("--tp") + 1]) == (tp, str(tp))


def test_unequal_cards_are_split_over_only_where_that_was_asked() -> None:
    on = "rtx3090+rtx4090"
    free = turbofit.plan("internvl2-8b", on=on)
    assert all(len(group) == 1 for one in free.considered for group in one.groups)
    asked = turbofit.plan("internvl2-8b", on=on, tp=2)
    assert asked.fits
    assert sorted(asked.groups[0]) == [0, 1]
    assert any("split over unequal cards, as you asked" in text for text in asked.warnings)
    twice = turbofit.plan("internvl2-8b", on="3xrtx3090+rtx4090", tp=2, replicas=2)
    names = [{twice.machine.gpu(i).name for i in group} for group in twice.groups]
    assert sorted(map(len, names)) == [1, 2]
    assert turbofit.plan("internvl2-8b", on="2xrtx3090+rtx4090", tp=2).groups == ((0, 1),)
    with pytest.raises(UsageError, match="4-bit weights"):
        turbofit.plan("internvl2-8b-awq", on=on, tp=2)


def engine(prefill: float, step: float, holds: float):
    """An engine that runs so many at once; seconds of a prompt, and of all steps of an answer."""

    def speed(there: float) -> Speed:
        together = min(there, holds)
        batch = max(1.0, together)
        rate = min(1.0, together) * batch / (batch * prefill + step)
        return Speed(
            requests_per_second=rate, seconds_per_request=there / rate, seconds_to_first_token=0,
            alone=0, running=together, prefill=prefill, step=step, reduce=0,
        )  # fmt: skip

    return speed


FAST, SLOW, SMALL = engine(0.1, 4, 40), engine(0.3, 9, 40), engine(0.1, 4, 2)


@pytest.mark.parametrize("pair", [(FAST, SLOW), (FAST, SMALL), (SLOW, SMALL), (FAST, FAST)])
@pytest.mark.parametrize("requests", [1, 2, 8, 32])
def test_no_other_cut_gives_more_requests_a_second(pair, requests: int) -> None:
    shares = share_out([(1, pair[0]), (1, pair[1])], requests, "throughput")
    assert sum(shares) == pytest.approx(requests)
    assert min(shares) > 0
    value = sum(speed(n).requests_per_second for speed, n in zip(pair, shares, strict=True))
    cut = requests / 32
    for mine in range(1, 32):
        other = pair[0](mine * cut), pair[1](requests - mine * cut)
        assert value >= sum(one.requests_per_second for one in other) - 1e-9


@pytest.mark.parametrize("requests", [2, 8, 32])
def test_for_latency_the_longest_answer_is_the_shortest_possible(requests: int) -> None:
    def worst(mine: float) -> float:
        speeds = FAST(mine), SLOW(requests - mine)
        return max(speed.seconds_per_request for speed in speeds)

    fast, _ = share_out([(1, FAST), (1, SLOW)], requests, "latency")
    assert worst(fast) <= min(worst(part * requests / 32) for part in range(1, 32)) + 1e-9


@pytest.mark.parametrize("goal", ["throughput", "latency", "context"])
@pytest.mark.parametrize(
    ("most", "requests"), [((7, 3), 10), ((7, 3), 9), ((1, 40), 30), ((40, 2), 41), ((9, 1), 4)]
)
def test_no_engine_gets_more_than_it_holds_and_the_others_get_the_rest(
    goal, most: tuple[int, int], requests: int
) -> None:
    """To the last request, where all caches together hold just as many."""
    for shares in (
        share_out([(1, FAST), (1, SLOW)], requests, goal, most),
        evenly([1, 1], requests, most),
    ):
        assert sum(shares) == pytest.approx(requests)
        assert all(0 < share <= one for share, one in zip(shares, most, strict=True))
