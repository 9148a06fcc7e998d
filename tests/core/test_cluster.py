"""Clusters and their plans as JSON, both ways."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from tests.support.plans import machine, model, plausible_plan
from turbofit.core.cluster import Cluster, ClusterPlan, Node, NodePlan
from turbofit.core.errors import UsageError
from turbofit.core.plan import Workload


def plan() -> ClusterPlan:
    node_plan = plausible_plan()
    return ClusterPlan(
        turbofit_version="0.1.0",
        created="2026-11-21T08:00:00Z",
        fits=True,
        verdict="fits",
        model=model(),
        workload=Workload(),
        limits=node_plan.limits,
        longest_request_tokens=node_plan.kv.longest_request_tokens,
        total_tokens=node_plan.kv.total_tokens,
        engines=2,
        nodes=(
            NodePlan(node="a", name="host-a", address="10.0.0.1", plan=node_plan, at_once=8.0),
            NodePlan(node="b", name="host-b", address="10.0.0.2", why_not="no GPU"),
        ),
    )


def test_a_cluster_survives_json() -> None:
    cluster = Cluster(
        source="ray 10.0.0.1:6379",
        nodes=(
            Node(id="a", name="host-a", address="10.0.0.1", machine=machine(), pretend=True),
            Node(id="b", name="host-b", address="10.0.0.2", why_not="no NVML"),
        ),
    )
    assert Cluster.from_json(cluster.to_json()) == cluster


def test_a_plan_survives_json_and_finds_its_nodes() -> None:
    made = plan()
    assert ClusterPlan.from_json(made.to_json()) == made
    found = made.node("b")
    assert found is not None
    assert found.why_not == "no GPU"
    assert made.node("z") is None


@pytest.mark.parametrize("text", ["", "[]", '{"nodes": []}', '{"source": 1, "nodes": []}'])
def test_what_is_no_cluster_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="cluster cannot be read"):
        Cluster.from_json(text)
    with pytest.raises(UsageError, match="mine cannot be read"):
        ClusterPlan.from_json(text, what="mine")


def test_fields_that_came_later_may_be_missing() -> None:
    old = replace(plan(), source="ray")
    text = old.to_json().replace('"source": "ray"', '"unknown": 1')
    assert ClusterPlan.from_json(text).source == ""
