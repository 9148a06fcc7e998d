"""Plans of clusters: kinds of nodes, and nodes that join."""

from __future__ import annotations

import pytest
from msgspec import UNSET
from msgspec.structs import fields, replace

from tests.fixtures.clusters import cluster, joining, node
from turbofit import api
from turbofit.core.cluster import Cluster, ClusterPlan, Node, NodePlan
from turbofit.core.errors import UsageError
from turbofit.core.machine import Calibration, CardSpeed, Measured
from turbofit.core.plan import Limits, Plan
from turbofit.core.units import GIB, MIB
from turbofit.core.version import __version__
from turbofit.tuner.cluster.cluster_plan import kinds_of


def serving(plan: ClusterPlan) -> list[str]:
    return [one.name for one in plan.nodes if one.plan is not None]


def why(plan: ClusterPlan, name: str) -> str:
    return next(one.why_not for one in plan.nodes if one.name == name)


def own(one: NodePlan) -> Plan:
    assert one.plan is not None
    return one.plan


@pytest.mark.slow
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


@pytest.mark.slow
def test_sums_least_and_shares() -> None:
    plan = api.plan_cluster(
        "internvl2-8b", cluster("8xh100", "2xrtx3090", "2xrtx3090"), concurrency=64
    )
    plans = [own(one) for one in plan.nodes]
    assert plan.fits
    assert plan.engines == sum(one.parallel.replicas for one in plans)
    assert plan.total_tokens == sum(one.kv.total_tokens for one in plans)
    assert plan.longest_request_tokens == min(one.kv.longest_request_tokens for one in plans)
    assert plan.limits is not None
    for field in fields(Limits):
        values = [getattr(one.limits, field.name) for one in plans]
        least = getattr(plan.limits, field.name)
        assert least == (min(values) if isinstance(least, int) else values[0])
    assert sum(one.at_once for one in plan.nodes) == pytest.approx(64)
    assert plan.nodes[0].at_once > 4 * plan.nodes[1].at_once
    assert plan.throughput is not None
    each = [one.throughput.requests_per_second for one in plans if one.throughput]
    assert plan.throughput.requests_per_second == pytest.approx(sum(each), abs=1e-3)


@pytest.mark.slow
def test_asked_images_come_before_more_nodes() -> None:
    nodes = cluster("1xrtx4090", "1xl4:free=19GiB", "1xl4:free=19GiB")
    plan = api.plan_cluster("qwen2-vl-7b", nodes)
    assert plan.limits is not None
    assert serving(plan) == ["host-1"]
    assert plan.limits.max_pixels_per_image == 12845056
    assert "12,845,056 are promised" in why(plan, "host-2")
    asked = api.plan_cluster("qwen2-vl-7b", nodes, concurrency=12, max_pixels=4_000_000)
    assert serving(asked) == ["host-1", "host-2", "host-3"]
    assert asked.limits is not None
    assert asked.limits.max_pixels_per_image == 4_000_000


@pytest.mark.slow
def test_where_no_node_serves_the_asked_images_the_largest_of_any_node_is_promised() -> None:
    many = cluster("1xl4:free=19GiB", *["1xl4:free=18.9GiB"] * 9)
    plan = api.plan_cluster("qwen2-vl-7b", many)
    lone = api.plan("qwen2-vl-7b", on="1xl4:free=19GiB")
    assert serving(plan) == ["host-1"]
    assert plan.limits is not None
    assert plan.limits.max_pixels_per_image == lone.limits.max_pixels_per_image < 12845056
    assert any("none serves the model's own" in text for text in plan.reasons)
    assert plan.remedies == ()


@pytest.mark.slow
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


@pytest.mark.slow
def test_where_none_holds_the_whole_context_the_longest_of_any_node_is_promised() -> None:
    nodes = cluster("1xl4:free=20GiB", "1xl4:free=19.5GiB")
    plan = api.plan_cluster("internvl2-8b", nodes)
    assert serving(plan) == ["host-1"]
    assert own(plan.nodes[0]).settings.session_len == plan.longest_request_tokens


@pytest.mark.slow
def test_an_asked_context_leaves_out_who_does_not_hold_it() -> None:
    nodes = cluster("2xrtx3090", "2xrtx2080ti")
    plan = api.plan_cluster("internvl2-8b", nodes, context=32500, concurrency=24)
    assert serving(plan) == ["host-1"]
    assert plan.longest_request_tokens == 32500
    assert "32500" in why(plan, "host-2")


@pytest.mark.slow
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


