"""Plans of clusters: kinds of nodes, nodes that join, and what holds whatever the nodes are."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import UNSET
from msgspec.structs import fields, replace

from tests.fixtures.clusters import cluster, joining, node
from tests.sweep import part
from turbofit import api
from turbofit.core.cluster import Cluster, ClusterPlan, Node, NodePlan
from turbofit.core.errors import UsageError
from turbofit.core.machine import Calibration, CardSpeed, Measured
from turbofit.core.plan import Limits, Plan
from turbofit.core.units import GIB, MIB
from turbofit.core.version import __version__
from turbofit.report.stored_documents import check_consistent
from turbofit.tuner.cluster_nodes import kinds_of

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


def limits(plan: ClusterPlan) -> Limits:
    assert plan.limits is not None
    return plan.limits


@pytest.mark.parametrize(
    ("model", "spec", "asked"),
    [
        ("internvl2-8b", "4xrtx3090", {}),
        ("internvl2-8b", "rtx3090+rtx4090", {"concurrency": 20}),
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
    told = replace(alone, created="", limit_costs=(), serve=None)
    assert replace(own(plan.nodes[0]), created="") == told
    assert plan.throughput == alone.throughput
    assert plan.limits == alone.limits


def test_sums_least_and_shares() -> None:
    plan = api.plan_cluster(
        "internvl2-8b", cluster("8xh100", "2xrtx3090", "2xrtx3090"), concurrency=64
    )
    plans = [own(one) for one in plan.nodes]
    assert plan.fits
    for field in fields(Limits):
        values = [getattr(one.limits, field.name) for one in plans]
        least = getattr(limits(plan), field.name)
        assert least == (min(values) if isinstance(least, int) else values[0])
    assert plan.nodes[0].at_once > 4 * plan.nodes[1].at_once
    assert plan.throughput is not None
    each = [one.throughput.requests_per_second for one in plans if one.throughput]
    assert plan.throughput.requests_per_second == pytest.approx(sum(each), abs=1e-3)


def test_asked_images_come_before_more_nodes() -> None:
    nodes = cluster("1xrtx4090", "1xl4:free=19GiB", "1xl4:free=19GiB")
    plan = api.plan_cluster("qwen2-vl-7b", nodes)
    assert serving(plan) == ["host-1"]
    assert limits(plan).max_pixels_per_image == 12845056
    assert "12,845,056 are promised" in why(plan, "host-2")
    # With a concurrency it is told of the images too, not why the promise's engine fails on it.
    few = api.plan_cluster("qwen2-vl-7b", nodes, concurrency=2)
    assert serving(few) == ["host-1"]
    assert "pixels at most, 12,845,056 are promised" in why(few, "host-2")
    asked = api.plan_cluster("qwen2-vl-7b", nodes, concurrency=12, max_pixels=4_000_000)
    assert serving(asked) == ["host-1", "host-2", "host-3"]
    assert limits(asked).max_pixels_per_image == 4_000_000


def test_where_no_node_serves_the_asked_images_the_largest_of_any_node_is_promised() -> None:
    many = cluster("1xl4:free=19GiB", *["1xl4:free=18.9GiB"] * 9)
    plan = api.plan_cluster("qwen2-vl-7b", many)
    lone = api.plan("qwen2-vl-7b", on="1xl4:free=19GiB")
    assert serving(plan) == ["host-1"]
    assert limits(plan).max_pixels_per_image == lone.limits.max_pixels_per_image < 12845056
    assert any("none serves the model's own" in text for text in plan.reasons)
    assert plan.remedies == ()


def test_a_weak_node_does_not_take_context_from_all_for_nothing() -> None:
    plan = api.plan_cluster("internvl2-8b", cluster("8xh100", "2xrtx2080ti"), concurrency=64)
    assert plan.longest_request_tokens == 32768
    assert why(plan, "host-2") == (
        "holds 31,744 tokens under the promised images, 32,768 are promised"
    )
    other = api.plan_cluster("internvl2-8b", cluster("2xrtx3090", "2xrtx2080ti"))
    assert serving(other) == ["host-1"]
    assert other.longest_request_tokens == 32768
    shorter = api.plan_cluster("internvl2-8b", cluster("2xrtx3090", "2xrtx2080ti"), context=31744)
    assert serving(shorter) == ["host-1", "host-2"]
    asked = api.plan_cluster("internvl2-8b", cluster("2xrtx3090", "2xrtx2080ti"), context=32500)
    assert serving(asked) == ["host-1"]
    assert asked.longest_request_tokens == 32500
    assert "32500" in why(asked, "host-2")


def test_where_none_holds_the_whole_context_the_longest_of_any_node_is_promised() -> None:
    nodes = cluster("1xl4:free=20GiB", "1xl4:free=19.5GiB")
    plan = api.plan_cluster("internvl2-8b", nodes)
    assert serving(plan) == ["host-1"]
    assert own(plan.nodes[0]).settings.session_len == plan.longest_request_tokens


def test_nodes_that_cannot_be_planned_for_say_why() -> None:
    nodes = (
        node(1, "4xrtx3090", turbofit=__version__, lmdeploy="0.18.3"),
        Node(id="2", name="bare", address="", why_not="it has no GPU"),
        node(3, "4xrtx3090", turbofit="0.0.1"),
        node(4, "4xrtx3090", lmdeploy="0.12.1"),
        node(5, "1xt4"),
    )
    plan = api.plan_cluster("internvl2-8b", Cluster(source="", nodes=nodes))
    assert serving(plan) == ["host-1"]
    assert why(plan, "bare") == "it has no GPU"
    assert "turbofit 0.0.1" in why(plan, "host-3")
    assert "LMDeploy 0.12.1" in why(plan, "host-4")
    assert "runs out of memory" in why(plan, "host-5")
    assert sum("left out" in text for text in plan.warnings) == 4


def test_nothing_fits_and_what_would() -> None:
    plan = api.plan_cluster("internvl2-8b", cluster("1xt4"))
    assert not plan.fits
    assert plan.limits is None
    assert plan.engines == 0
    assert plan.throughput is None
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
    assert {own(one).engine.name for one in plan.nodes if one.plan} == {"turbomind"}
    alone = api.plan_cluster("llava-onevision-7b", cluster("2xa100", "1xa100-80g"))
    assert {own(one).engine.name for one in alone.nodes} == {"transformers"}
    assert alone.throughput is None
    assert sum(one.at_once for one in alone.nodes) == 2


def test_equal_nodes_are_planned_once_and_each_has_its_own_names() -> None:
    nodes = tuple(node(k, "2xrtx3090", [0, 3 * MIB]) for k in range(1, 4))
    plan = api.plan_cluster("internvl2-8b", Cluster(source="", nodes=nodes))
    assert [bool(own(one).considered) for one in plan.nodes] == [True, False, False]
    for cluster_node, one in zip(nodes, plan.nodes, strict=True):
        made, machine = own(one), cluster_node.machine
        assert machine is not None
        assert made.machine == machine
        assert [ledger.uuid for ledger in made.gpus] == [gpu.uuid for gpu in machine.gpus]
        devices = {command.env["CUDA_VISIBLE_DEVICES"] for command in made.commands}
        assert all(text.startswith(f"GPU-{one.name[-1]}-") for text in devices)


def test_all_limits_that_make_a_refusal_are_equal_on_all_nodes() -> None:
    plan = api.plan_cluster("internvl2-8b", cluster("8xh100", "1xl4"), concurrency=40)
    refusing = {replace(own(one).limits, units_per_forward=0) for one in plan.nodes}
    assert len(refusing) == 1
    lengths = {own(one).kv.longest_request_tokens for one in plan.nodes}
    assert lengths == {plan.longest_request_tokens}


def test_a_node_holds_no_more_than_its_engines_survive() -> None:
    """Two of CogVLM's prompts that meet end it: a card's share was both, and no plan was found."""
    plan = api.plan_cluster("cogvlm-17b", cluster("2xrtx3090", "a100-80g"), concurrency=2)
    assert [one.at_once for one in plan.nodes] == [1.0, 1.0]


def test_a_concurrency_is_what_all_nodes_hold_together() -> None:
    """A node that holds less than an even share gets what it holds, the others the rest."""
    nodes = cluster("1xrtx3090", "1xrtx3090", "1xl4")
    over = api.plan_cluster("internvl2-8b", nodes, concurrency=500)
    assert not over.fits
    held = over.held.requests
    said = f"with --concurrency 500: the cache of 3 nodes holds {held} of 500 requests of 3,840"
    assert said in over.verdict
    assert all(f"hold {held} of 500 requests at once" in one.why_not for one in over.nodes)
    assert f"--concurrency {held}" in [one.change for one in over.remedies]

    plan = api.plan_cluster("internvl2-8b", nodes, concurrency=held)
    assert plan.fits
    assert sum(one.at_once for one in plan.nodes) == pytest.approx(held)
    for one in plan.nodes:
        assert own(one).held.requests >= one.at_once - 1e-6
        assert one.at_once != pytest.approx(held / 3)
    assert plan.held.requests >= held
    assert not api.plan_cluster("internvl2-8b", nodes, concurrency=held + 1).fits


def test_a_like_node_gets_the_same_settings() -> None:
    plan = api.plan_cluster("internvl2-8b", cluster("4xrtx3090", "4xrtx3090"), concurrency=24)
    joined = joining(plan, node(3, "4xrtx3090"))
    made = own(joined)
    assert joined.at_once == 12
    assert made.settings.session_len == plan.longest_request_tokens
    assert made.limits.max_dynamic_patch == own(plan.nodes[0]).limits.max_dynamic_patch
    assert made.limits.n >= limits(plan).n
    assert len(made.commands) == made.parallel.replicas
    assert joined.cards == "4x NVIDIA GeForce RTX 3090"
    assert made.throughput is not None
    # A node of the plan, which is planned again where the plan changes, is no node more.
    again = joining(plan, node(1, "4xrtx3090"))
    assert again.node == plan.nodes[0].node
    assert again.at_once == plan.nodes[0].at_once == 12


def test_a_lower_promise_is_kept_by_a_node_that_could_more() -> None:
    plan = api.plan_cluster("qwen2-vl-7b", cluster("1xl4:free=19GiB"))
    made = own(joining(plan, node(2, "2xa100")))
    assert made.limits.max_pixels_per_image == limits(plan).max_pixels_per_image
    assert made.settings.session_len == plan.longest_request_tokens
    # Settings that the cluster was given are kept too.
    plan = api.plan_cluster("internvl2-8b", cluster("2xrtx3090"), session_len=8192)
    made = own(joining(plan, node(2, "2xrtx3090"), session_len=8192))
    assert made.settings.session_len == 8192


def test_answers_a_request_are_part_of_the_promise() -> None:
    plan = api.plan_cluster("internvl2-8b", cluster("1xrtx4090"), concurrency=12)
    assert limits(plan).n == 12
    assert own(joining(plan, node(2, "1xrtx4090"))).limits.n >= 12
    # A node of more engines has them on each.
    plan = api.plan_cluster("internvl2-26b", cluster("2xa100-40g"))
    made = own(joining(plan, node(2, "2xa100-80g")))
    assert made.parallel.replicas == 2
    assert made.limits.n == limits(plan).n


def test_who_cannot_join_is_told_why() -> None:
    large = api.plan_cluster("internvl2-8b", cluster("8xh100"))
    told = joining(large, node(2, "2xrtx2080ti")).why_not
    assert "--context 32768: the cache holds 22528 tokens" in told
    large = api.plan_cluster("qwen2-vl-7b", cluster("8xh100"), context=17408)
    told = joining(large, node(2, "1xl4:free=19GiB")).why_not
    assert "runs out of memory while loading" in told  # under the promised images
    plan = api.plan_cluster("internvl2-8b", cluster("2xrtx3090"))
    assert "turbofit 9" in joining(plan, node(2, "2xrtx3090", turbofit="9")).why_not
    assert "runs out of memory" in joining(plan, node(2, "1xt4")).why_not
    nothing = api.plan_cluster("internvl2-8b", Cluster(source="", nodes=()))
    assert "nothing is promised" in joining(nothing, node(2, "2xrtx3090")).why_not
    gone = replace(node(2, "2xrtx3090"), machine=None, why_not="no GPU")
    assert joining(plan, gone).why_not == "no GPU"


def test_nodes_that_run_unlike_engines_are_told_of() -> None:
    plan = api.plan_cluster("qwen3.5-9b", cluster("1xh100", "1xrtx4090"))
    assert {own(member).engine.name for member in plan.nodes} == {"turbomind", "pytorch"}
    assert "nodes run pytorch and turbomind: answers may differ in wording" in plan.warnings


def test_nodes_of_the_plan_hold_what_it_counts_on() -> None:
    machines = cluster("2xrtx3090", "1xl4", "2xrtx4090")
    plan = api.plan_cluster("qwen2.5-vl-7b", machines, concurrency=30)
    for cluster_node, member in zip(machines.nodes, plan.nodes, strict=True):
        joined, planned = own(joining(plan, cluster_node, concurrency=30)), own(member)
        assert (joined.settings, joined.kv) == (planned.settings, planned.kv)


def test_a_node_that_holds_less_than_its_share_joins_where_that_is_no_promise() -> None:
    plan = api.plan_cluster("internvl2-8b", cluster("1xrtx4090"), concurrency=12)
    assert own(joining(plan, node(2, "1xrtx3090:used=1GiB"))).held is UNSET


def test_nodes_that_are_equally_full_are_one_kind() -> None:
    nodes = [
        node(1, "2xrtx3090", [3 * MIB, 10 * MIB]),
        node(2, "2xrtx3090", [3 * MIB, 10 * MIB]),
        node(3, "2xrtx3090", [3 * MIB, 11 * MIB]),
        node(4, "2xrtx4090", [3 * MIB, 10 * MIB]),
    ]
    found = [[one.id for one in kind.nodes] for kind in kinds_of(nodes)]
    assert found == [["0001", "0002"], ["0003"], ["0004"]]
    assert kinds_of(nodes[2:])[0].machine == nodes[2].machine


def test_links_calibrations_and_measured_speeds_tell_nodes_apart() -> None:
    first = node(1, "2xrtx3090")
    machine = first.machine
    assert machine is not None
    learned = Calibration(
        model="m", engine="turbomind", engine_version="0.18", lmdeploy="0.18.0", gpus=("a", "a"),
        driver="1", communicator="nccl", when="today", context=1, buffers=2,
    )  # fmt: skip
    again = replace(learned, when="tomorrow")
    speed = Measured(torch="2", cards=(CardSpeed(index=0, bandwidth=8e11, flops=6e13),))
    slow = Measured(torch="2", cards=(CardSpeed(index=0, bandwidth=4e11, flops=6e13),))
    machines = [
        machine,
        replace(machine, calibrations=(learned,)),
        replace(machine, calibrations=(again,)),
        replace(machine, measured=speed),
        replace(machine, measured=speed, name="another", warnings=("hot",)),
        replace(machine, measured=slow),
    ]
    nodes = [replace(first, id=str(k), machine=one) for k, one in enumerate(machines)]
    nodes.append(node(7, "2xrtx3090,nvlink=0-1"))
    found = [[one.id for one in kind.nodes] for kind in kinds_of(nodes)]
    assert found == [["0"], ["1", "2"], ["3", "4"], ["5"], ["0007"]]


def test_host_memory_is_that_of_the_least() -> None:
    nodes = [node(1, "1xl4,ram=60GiB"), node(2, "1xl4,ram=57GiB"), node(3, "1xl4,ram=20GiB")]
    kinds = kinds_of(nodes)
    assert [len(kind.nodes) for kind in kinds] == [2, 1]
    assert kinds[0].machine.host.ram_available == 57 * GIB


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
