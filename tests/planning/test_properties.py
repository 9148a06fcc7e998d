"""What must hold for any machine and workload."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, assume, given, reject, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.planning.conftest import keeps_promises, random_request, with_used
from tests.sweep import part
from turbofit.core.errors import UsageError
from turbofit.core.plan import Plan
from turbofit.core.units import MIB
from turbofit.memory.account import Engine
from turbofit.memory.engines import LMDEPLOY, engine_named
from turbofit.planning.choose import plan_of
from turbofit.planning.resolved_request import Margin, ResolvedRequest
from turbofit.planning.search.evaluate import evaluate
from turbofit.planning.search.search import search
from turbofit.planning.search.shapes import Evaluation, Shape, shapes
from turbofit.planning.search.sizing import SearchState

pytestmark = pytest.mark.slow

engines = st.sampled_from([engine_named(name) for name in LMDEPLOY])
relaxed = settings(
    max_examples=part(20, 8), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def some_shape(request: ResolvedRequest, engine: Engine, index: int) -> Shape:
    """One shape of the space at the model's own limit."""
    space = list(shapes(request, engine))
    assume(space)
    return space[index % len(space)]


def evaluation(request: ResolvedRequest, engine: Engine, shape: Shape) -> Evaluation:
    return evaluate(SearchState(request, engine), shape)


@given(
    engine=engines, seed=st.integers(0, 10**6), index=st.integers(0, 99), freed=st.integers(1, 3000)
)
@relaxed
def test_less_free_memory_or_more_that_is_asked_never_give_more(engine, seed, index, freed):
    request = random_request(random.Random(seed))
    shape, work = some_shape(request, engine, index), request.workload
    before = evaluation(request, engine, shape)
    used = [max(0, gpu.used - freed * MIB) for gpu in request.machine.gpus]
    after = evaluation(replace(request, machine=with_used(request.machine, used)), engine, shape)
    # A ratio that fits one block more by a hair takes a whole step less: a thousandth.
    assert after.kv_tokens >= before.kv_tokens * 0.998 - 64
    assert after.fits or not before.fits
    for harder in (
        replace(request, workload=replace(work, images=work.images + 1)),
        replace(request, workload=replace(work, context=(work.context or 0) + 4096)),
        replace(request, margin=Margin(bytes=900 * MIB)),
    ):
        assert evaluation(harder, engine, shape).kv_tokens <= before.kv_tokens


@given(engine=engines, seed=st.integers(0, 10**6), shuffle=st.randoms(use_true_random=False))
@relaxed
def test_permuting_equal_gpus_changes_neither_verdict_nor_score(engine, seed, shuffle):
    request = random_request(random.Random(seed))
    # Links by NVLink would make them unequal.
    assume(not any(link.nvlinked for link in request.machine.links or ()))
    used = [gpu.used for gpu in request.machine.gpus]
    shuffle.shuffle(used)
    other = replace(request, machine=with_used(request.machine, used))
    try:
        one, two = search(request, engine).best, search(other, engine).best
    except UsageError:
        reject()
    assert (one.fits, one.worth) == (two.fits, pytest.approx(two.worth))
    assert one.kv_tokens == two.kv_tokens


@given(engine=engines, seed=st.integers(0, 10**6))
@settings(max_examples=part(12, 4), deadline=None)
def test_a_plan_keeps_every_promise_where_it_fits(engine, seed):
    request = random_request(random.Random(seed), context=False)
    try:
        plan = plan_of(search(request, engine)).document
    except UsageError:
        return
    if not plan.fits:
        assert plan.verdict.startswith("does not fit")
        assert Plan.from_json(plan.to_json()) == plan
        return
    keeps_promises(plan)
    assert min(it.kv.tokens for it in plan.engines) * plan.replicas <= plan.kv_tokens
    used = [index for group in plan.groups for index in group]
    assert len(used) == len(set(used)) == plan.tp * plan.replicas
    # TurboMind may bring a whole request together; the PyTorch engine goes image by image.
    limits = plan.promise.limits
    whole = limits.units_per_image if engine.name == "pytorch" else limits.units_per_request
    assert all(own.units_per_forward >= whole for own in plan.engines)
