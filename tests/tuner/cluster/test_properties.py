"""Whatever the nodes are: each one's plan fits its own machine, and keeps what all promise."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import fields

from tests.fixtures.clusters import joining, node
from tests.sweep import part
from turbofit import api
from turbofit.core.cluster import Cluster, ClusterPlan
from turbofit.core.plan import Limits, Plan
from turbofit.core.units import GIB, MIB
from turbofit.report.stored_documents import check_consistent

pytestmark = pytest.mark.slow

SPECS = {"1xrtx4090": 1, "2xrtx3090": 2, "2xrtx2080ti": 2, "1xl4": 1, "1xt4": 1, "2xa100": 2}
MODELS = ("internvl2-8b", "qwen2-vl-7b", "gemma-3-12b", "internlm2.5-7b", "internvl2-76b")


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    """Up to six nodes, three in the default check, a little or very differently full."""
    held = st.sampled_from([0, 300 * MIB, 301 * MIB, 2 * GIB, 9 * GIB])
    nodes = []
    for number in range(draw(st.integers(1, part(6, 2)))):
        spec = draw(st.sampled_from(sorted(SPECS)))
        nodes.append(node(number, spec, [draw(held) for _ in range(SPECS[spec])]))
    return Cluster(source="drawn", nodes=tuple(nodes))


ASKED = st.fixed_dictionaries(
    {"concurrency": st.sampled_from([1, 8, 50])},
    optional={
        "goal": st.sampled_from(["throughput", "latency", "context"]),
        "context": st.sampled_from([4096, 8192]),
        "images": st.sampled_from([0, 2]),
        "queue_images": st.just(True),
        "margin": st.sampled_from(["3%", GIB]),
        "budget": st.just(20 * GIB),
    },
)


@settings(max_examples=part(6, 4))
@given(model=st.sampled_from(MODELS), cluster=clusters(), asked=ASKED)
def test_every_node_fits_its_machine_and_keeps_the_promise(
    model: str, cluster: Cluster, asked: dict[str, Any]
) -> None:
    plan = api.plan_cluster(model, cluster, **asked)
    assert [one.node for one in plan.nodes] == [one.id for one in cluster.nodes]
    plans = []
    for given_node, one in zip(cluster.nodes, plan.nodes, strict=True):
        if one.plan is None:
            assert one.why_not
            continue
        assert given_node.machine is not None
        assert one.plan.machine == given_node.machine
        plans.append(one.plan)
    assert plan.fits == bool(plans)
    for own in plans:
        holds(own, plan)
    if plans:
        sums(plans, plan, asked["concurrency"])
    assert ClusterPlan.from_json(plan.to_json()) == plan


def holds(own: Plan, plan: ClusterPlan) -> None:
    """One engine set against its cards and against the promise."""
    check_consistent(own, "a node's plan")
    assert own.fits
    for ledger in own.gpus:
        gpu = own.machine.gpu(ledger.index)
        assert ledger.fits
        assert (ledger.uuid, ledger.used, ledger.free) == (gpu.uuid, gpu.used, gpu.free)
    assert own.kv.longest_request_tokens >= plan.longest_request_tokens
    assert plan.limits is not None
    for field in fields(Limits):
        promised, held = getattr(plan.limits, field.name), getattr(own.limits, field.name)
        assert held >= promised if isinstance(promised, int) else held == promised


def sums(plans: list[Plan], plan: ClusterPlan, requests: int) -> None:
    """What is told of all of them."""
    assert plan.total_tokens == sum(own.kv.total_tokens for own in plans)
    assert plan.engines == sum(own.parallel.replicas for own in plans)
    assert plan.longest_request_tokens == min(own.kv.longest_request_tokens for own in plans)
    shares = [one.at_once for one in plan.nodes]
    assert abs(sum(shares) - requests) < 1e-6 * requests


@settings(max_examples=part(5, 4))
@given(cluster=clusters(), model=st.sampled_from(MODELS[:3]))
def test_who_joins_keeps_the_promise_or_says_what_it_lacks(cluster: Cluster, model: str) -> None:
    *first, last = cluster.nodes
    plan = api.plan_cluster(model, Cluster(source="", nodes=tuple(first)))
    joined = joining(plan, last)
    assert joined.node == last.id
    if joined.plan is None:
        assert joined.why_not
        return
    assert joined.plan.machine == last.machine
    assert joined.at_once > 0
    assert joined.plan.fits
    assert all(ledger.fits for ledger in joined.plan.gpus)
    assert joined.plan.kv.longest_request_tokens >= plan.longest_request_tokens
    assert plan.limits is not None
    for name in ("units_per_image", "images_per_request", "n", "image_tokens_per_request"):
        assert getattr(joined.plan.limits, name) >= getattr(plan.limits, name)
