"""What a cluster's plan means for its gateways and for each engine."""

from __future__ import annotations

import secrets
from functools import reduce
from math import ceil
from typing import TYPE_CHECKING

from msgspec import UNSET
from msgspec.structs import replace

from turbofit.core.messages import plural
from turbofit.launch.cluster.alone import alone
from turbofit.launch.cluster.engine_spec import EngineSpec

if TYPE_CHECKING:
    from turbofit.core.cluster import ClusterPlan, NodePlan
    from turbofit.core.plan import Plan
    from turbofit.gateway.limits.request_limits import Bounds
    from turbofit.gateway.routing.routing_table import Member, RoutingTable
    from turbofit.launch.serve.config import ClusterServeConfig
    from turbofit.planning.request import PlanRequest

__all__ = [
    "bounds_of_cluster",
    "engine_specs_of",
    "expected_members",
    "expected_routing_table",
    "in_words",
    "share_of",
]


def bounds_of_cluster(plan: ClusterPlan) -> Bounds:
    """What requests are held to, so that each may go to any engine."""
    from turbofit.gateway.limits.intersect import intersect
    from turbofit.gateway.limits.request_limits import bounds_of

    plans = [node.plan for node in plan.nodes if node.plan is not None]
    # Nodes of one kind have one set of bounds: a thousand of them are a few.
    distinct = {(p.limits, p.kv.longest_request_tokens, p.engine.name): p for p in plans}
    bounds = reduce(intersect, [bounds_of(one) for one in distinct.values()])
    longest = min(bounds.longest_request_tokens, plan.longest_request_tokens)
    return replace(bounds, longest_request_tokens=longest)


def expected_members(node: NodePlan) -> list[Member]:
    """What gateways would be told of a node's engines, but for where they are."""
    from turbofit.gateway.config import host_budget
    from turbofit.gateway.limits.request_limits import bounds_of
    from turbofit.gateway.routing.routing_table import Member

    if node.plan is None:
        return []
    host = host_budget(node.plan, bounds_of(node.plan))
    return [
        Member(
            name=f"{node.name}-{node.node[:8]}/{group}",
            url="",
            share=share_of(node, group),
            gate=bounds_of(group_plan).gate,
            host_bytes=host,
        )
        for group, group_plan in enumerate(node.plan.each())
    ]


def expected_routing_table(plan: ClusterPlan, gateways: int) -> RoutingTable:
    """What gateways would be told of a plan: whether that many can share its limits."""
    from turbofit.gateway.routing.routing_table import RoutingTable

    members = tuple(member for node in plan.nodes for member in expected_members(node))
    bounds = bounds_of_cluster(plan)
    return RoutingTable(number=0, bounds=bounds, members=members, gateways=gateways)


def engine_specs_of(
    node: NodePlan,
    plan: ClusterPlan,
    config: ClusterServeConfig,
    *,
    here: bool,
    peers: tuple[str, ...],
) -> list[EngineSpec]:
    """The engines of a node.

    Args:
        node: what it serves.
        plan: whose promise an engine keeps when it must be planned again.
        config: of the run.
        here: whether the node is the gateway's own; where that is the only gateway, engines there
            stay on loopback.
        peers: the gateways' addresses.
    """
    assert node.plan is not None
    return [
        EngineSpec(
            name=member.name,
            plan=alone(node.plan, group),
            key=secrets.token_hex(32),
            listen="" if here and config.gateways == 1 else node.address,
            peers=peers,
            # Clients' keys do not leave the gateways.
            config=config.changed(
                request=_kept(node.plan, plan, config.request, member.share), gateway=None
            ),
        )
        for group, member in enumerate(expected_members(node))
    ]


def share_of(node: NodePlan, group: int) -> float:
    """The workload's requests that are at one engine at any time, on average."""
    assert node.plan is not None
    count = len(node.plan.parallel.groups)
    shares = [one.at_once for one in node.plan.by_group]
    if len(shares) != count or not sum(shares):
        return max(node.at_once, 1e-6) / count
    return max(node.at_once, 1e-6) * shares[group] / sum(shares)


def in_words(plan: ClusterPlan) -> str:
    """The promise, in a line."""
    limits = plan.limits
    text = f"{plan.longest_request_tokens:,} tokens a request"
    if limits is None or limits.vision_unit is None:
        return text
    units = plural(limits.units_per_image, limits.vision_unit)
    images = f"{limits.images_per_request} {plural(limits.images_per_request, 'image')}"
    return f"{text}, {images} of {limits.units_per_image:,} {units} at most"


def _kept(engine_plan: Plan, plan: ClusterPlan, request: PlanRequest, share: float) -> PlanRequest:
    """The request for one engine that must be planned again: the promise stays.

    Its share of the requests is a promise where the node's plan holds it as one.
    """
    requests: int | None = max(1, ceil(share))
    if engine_plan.held is UNSET:
        request = request.changed(max_batch_size=request.max_batch_size or requests)
        requests = None
    request = request.changed(
        tp=None, replicas=None, on=None, gpus=None, engine="auto", concurrency=requests
    )
    if request.session_len is None:
        request = request.changed(context=plan.longest_request_tokens)
    rule, limit = engine_plan.model.image_rule, engine_plan.limits.image_limit
    if rule is not None and limit is not None:
        request = request.changed(**{rule.limit_name: limit})
    return request