@pytest.mark.slow
def test_nothing_fits_and_what_would() -> None:
    plan = api.plan_cluster("internvl2-8b", cluster("1xt4"))
    assert not plan.fits
    assert plan.limits is None
    assert plan.engines == 0
    assert plan.throughput is None
    assert "on none of 1 node" in plan.verdict
    assert any("AWQ" in one.change and one.effect.startswith("1 node of") for one in plan.remedies)
    assert not api.plan_cluster("internvl2-8b", Cluster(source="", nodes=())).fits


@pytest.mark.slow
def test_what_no_node_can_be_asked_is_an_error() -> None:
    with pytest.raises(UsageError, match="--tp 3"):
        api.plan_cluster("internvl2-8b", cluster("4xrtx3090", "2xrtx3090"), tp=3)
    plan = api.plan_cluster("internvl2-8b", cluster("4xrtx3090", "1xrtx4090"), tp=2)
    assert serving(plan) == ["host-1"]
    assert "--tp 2" in why(plan, "host-2")


@pytest.mark.slow
def test_transformers_is_never_mixed_with_lmdeploy() -> None:
    plan = api.plan_cluster("internvl2-8b", cluster("2xrtx3090", "1xt4"))
    assert {own(one).engine.name for one in plan.nodes if one.plan} == {"turbomind"}
    alone = api.plan_cluster("llava-onevision-7b", cluster("2xa100", "1xa100-80g"))
    assert {own(one).engine.name for one in alone.nodes} == {"transformers"}
    assert alone.throughput is None
    assert sum(one.at_once for one in alone.nodes) == 2


@pytest.mark.slow
def test_equal_nodes_are_planned_once_and_each_has_its_own_names() -> None:
    nodes = tuple(node(k, "2xrtx3090", [0, 3 * MIB]) for k in range(1, 4))
    plan = api.plan_cluster("internvl2-8b", Cluster(source="", nodes=nodes))
    assert [bool(own(one).considered) for one in plan.nodes] == [True, False, False]
    for given, one in zip(nodes, plan.nodes, strict=True):
        made, machine = own(one), given.machine
        assert machine is not None
        assert made.machine == machine
        assert [ledger.uuid for ledger in made.gpus] == [gpu.uuid for gpu in machine.gpus]
        devices = {command.env["CUDA_VISIBLE_DEVICES"] for command in made.commands}
        assert all(text.startswith(f"GPU-{one.name[-1]}-") for text in devices)


@pytest.mark.slow
def test_with_a_concurrency_a_node_is_told_of_the_images_that_it_would_serve() -> None:
    """Not why the engine of the promise fails on it."""
    nodes = cluster("1xrtx4090", "1xl4:free=19GiB")
    plan = api.plan_cluster("qwen2-vl-7b", nodes, concurrency=2)
    assert serving(plan) == ["host-1"]
    assert "pixels at most, 12,845,056 are promised" in why(plan, "host-2")


@pytest.mark.slow
def test_all_limits_that_make_a_refusal_are_equal_on_all_nodes() -> None:
    plan = api.plan_cluster("internvl2-8b", cluster("8xh100", "1xl4"), concurrency=40)
    limits = {
        replace(own(one).limits, units_per_forward=0) for one in plan.nodes if one.plan is not None
    }
    assert len(limits) == 1
    lengths = {own(one).kv.longest_request_tokens for one in plan.nodes}
    assert lengths == {plan.longest_request_tokens}


@pytest.mark.slow
def test_few_requests_for_many_engines_are_said() -> None:
    plan = api.plan_cluster("internvl2-8b", cluster(*["4xrtx3090"] * 5), concurrency=2)
    assert any("5 engines for 2 requests" in text for text in plan.reasons)


@pytest.mark.slow
def test_host_memory_lowers_the_engines_instead_of_refusing_the_node() -> None:
    plan = api.plan("glm-4v-9b", on="8xh100,ram=34GiB", concurrency=8)
    assert plan.fits
    assert plan.host.available == 34 * GIB
    assert any("host memory does not do" in text for text in plan.reasons)


@pytest.mark.slow
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
        assert one.plan is not None
        assert one.plan.held.requests >= one.at_once - 1e-6
        assert one.at_once != pytest.approx(held / 3)
    assert plan.held.requests >= held
    assert not api.plan_cluster("internvl2-8b", nodes, concurrency=held + 1).fits


def test_a_like_node_gets_the_same_settings() -> None:
    plan = api.plan_cluster("internvl2-8b", cluster("4xrtx3090", "4xrtx3090"), concurrency=24)
    joined = joining(plan, node(3, "4xrtx3090"))
    first = plan.nodes[0].plan
    assert joined.plan is not None
    assert first is not None
    assert joined.at_once == 12
    assert joined.plan.settings.session_len == plan.longest_request_tokens
    assert joined.plan.limits.max_dynamic_patch == first.limits.max_dynamic_patch
    assert joined.plan.limits.n >= (plan.limits.n if plan.limits else 0)
    assert len(joined.plan.commands) == joined.plan.parallel.replicas
    assert joined.cards == "4x NVIDIA GeForce RTX 3090"
    assert joined.plan.throughput is not None


