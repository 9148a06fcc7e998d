"""One promise over several machines, and nodes that join later.

What plans clusters is imported when it is first used: every other plan would wait for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.machine import Machine
from turbofit.planning.checks import plan_warnings
from turbofit.planning.commands import commands
from turbofit.planning.examine.scene import Sources
from turbofit.planning.resolve import resolve
from turbofit.planning.serve_command import cluster_serve_command

if TYPE_CHECKING:
    from turbofit.core.cluster import Cluster, ClusterPlan, Node, NodePlan
    from turbofit.planning.request import PlanRequest
    from turbofit.tuner.resolved_request import ResolvedRequest


def plan_cluster(request: PlanRequest, cluster: Cluster) -> ClusterPlan:
    """One promise over several machines, and the best plan of each under it.

    Args:
        request: as for one machine; ``tp`` is on every node, ``replicas`` on each node,
            ``concurrency`` over all nodes. It names no machine.
        cluster: the nodes as they were measured; each is planned for its own cards.

    Returns:
        The plan, whether any node serves or not.

    Raises:
        As :func:`turbofit.planning.plan.plan`, where it is so on every node.
    """
    from turbofit.tuner.cluster.cluster_plan import make_cluster_plan

    if request.paced:
        raise UsageError(
            "a rate and its seconds are for one machine, not for a cluster",
            hint="plan one kind of node with --on, and its part of the rate",
        )
    made = make_cluster_plan(_anywhere(request), cluster, request.engine)
    nodes = tuple(_commanded(node) for node in made.nodes)
    made = replace(made, nodes=nodes)
    return replace(made, serve=cluster_serve_command(made, request))


def plan_joining(request: PlanRequest, plan: ClusterPlan, node: Node) -> NodePlan:
    """The plan of a node that joins a cluster later; what is promised, and all others, stay.

    Args:
        request: what the cluster was planned with; its model and workload are the plan's.
        plan: what is served; its model, workload and promise are kept.
        node: as it was measured.

    Returns:
        Its plan, or why it cannot serve what is promised.
    """
    from turbofit.tuner.cluster.cluster_plan import plan_joining_node

    resolved = _anywhere(request.changed(model=plan.model, revision=None))
    return _commanded(plan_joining_node(resolved, plan, node, request.engine))


def _anywhere(request: PlanRequest) -> ResolvedRequest:
    """The input of the search but for the machine, which each node is."""
    nowhere = Machine(name="cluster", source="cluster", gpus=())
    return resolve(request.changed(on=nowhere, gpus=None))


def _commanded(node: NodePlan) -> NodePlan:
    """A node's plan with its command lines; this process's environment says nothing of it."""
    if node.plan is None:
        return node
    warnings = (*node.plan.warnings, *plan_warnings(node.plan, Sources({})))
    made = replace(node.plan, commands=commands(node.plan), warnings=warnings)
    return replace(node, plan=made)
