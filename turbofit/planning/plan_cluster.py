"""Plans several machines under one promise, and a node that joins later."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.machine import Machine
from turbofit.planning.checks import plan_warnings
from turbofit.planning.commands import cluster_serve_command, commands
from turbofit.planning.examine.scene import Sources
from turbofit.planning.resolve import resolve
from turbofit.tuner.cluster_plan import make_cluster_plan, plan_joining_node

if TYPE_CHECKING:
    from turbofit.core.cluster import Cluster, ClusterPlan, Node, NodePlan
    from turbofit.planning.request import PlanRequest
    from turbofit.tuner.resolved_request import ResolvedRequest


def plan_cluster(request: PlanRequest, cluster: Cluster) -> ClusterPlan:
    """One promise over several machines, and the best plan for each of them.

    The request names no machine; its ``tp`` and ``replicas`` are for each node, its ``concurrency``
    is for all nodes together.

    Raises:
        As :func:`turbofit.planning.plan.plan`, if every node raises an error.
    """
    if request.paced:
        raise UsageError(
            "a rate and its seconds are for one machine, not for a cluster",
            hint="plan one kind of node with --on, and its part of the rate",
        )
    cluster_plan = make_cluster_plan(_anywhere(request), cluster, request.engine)
    nodes = tuple(_commanded(node) for node in cluster_plan.nodes)
    cluster_plan = replace(cluster_plan, nodes=nodes)
    return replace(cluster_plan, serve=cluster_serve_command(cluster_plan, request))


def plan_joining(request: PlanRequest, plan: ClusterPlan, node: Node) -> NodePlan:
    """The plan of a node that joins later, or the reason why it cannot keep the promise.

    ``request`` is the one that the cluster was planned with; model and promise do not change.
    """
    resolved = _anywhere(request.changed(model=plan.model, revision=None))
    return _commanded(plan_joining_node(resolved, plan, node, request.engine))


def _anywhere(request: PlanRequest) -> ResolvedRequest:
    """The resolved request without a machine; each node is then used as the machine."""
    nowhere = Machine(name="cluster", source="cluster", gpus=())
    return resolve(request.changed(on=nowhere, gpus=None))


def _commanded(node: NodePlan) -> NodePlan:
    """A node's plan with its command lines, without warnings from this process's environment."""
    if node.plan is None:
        return node
    warnings = (*node.plan.warnings, *plan_warnings(node.plan, Sources({})))
    commanded = replace(node.plan, commands=commands(node.plan), warnings=warnings)
    return replace(node, plan=commanded)
