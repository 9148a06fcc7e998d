"""The doors for clusters: one promise over several machines, and nodes that join later.

What plans clusters is imported when it is first used: every other plan would wait for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from turbofit.core.machine import Machine
from turbofit.launch.asked import asked_of, checked, workload_of
from turbofit.launch.fallback.command import any_commands
from turbofit.launch.needs import need_warning

if TYPE_CHECKING:
    from typing import Any

    from turbofit.core.cluster import Cluster, ClusterPlan, Node, NodePlan
    from turbofit.core.model import Model
    from turbofit.core.plan import Goal

__all__ = ["plan_cluster", "plan_joining"]


def plan_cluster(
    model: str | Model,
    cluster: Cluster,
    *,
    tp: int | None = None,
    replicas: int | None = None,
    images: int = 1,
    image_size: tuple[int, int] | None = None,
    context: int | None = None,
    concurrency: int = 8,
    goal: Goal = "throughput",
    queue_images: bool = False,
    max_dynamic_patch: int | None = None,
    max_pixels: int | None = None,
    engine: str = "auto",
    margin: int | str | None = None,
    budget: int | str | None = None,
    revision: str | None = None,
    **settings: Any,
) -> ClusterPlan:
    """One promise over several machines, and the best plan of each under it.

    Args as for :func:`turbofit.api.plan`, and:
        cluster: the nodes as they were measured; each is planned for its own cards.
        tp: GPUs of one engine, on every node.
        replicas: engines side by side, on each node.
        concurrency: requests at once over all nodes.

    Returns:
        The plan, whether any node serves or not.

    Raises:
        As :func:`turbofit.api.plan`, where it is so on every node.
    """
    from turbofit.launch.cluster.span import span_commands
    from turbofit.tuner.cluster.plan import make_cluster_plan

    ask = asked_of(model, _nowhere(), None, revision, margin, budget, settings)
    ask = replace(
        ask,
        workload=workload_of(images, image_size, context, concurrency, goal, queue_images),
        tp=tp,
        replicas=replicas,
        max_dynamic_patch=max_dynamic_patch,
        max_pixels=max_pixels,
    )
    made = make_cluster_plan(checked(ask), cluster, engine)
    nodes = tuple(_commanded(node) for node in made.nodes)
    spans = tuple(replace(span, commands=span_commands(span, cluster)) for span in made.spans)
    return replace(made, nodes=nodes, spans=spans)


def plan_joining(
    plan: ClusterPlan,
    node: Node,
    *,
    tp: int | None = None,
    replicas: int | None = None,
    max_dynamic_patch: int | None = None,
    max_pixels: int | None = None,
    engine: str = "auto",
    margin: int | str | None = None,
    budget: int | str | None = None,
    **settings: Any,
) -> NodePlan:
    """The plan of a node that joins a cluster later; what is promised, and all others, stay.

    Args as :func:`plan_cluster` was given them, and:
        plan: what is served; its model, workload and promise are kept.
        node: as it was measured.

    Returns:
        Its plan, or why it cannot serve what is promised.

    Raises:
        UsageError: a setting that turbofit does not know.
    """
    from turbofit.tuner.cluster.joining import plan_joining_node

    ask = asked_of(plan.model, _nowhere(), None, None, margin, budget, settings)
    ask = replace(
        ask, tp=tp, replicas=replicas, max_dynamic_patch=max_dynamic_patch, max_pixels=max_pixels
    )
    return _commanded(plan_joining_node(ask, plan, node, engine))


def _commanded(node: NodePlan) -> NodePlan:
    """A node's plan with its command lines; this process's environment says nothing of it."""
    if node.plan is None:
        return node
    need = need_warning(node.plan)
    warnings = (*node.plan.warnings, need) if need else node.plan.warnings
    made = replace(node.plan, commands=any_commands(node.plan), warnings=warnings)
    return replace(node, plan=made)


def _nowhere() -> Machine:
    """What an ask has in the machine's place until it is asked of a node."""
    return Machine(name="cluster", source="cluster", gpus=())
