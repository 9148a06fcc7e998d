"""The search against the slow way: every grouping and prefill size, no shortcuts.

The largest ratio of each is found by halves; that nothing fits above it is gone through ratio by
ratio in `test_each_card_of_its_own_holds_all_that_it_can`.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from contextlib import suppress
from itertools import combinations
from math import ceil

import pytest
from msgspec.structs import replace

from tests.planning.conftest import random_request
from tests.sweep import sweep
from turbofit.core.errors import UsageError
from turbofit.memory.account import Engine
from turbofit.memory.engines import engine_named
from turbofit.planning.resolved_request import ResolvedRequest, launch_of, vision_load_of
from turbofit.planning.search.search import EngineFit, search
from turbofit.planning.search.shapes import Shape, dtype_for, prefill_sizes, shape_settings
from turbofit.planning.speed import counted_tokens, group_rates, group_speed

pytestmark = pytest.mark.slow

TURBOMIND, PYTORCH = engine_named("turbomind"), engine_named("pytorch")
ASKED = [(TURBOMIND, seed) for seed in range(200)] + [(PYTORCH, seed) for seed in range(60)]
RATIOS = [step / 1000 for step in range(999, 0, -1)]


def every_grouping(indices: tuple[int, ...], tp: int, replicas: int):
    """All unordered choices, mirror images included."""
    if replicas == 0:
        yield ()
        return
    for group in combinations(indices, tp):
        rest = tuple(i for i in indices if i not in group and i > group[0])
        for more in every_grouping(rest, tp, replicas - 1):
            yield (group, *more)


def accounts_for(
    request: ResolvedRequest, engine: Engine, groups, prefill: int, context: int, vision_load=None
):
    shape = Shape(
        tp=len(groups[0]), groups=groups, max_prefill_token_num=prefill, image_limit=None,
        dtype=dtype_for(request.model, [request.machine.gpu(i) for i in groups[0]])[0],
    )  # fmt: skip
    settings = shape_settings(request, shape, context)
    vision_load = vision_load or vision_load_of(request, request.requested_image_limit)
    for group in groups:
        gpus = sorted((request.machine.gpu(i) for i in group), key=lambda g: (g.used, g.index))
        yield engine.account(launch_of(request, settings, gpus, vision_load))


def value_of(request: ResolvedRequest, engine: Engine, groups, prefill: int, context: int):
    """(goal value, tokens, prefill, -tp) of the largest ratio that fits, or None.

    Empty where the context is held, and the requests that are asked for at once are not.
    """
    asked = vision_load_of(request, request.requested_image_limit)
    # Its images and some text are no longer than a request may be.
    if asked.units_per_image and asked.tokens_per_request + min(1024, context // 8) > context:
        return None
    accounts = list(accounts_for(request, engine, groups, prefill, context))
    place = bisect_left(RATIOS, True, key=lambda r: all(a.fits_at(r) for a in accounts))
    if place == len(RATIOS) or any(a.cache_shortfall_at(RATIOS[place]) for a in accounts):
        return None
    ratio = RATIOS[place]
    tokens = min(a.tokens_at(ratio) for a in accounts)
    if tokens < context:
        return None
    at_once = request.workload.concurrency / len(groups)
    if tokens // counted_tokens(asked, context) < ceil(at_once):
        return ()
    settings = replace(accounts[0].settings, cache_max_entry_count=ratio)
    speeds = []
    for account in accounts:
        group = group_rates(request.model, settings, request.machine, account.gpus, engine)
        plain = request.workload.goal == "throughput"
        group = group.plain if plain else group
        speeds.append(group_speed(group, settings, asked, tokens, at_once))
    value = {
        "throughput": sum(s.requests_per_second for s in speeds),
        "latency": 1 / max(s.seconds_per_request for s in speeds),
        "context": float(tokens),
    }[request.workload.goal]
    return value, True, tokens, prefill, -settings.tp


def exhaustive(request: ResolvedRequest, engine: Engine, contexts):
    """The best value over the whole space; for each shape the longest context that holds."""
    best = None
    indices = request.machine.visible
    for tp in range(1, min(8, len(indices)) + 1):
        if engine.tp_problem(request.model, tp):
            continue
        for replicas in range(1, len(indices) // tp + 1):
            for groups in every_grouping(indices, tp, replicas):
                for prefill in prefill_sizes(request, engine):
                    values = (value_of(request, engine, groups, prefill, c) for c in contexts)
                    found = next((v for v in values if v is not None), None)
                    if found and (best is None or found > best):
                        best = found
    return best


def test_each_card_of_its_own_holds_all_that_it_can():
    """Each set of groups as chosen: a thousandth more of the ratio does not leave the margin."""
    chosen = []
    asked = sweep(ASKED[::3], 16)
    for engine, seed in asked:
        request = random_request(random.Random(seed))
        with suppress(UsageError):
            chosen.append((request, engine, search(request, engine).best))
    fitting = [one for one in chosen if one[2].fits]
    assert len(fitting) > len(asked) / 2
    for request, engine, best in fitting:
        holds_all_that_it_can(request, engine, best)


def holds_all_that_it_can(request, engine, best):
    for part in best.parts:
        shape, context = part.shape, part.settings.session_len
        asked = replace(
            request,
            engine_options={
                **request.engine_options,
                "max_batch_size": part.settings.max_batch_size,
            },
        )
        vision_load = replace(part.vision_load, units_per_forward=shape.units_per_forward)
        prefill = shape.max_prefill_token_num
        accounts = list(accounts_for(asked, engine, shape.groups, prefill, context, vision_load))
        ratio = next(r for r in RATIOS if all(a.fits_at(r) for a in accounts))
        assert part.settings.cache_max_entry_count == ratio
        assert part.kv_tokens == min(a.tokens_at(ratio) for a in accounts)
        assert context == best.settings.session_len


def chosen(found: EngineFit):
    best = found.best
    if not best.fits or best.shape.units_per_forward is not None:
        return None
    assert best.worth[0] == 1.0  # all images as asked
    assert not best.queues
    assert best.footprint == 0  # it counts only where the least is asked for
    return best.rank[3:]


@pytest.mark.parametrize(("engine", "seed"), sweep(ASKED, 40))
def test_the_choice_equals_exhaustive_search(engine, seed):
    request = random_request(random.Random(seed))
    best = exhaustive(request, engine, [request.workload.context])
    try:
        found = search(request, engine)
    except UsageError:  # no legal shape
        assert best is None
        return
    if (
        found.best.shape.image_limit != request.requested_image_limit
    ):  # a later tier: the first has nothing
        assert best is None
        return
    if len(found.best.parts) == 1:
        assert chosen(found) == pytest.approx(best)
        return
    # Settings of each card's own: never worse than the best that all cards can run together.
    value, _, tokens, prefill, shards = chosen(found)
    assert best is None or value >= best[0] * (1 - 1e-8)
    if best is not None and value == pytest.approx(best[0]):
        assert (tokens, prefill, shards) >= best[2:]
