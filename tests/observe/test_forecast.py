from __future__ import annotations

import turbofit
from tests.support.plans import plausible_plan
from turbofit.core.run_report import RunFigure
from turbofit.core.units import MIB
from turbofit.observe.forecast import cache_beside, in_words, tokens_beside
from turbofit.observe.log_events import CacheBudget, Slab


def test_the_engines_figures_beside_the_plans() -> None:
    plan = plausible_plan()
    budget = CacheBudget(budget=17170 * MIB, free=19667 * MIB, ratio=0.873)
    free, cache = cache_beside(plan, budget)
    assert free.forecast == round(17000 * MIB / 0.873)
    beside, _ = cache_beside(plan, CacheBudget(budget=17000 * MIB, free=17100 * MIB, ratio=0.994))
    assert beside.forecast == round(17000 * MIB / 0.994)
    assert "19,667.0 MiB (forecast 19,473.1, +1.0%)" in in_words(free)
    assert "17,170.0 MiB (forecast 17,000.0, +1.0%)" in in_words(cache)
    slab = Slab(slab_size=32 * MIB, object_size=2 * MIB, object_count=16)
    tokens = tokens_beside(plan, budget, slab)
    assert tokens.actual == 535 * 16 * 64
    assert "547,840 (forecast 544,000, +0.7%)" in in_words(tokens)
    on_card = RunFigure(what="in use", forecast=100 * MIB, actual=99 * MIB, gpu=1)
    assert in_words(on_card) == "GPU 1: in use: 99.0 MiB (forecast 100.0, -1.0%)"


def test_tokens_of_a_hybrid_model_are_beside_its_states() -> None:
    plan = turbofit.predict(
        "qwen3.5-4b", on="1xrtx3090", engine="turbomind", tp=1, cache_max_entry_count=0.5
    )
    region = plan.kv.region_bytes
    budget = CacheBudget(budget=region, free=2 * region, ratio=0.5)
    slab = Slab(slab_size=32 * MIB, object_size=2 * MIB, object_count=16)
    assert tokens_beside(plan, budget, slab).actual == plan.kv.tokens
