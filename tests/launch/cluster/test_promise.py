"""What a cluster's plan means for gateways and engines."""

from __future__ import annotations

from typing import Any

import pytest

from turbofit import api
from turbofit.core.cluster import Cluster, ClusterPlan, Node
from turbofit.core.errors import UsageError
from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.limits.request_limits import bounds_of
from turbofit.gateway.routing.fleet_updater import check_gateways
from turbofit.launch.cluster.promise import (
    bounds_of_cluster,
    engine_specs_of,
    expected_routing_table,
    in_words,
    share_of,
)
from turbofit.launch.serve.config import ClusterServeConfig
from turbofit.machine.spec import parse_spec
from turbofit.planning.plan import plan as best_plan
from turbofit.planning.request import PlanRequest


def planned(*specs: str, model: str = "internvl2-2b", **keywords: object) -> ClusterPlan:
    """A plan over nodes with these machines."""
    nodes = tuple(
        Node(id=f"{n:08x}", name=f"n{n}", address=f"10.0.0.{n}", machine=parse_spec(spec))
        for n, spec in enumerate(specs)
    )
    return api.plan_cluster(model, Cluster(source="test", nodes=nodes), **keywords)


def request(**given: Any) -> PlanRequest:
    """What is asked for, without a machine."""
    return PlanRequest(model="internvl2-2b", **given)


def config(*, gateways: int = 1, **given: Any) -> ClusterServeConfig:
    """As `serve` makes it."""
    return ClusterServeConfig(
        request=request(**given), rehearse=False, gateways=gateways,
        gateway=GatewayConfig(api_keys=("secret",)),
    )  # fmt: skip


@pytest.fixture(scope="module")
def plan() -> ClusterPlan:
    """Two kinds of nodes."""
    return planned("2xrtx3090", "1xrtx4090", context=16384)


def test_bounds_admit_only_what_every_node_does(plan: ClusterPlan) -> None:
    """Of every limit the lowest."""
    bounds = bounds_of_cluster(plan)
    for node in plan.nodes:
        assert node.plan is not None
        own = bounds_of(node.plan)
        assert bounds.longest_request_tokens <= own.longest_request_tokens
        assert bounds.limits.units_per_request <= own.limits.units_per_request
        assert bounds.limits.units_per_image <= own.limits.units_per_image


@pytest.mark.parametrize(
    ("asked", "concurrency", "batch"),
    [
        ({"concurrency": 3}, 2, None),
        ({"concurrency": 2, "max_batch_size": 1}, 1, 1),
        ({"max_batch_size": 5}, None, 5),
    ],
)
def test_an_engine_that_is_planned_again_keeps_its_share_of_what_was_promised(
    asked: dict[str, int], concurrency: int | None, batch: int | None
) -> None:
    """A share of requests is no whole number. What nobody asked for is a batch, and no promise."""
    asked = {"context": 16384, **asked}
    plan = planned("2xrtx3090", **asked)
    specs = engine_specs_of(plan.nodes[0], plan, config(**asked), here=False, peers=())
    for spec in specs:
        again = spec.config.request
        assert again is not None
        assert (again.concurrency, again.max_batch_size) == (concurrency, batch)
        assert best_plan(again.changed(on="1xrtx3090", tp=1, replicas=1)).fits


def test_engine_specs_keep_the_promise(plan: ClusterPlan) -> None:
    """Each engine has a key of its own, its cards, and what it must keep when planned again."""
    node = plan.nodes[0]
    given = config(goal="latency", tp=1, concurrency=80)
    engine_specs = engine_specs_of(node, plan, given, here=False, peers=("10.0.0.9",))
    assert [engine_spec.name for engine_spec in engine_specs] == ["n0-00000000/0", "n0-00000000/1"]
    assert len({engine_spec.key for engine_spec in engine_specs}) == 2
    assert all(len(engine_spec.key) == 64 for engine_spec in engine_specs)
    assert {engine_spec.listen for engine_spec in engine_specs} == {"10.0.0.0"}
    assert "secret" not in repr(engine_specs)  # clients' keys do not leave the gateways
    kept = engine_specs[0].config.request
    assert kept.context == plan.longest_request_tokens
    assert kept.max_dynamic_patch == plan.limits.max_dynamic_patch  # type: ignore[union-attr]
    assert kept.goal == "latency"
    assert kept.tp is None
    # A plan holds what is asked for: the engine alone fits again.
    again = best_plan(kept.changed(on=engine_specs[0].plan.machine))
    assert again.fits
    assert again.kv.longest_request_tokens >= plan.longest_request_tokens


def test_the_gateways_own_node_stays_on_loopback(plan: ClusterPlan) -> None:
    """Unless there are gateways elsewhere."""
    (engine_spec,) = engine_specs_of(plan.nodes[1], plan, config(), here=True, peers=())
    assert engine_spec.listen == ""
    several = config(gateways=2)
    (engine_spec,) = engine_specs_of(plan.nodes[1], plan, several, here=True, peers=())
    assert engine_spec.listen == "10.0.0.1"


def test_shares_add_up(plan: ClusterPlan) -> None:
    """A node's engines have its requests among them."""
    for node in plan.nodes:
        assert node.plan is not None
        shares = [share_of(node, group) for group in range(len(node.plan.parallel.groups))]
        assert sum(shares) == pytest.approx(node.at_once)


def test_how_many_gateways_can_share(plan: ClusterPlan) -> None:
    """As many as leave each a request at its limits."""
    check_gateways(expected_routing_table(plan, 1))
    with pytest.raises(UsageError, match="gateways share"):
        check_gateways(expected_routing_table(plan, 100_000))


def test_the_promise_in_words(plan: ClusterPlan) -> None:
    """A line."""
    assert in_words(plan) == "16,384 tokens a request, 1 image of 13 tiles at most"
    text = planned("1xrtx3090", images=0)
    assert in_words(text).endswith("tokens a request")
