"""Plans of clusters: kinds of nodes, nodes that join, and what holds whatever the nodes are."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from msgspec.structs import fields, replace

from tests.fixtures.clusters import cluster, joining, node
from tests.support.plans import changed
from tests.sweep import part
from turbofit import api
from turbofit.core.cluster import Cluster, ClusterPlan, Node, NodePlan
from turbofit.core.errors import UsageError
from turbofit.core.machine import Calibration
from turbofit.core.plan import Plan
from turbofit.core.promise import Limits, Promise
from turbofit.core.units import GIB, MIB
from turbofit.machine.spec import parse_spec
from turbofit.model.presets import preset_model
from turbofit.report.stored_documents import check_consistent

pytestmark = pytest.mark.slow

SPECS = {"1xrtx4090": 1, "2xrtx3090": 2, "2xrtx2080ti": 2, "1xl4": 1, "1xt4": 1, "2xa100": 2}
MODELS = ("internvl2-8b", "qwen2-vl-7b", "gemma-3-12b", "internlm2.5-7b", "internvl2-76b")


def serving(plan: ClusterPlan) -> list[str]:
    return [one.name for one in plan.nodes if one.plan is not None]


def why(plan: ClusterPlan, name: str) -> str:
    return next(one.why_not for one in plan.nodes if one.name == name)


def own(one: NodePlan) -> Plan:
    assert one.plan is not None
    return one.plan


def promise(plan: ClusterPlan) -> Promise:
    assert plan.promise is not None
    return plan.promise


def limits(plan: ClusterPlan) -> Limits:
    return promise(plan).limits


@pytest.mark.parametrize(
    ("model", "spec", "asked"),
    [
        ("internvl2-8b", "4xrtx3090", {}),
        ("internvl2-8b", "rtx3090+rtx4090", {}),
        ("qwen2-vl-7b", "1xl4:free=19GiB", {}),  # images are lowered
        ("gemma-3-12b", "2xrtx3090", {"goal": "context"}),  # the PyTorch engine
        ("internvl2-8b", "2xrtx2080ti", {"session_len": 8192, "max_batch_size": 4}),
        ("llava-onevision-7b", "2xa100", {}),  # Transformers
    ],
)
def test_one_node_is_planned_as_the_machine_that_it_is(
    model: str, spec: str, asked: dict[str, object]
) -> None:
    one = node(1, spec)
    plan = api.plan_cluster(model, Cluster(source="", nodes=(one,)), **asked)  # type: ignore[arg-type]
    alone = api.plan(model, on=one.machine, **asked)  # type: ignore[arg-type]
    assert alone.fits
    told = replace(changed(alone, command=None), created="", limit_costs=(), serve=None)
    made = own(plan.nodes[0])
    assert replace(made, created="", warnings=alone.warnings) == told
    assert set(made.warnings) <= set(alone.warnings)
    assert limits(plan) == alone.promise.limits


def test_asked_images_come_before_more_nodes() -> None:
    nodes = cluster("1xrtx4090", "1xl4:free=19GiB", "1xl4:free=19GiB")
    plan = api.plan_cluster("qwen2-vl-7b", nodes)
    assert serving(plan) == ["host-1"]
    assert limits(plan).max_pixels_per_image == 12845056
    assert "12,845,056 are promised" in why(plan, "host-2")
    asked = api.plan_cluster("qwen2-vl-7b", nodes, max_pixels=4_000_000)
    assert serving(asked) == ["host-1", "host-2", "host-3"]
    assert limits(asked).max_pixels_per_image == 4_000_000


def test_a_weak_node_does_not_take_context_from_all_for_nothing() -> None:
    other = api.plan_cluster("internvl2-8b", cluster("2xrtx3090", "2xrtx2080ti"))
    assert serving(other) == ["host-1"]
    assert promise(other).context == 32768
    assert "holds 31,744 tokens" in why(other, "host-2")
    shorter = api.plan_cluster("internvl2-8b", cluster("2xrtx3090", "2xrtx2080ti"), context=31744)
    assert serving(shorter) == ["host-1", "host-2"]


def test_nodes_that_cannot_be_planned_for_say_why() -> None:
    nodes = (
        node(1, "4xrtx3090"),
        Node(id="2", name="bare", address="", why_not="it has no GPU"),
        node(3, "4xrtx3090", why_not="jobs of Ray hold 1 of its 4 GPUs"),
        node(4, "1xt4"),
        replace(node(5, "4xrtx3090"), machine=replace(parse_spec("4xrtx3090"), visible=())),
    )
    plan = api.plan_cluster("internvl2-8b", Cluster(source="", nodes=nodes))
    assert serving(plan) == ["host-1"]
    assert why(plan, "bare") == "it has no GPU"
    assert why(plan, "host-3") == "jobs of Ray hold 1 of its 4 GPUs"
    assert "runs out of memory" in why(plan, "host-4")
    assert why(plan, "host-5") == "it has no GPU that may be used"
    assert sum("left out" in text for text in plan.warnings) == 4


def test_nothing_fits_and_what_would() -> None:
    plan = api.plan_cluster("internvl2-8b", cluster("1xt4"))
    assert not plan.fits
    assert plan.promise is None
    assert "on none of 1 node" in plan.verdict
    assert any("AWQ" in one.change and one.effect.startswith("1 node of") for one in plan.remedies)
    assert not api.plan_cluster("internvl2-8b", Cluster(source="", nodes=())).fits


def test_what_no_node_can_be_asked_is_an_error() -> None:
    with pytest.raises(UsageError, match="--tp 3"):
        api.plan_cluster("internvl2-8b", cluster("4xrtx3090", "2xrtx3090"), tp=3)
    plan = api.plan_cluster("internvl2-8b", cluster("4xrtx3090", "1xrtx4090"), tp=2)
    assert serving(plan) == ["host-1"]
    assert "--tp 2" in why(plan, "host-2")


def test_transformers_is_never_mixed_with_lmdeploy() -> None:
    plan = api.plan_cluster("internvl2-8b", cluster("2xrtx3090", "1xt4"))
    assert {own(one).backend.name for one in plan.nodes if one.plan} == {"turbomind"}
    alone = api.plan_cluster("llava-onevision-7b", cluster("2xa100", "1xa100-80g"))
    assert {own(one).backend.name for one in alone.nodes} == {"transformers"}


def test_equal_nodes_are_planned_once_and_each_has_its_own_names() -> None:
    nodes = tuple(node(k, "2xrtx3090", [0, 3 * MIB]) for k in range(1, 4))
    plan = api.plan_cluster("internvl2-8b", Cluster(source="", nodes=nodes))
    assert [bool(own(one).considered) for one in plan.nodes] == [True, False, False]
    for cluster_node, one in zip(nodes, plan.nodes, strict=True):
        made, machine = own(one), cluster_node.machine
        assert machine is not None
        assert made.machine == machine
        assert [ledger.uuid for ledger in made.ledgers] == [gpu.uuid for gpu in machine.gpus]


def test_a_concurrency_is_of_all_nodes_together() -> None:
    over = api.plan_cluster("internvl2-8b", cluster("1xl4"), concurrency=500)
    assert not over.fits
    assert "with --concurrency 500: 1 of 1 node: 12 requests at once" in over.verdict
    both = cluster("1xrtx3090", "1xl4")
    at_once = sum(one.plan.promise.requests for one in api.plan_cluster("internvl2-8b", both).nodes)
    assert api.plan_cluster("internvl2-8b", both, concurrency=at_once).fits
    assert not api.plan_cluster("internvl2-8b", both, concurrency=at_once + 1).fits


def test_a_lower_promise_is_kept_by_a_node_that_could_more() -> None:
    plan = api.plan_cluster("qwen2-vl-7b", cluster("1xl4:free=19GiB"))
    made = own(joining(plan, node(2, "2xa100")))
    assert made.promise.limits.max_pixels_per_image == limits(plan).max_pixels_per_image
    assert made.engines[0].settings.session_len == promise(plan).context
    # Settings that the cluster was given are kept too.
    plan = api.plan_cluster("internvl2-8b", cluster("2xrtx3090"), session_len=8192)
    made = own(joining(plan, node(2, "2xrtx3090"), session_len=8192))
    assert made.engines[0].settings.session_len == 8192


def test_who_cannot_join_is_told_why() -> None:
    large = api.plan_cluster("internvl2-8b", cluster("8xh100"))
    told = joining(large, node(2, "2xrtx2080ti")).why_not
    assert told == "holds 31,744 tokens under the promised images, 32,768 are promised"
    plan = api.plan_cluster("internvl2-8b", cluster("2xrtx3090"), tp=2)
    assert "2 GPUs are needed" in joining(plan, node(2, "1xrtx3090"), tp=2).why_not
    assert "runs out of memory" in joining(plan, node(2, "1xt4")).why_not
    gone = replace(node(2, "2xrtx3090"), machine=None, why_not="no GPU")
    assert joining(plan, gone).why_not == "no GPU"


def test_nodes_are_planned_once_by_all_that_planning_reads_and_for_the_least_host_memory() -> None:
    learned = Calibration(
        model="m", engine="turbomind", engine_version="0.18", lmdeploy="0.18.0", gpus=("a", "a"),
        driver="1", communicator="nccl", when="today", context=1, buffers=2,
    )  # fmt: skip
    plain = node(1, "2xrtx3090,ram=57GiB")
    assert plain.machine is not None
    nodes = [
        (node(2, "2xrtx3090,ram=60GiB"), True),
        (plain, False),
        (node(3, "2xrtx3090,ram=20GiB"), True),
        (node(4, "2xrtx3090,ram=60GiB,nvlink=0-1"), True),
        (replace(plain, id="5", machine=replace(plain.machine, calibrations=(learned,))), True),
    ]
    every = Cluster(source="", nodes=tuple(one for one, _ in nodes))
    plans = [own(one) for one in api.plan_cluster("internvl2-1b", every).nodes]
    assert [bool(plan.considered) for plan in plans] == [first for _, first in nodes]
    assert plans[0].host.available == 57 * GIB


def test_nodes_that_run_unlike_engines_are_told_of() -> None:
    plan = api.plan_cluster("qwen3.5-9b", cluster("1xh100", "1xrtx4090"))
    assert {own(member).backend.name for member in plan.nodes} == {"turbomind", "pytorch"}
    (told,) = [text for text in plan.warnings if text.startswith("nodes run")]
    assert "pytorch in" in told
    assert "turbomind in" in told


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
    {},
    optional={
        "concurrency": st.sampled_from([1, 8, 50]),
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
    assume("images" not in asked or preset_model(model).vision is not None)
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
    at_once = sum(one.requests_at_once for one in plans)
    assert plan.fits == (bool(plans) and at_once >= asked.get("concurrency", 0))
    for own in plans:
        holds(own, plan)
    assert ClusterPlan.from_json(plan.to_json()) == plan


def holds(own: Plan, plan: ClusterPlan) -> None:
    """One engine set against its cards and against the promise."""
    check_consistent(own, "a node's plan")
    assert own.fits
    for ledger in own.ledgers:
        gpu = own.machine.gpu(ledger.index)
        assert ledger.fits
        assert (ledger.uuid, ledger.used, ledger.free) == (gpu.uuid, gpu.used, gpu.free)
    assert own.promise.context >= promise(plan).context
    for field in fields(Limits):
        assert getattr(own.promise.limits, field.name) == getattr(limits(plan), field.name)


@settings(max_examples=part(5, 4))
@given(cluster=clusters(), model=st.sampled_from(MODELS[:3]))
def test_who_joins_keeps_the_promise_or_says_what_it_lacks(cluster: Cluster, model: str) -> None:
    *first, last = cluster.nodes
    plan = api.plan_cluster(model, Cluster(source="", nodes=tuple(first)))
    assume(plan.fits)  # else nothing is promised yet
    joined = joining(plan, last)
    assert joined.node == last.id
    if joined.plan is None:
        assert joined.why_not
        return
    assert joined.plan.machine == last.machine
    assert joined.plan.fits
    assert all(ledger.fits for ledger in joined.plan.ledgers)
    assert joined.plan.promise.context >= promise(plan).context
    for name in ("units_per_image", "images_per_request", "n", "image_tokens_per_request"):
        assert getattr(joined.plan.promise.limits, name) >= getattr(limits(plan), name)
