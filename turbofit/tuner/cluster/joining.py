"""A node that joins a cluster which already serves: planned under the promise that clients know."""

from __future__ import annotations

from math import ceil
from typing import Final

from msgspec.structs import fields, replace

from turbofit.core.cluster import ClusterPlan, Node, NodePlan
from turbofit.core.plan import Limits, Plan
from turbofit.tuner.cluster import messages
from turbofit.tuner.cluster.fitness import why_unusable
from turbofit.tuner.cluster.kind_planner import KindPlanner, Promise
from turbofit.tuner.cluster.kinds import kinds_of
from turbofit.tuner.resolved_request import ResolvedRequest
from turbofit.tuner.speed.throughput import total

__all__ = ["plan_joining_node"]

#: Batches that are tried until one holds the promised answers a request.
_TRIES: Final = 4


def plan_joining_node(
    base: ResolvedRequest, plan: ClusterPlan, node: Node, engine: str = "auto"
) -> NodePlan:
    """What a node serves under a plan's promise, without the command lines; no other node changes.

    Args:
        base: as the plan was asked for; its machine and workload are not read.
        plan: what is promised.
        node: as it was measured.
        engine: as the plan was asked for.

    Returns:
        Its plan, or why it cannot serve.
    """
    cards = messages.cards_of(node.machine)
    made = NodePlan(node=node.id, name=node.name, address=node.address, cards=cards)
    why = why_unusable(node)
    if not why and plan.limits is None:
        why = "nothing is promised: no node served"
    if why:
        return replace(made, why_not=why)
    share = _share(plan, node)
    base = _with_promises(base, plan, share)
    planner = KindPlanner(base, kinds_of([node], exact=True)[0], engine)
    requests = share
    for _ in range(_TRIES):
        tried = planner.plan(0, requests, _promise(base, plan))
        why = tried.why_not or _breaks(planner, plan, tried.serves)
        if not why:
            node_plan = tried.serves
            each = planner.speed(node_plan).engines(share)
            if each:
                node_plan = replace(node_plan, throughput=total(each, node_plan.machine.measured))
            return replace(made, plan=node_plan, at_once=share)
        if tried.why_not or plan.limits is None or tried.serves.limits.n >= plan.limits.n:
            break
        # Answers a request come from the batch: it is planned for more requests than will come.
        requests = ceil(requests) * (1 + plan.limits.n // tried.serves.limits.n)
    return replace(made, why_not=_plainly(planner, plan, share) or why)


def _with_promises(base: ResolvedRequest, plan: ClusterPlan, share: float) -> ResolvedRequest:
    """The plan's workload; its context is asked for only where the session's length is not set.

    Its share of the requests is planned for even where others have the best batch, as answers a
    request come from the batch. It is no promise: the others hold all that was asked for.
    """
    context = None if "session_len" in base.fixed else plan.longest_request_tokens
    requests = plan.workload.concurrency or max(1, ceil(share))
    workload = replace(plan.workload, context=context, concurrency=requests)
    return replace(base, workload=workload, load_only=True)


def _promise(base: ResolvedRequest, plan: ClusterPlan) -> Promise:
    assert plan.limits is not None
    return Promise(limit=plan.limits.image_limit, context=base.workload.context)


def _share(plan: ClusterPlan, node: Node) -> float:
    """The requests that a node with as many cards has on average, were it there from the start.

    One that the plan has already is not counted twice.
    """
    machine = node.machine
    assert machine is not None
    used = [one for one in plan.nodes if one.plan is not None and one.node != node.id]
    cards = sum(len(one.plan.machine.visible) for one in used if one.plan is not None)
    cards += sum(len(span.plan.gpus) for span in plan.spans)
    joining = len(machine.visible)
    requests = plan.workload.concurrency
    if requests is None:  # each node has the batch that is best on its cards
        running = sum(one.at_once for one in used) + sum(span.at_once for span in plan.spans)
        return max(1.0, running * joining / max(1, cards))
    return requests * joining / (cards + joining)


def _breaks(planner: KindPlanner, plan: ClusterPlan, joining: Plan) -> str:
    """What of the promise a plan does not hold."""
    assert plan.limits is not None
    limit, wanted = joining.limits.image_limit, _promise(planner.base, plan).limit
    if limit is not None and wanted is not None and limit < wanted:
        return messages.too_small(planner, limit, wanted)
    held, promised = joining.kv.longest_request_tokens, plan.longest_request_tokens
    if held < promised:
        return messages.too_short(held, promised)
    for field in fields(Limits):
        least, have = getattr(plan.limits, field.name), getattr(joining.limits, field.name)
        queues = field.name == "units_per_forward"  # its own gateway queue keeps it
        if isinstance(least, int) and isinstance(have, int) and have < least and not queues:
            return f"{field.name} is {have:,} on it, {least:,} are promised"
    served = {one.plan.engine.serial for one in plan.nodes if one.plan is not None}
    if served and joining.engine.serial not in served:
        return (
            f"only {joining.engine.name} serves on it, which is not mixed with LMDeploy's engines"
        )
    return ""


def _plainly(planner: KindPlanner, plan: ClusterPlan, share: float) -> str:
    """What the node would hold if it could promise less."""
    wanted = _promise(planner.base, plan)
    free = KindPlanner(
        replace(planner.base, workload=replace(planner.base.workload, context=None)),
        planner.kinds,
        planner.engine,
    )
    for promise in (Promise(limit=wanted.limit), Promise()):
        tried = free.plan(0, share, promise)
        if not tried.why_not:
            return _breaks(planner, plan, tried.serves)
    return ""
