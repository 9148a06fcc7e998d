"""Plans several machines under one promise."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.machine import Machine
from turbofit.planning.commands import cluster_serve_command
from turbofit.planning.resolve import resolve
from turbofit.tuner.cluster_plan import make_cluster_plan

if TYPE_CHECKING:
    from turbofit.core.cluster import Cluster, ClusterPlan
    from turbofit.planning.request import PlanRequest


def plan_cluster(
    request: PlanRequest, cluster: Cluster, promised: ClusterPlan | None = None
) -> ClusterPlan:
    """One promise over several machines, and the best plan for each of them.

    The request names no machine; its ``tp``, ``replicas`` and ``concurrency`` are for each node.
    ``promised`` is an earlier plan of it, whose promise nodes that join must keep.

    Raises:
        As :func:`turbofit.planning.plan.plan`, if every node raises an error.
    """
    if request.paced:
        raise UsageError(
            "a rate and its seconds are for one machine, not for a cluster",
            hint="plan one kind of node with --on, and its part of the rate",
        )
    nowhere = Machine(name="cluster", source="cluster", gpus=())
    resolved = resolve(request.changed(on=nowhere, gpus=None))
    cluster_plan = make_cluster_plan(resolved, cluster, request.engine, promised)
    return replace(cluster_plan, serve=cluster_serve_command(cluster_plan, request))