def test_a_context_that_is_too_short_is_told() -> None:
    plan = api.plan_cluster("internvl2-8b", cluster("8xh100"))
    joined = joining(plan, node(2, "2xrtx2080ti"))
    assert joined.plan is None
    assert "--context 32768: the cache holds 22528 tokens" in joined.why_not


def test_images_that_are_too_small_are_told() -> None:
    plan = api.plan_cluster("qwen2-vl-7b", cluster("8xh100"), context=17408)
    joined = joining(plan, node(2, "1xl4:free=19GiB"))
    assert joined.plan is None
    assert "runs out of memory while loading" in joined.why_not


def test_a_lower_promise_is_kept_by_a_node_that_could_more() -> None:
    plan = api.plan_cluster("qwen2-vl-7b", cluster("1xl4:free=19GiB"))
    joined = joining(plan, node(2, "2xa100"))
    assert plan.limits is not None
    assert joined.plan is not None
    assert joined.plan.limits.max_pixels_per_image == plan.limits.max_pixels_per_image
    assert joined.plan.settings.session_len == plan.longest_request_tokens


def test_answers_a_request_are_part_of_the_promise() -> None:
    plan = api.plan_cluster("internvl2-8b", cluster("1xrtx4090"), concurrency=12)
    assert plan.limits is not None
    assert plan.limits.n == 12
    joined = joining(plan, node(2, "1xrtx4090"))
    assert joined.plan is not None
    assert joined.plan.limits.n >= 12


def test_a_node_of_more_engines_has_the_promised_answers_on_each() -> None:
    plan = api.plan_cluster("internvl2-26b", cluster("2xa100-40g"))
    joined = joining(plan, node(2, "2xa100-80g"))
    assert plan.limits is not None
    assert joined.plan is not None
    assert joined.plan.parallel.replicas == 2
    assert joined.plan.limits.n == plan.limits.n


def test_settings_of_the_cluster_are_kept() -> None:
    plan = api.plan_cluster("internvl2-8b", cluster("2xrtx3090"), session_len=8192)
    joined = joining(plan, node(2, "2xrtx3090"), session_len=8192)
    assert joined.plan is not None
    assert joined.plan.settings.session_len == 8192


def test_who_cannot_join_at_all() -> None:
    plan = api.plan_cluster("internvl2-8b", cluster("2xrtx3090"))
    assert "turbofit 9" in joining(plan, node(2, "2xrtx3090", turbofit="9")).why_not
    assert "runs out of memory" in joining(plan, node(2, "1xt4")).why_not
    nothing = api.plan_cluster("internvl2-8b", Cluster(source="", nodes=()))
    assert "nothing is promised" in joining(nothing, node(2, "2xrtx3090")).why_not
    gone = replace(node(2, "2xrtx3090"), machine=None, why_not="no GPU")
    assert joining(plan, gone).why_not == "no GPU"


def test_a_node_of_the_plan_has_the_share_that_it_has_there() -> None:
    """It is planned again where the plan changes, and is no node more."""
    plan = api.plan_cluster("internvl2-8b", cluster("4xrtx3090", "4xrtx3090"), concurrency=24)
    again = joining(plan, node(1, "4xrtx3090"))
    assert again.node == plan.nodes[0].node
    assert again.at_once == plan.nodes[0].at_once == 12


def test_nodes_that_run_unlike_engines_are_told_of() -> None:
    plan = api.plan_cluster("qwen3.5-9b", cluster("1xh100", "1xrtx4090"))
    assert {own(member).engine.name for member in plan.nodes} == {"turbomind", "pytorch"}
    assert "nodes run pytorch and turbomind: answers may differ in wording" in plan.warnings


def test_nodes_of_the_plan_hold_what_it_counts_on() -> None:
    machines = cluster("2xrtx3090", "1xl4", "2xrtx4090")
    plan = api.plan_cluster("qwen2.5-vl-7b", machines, concurrency=30)
    for given, member in zip(machines.nodes, plan.nodes, strict=True):
        joined, planned = own(joining(plan, given, concurrency=30)), own(member)
        assert (joined.settings, joined.kv) == (planned.settings, planned.kv)


def test_a_node_that_holds_less_than_its_share_joins_where_that_is_no_promise() -> None:
    plan = api.plan_cluster("internvl2-8b", cluster("1xrtx4090"), concurrency=12)
    joined = joining(plan, node(2, "1xrtx3090:used=1GiB"))
    assert joined.plan is not None
    assert joined.plan.held is UNSET


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
