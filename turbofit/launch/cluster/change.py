"""A change of plan while clients are served: node by node, and back again where it fails.

While engines of both plans serve, requests are held to what both keep. A node's engines finish what
they have, end, and start with the new plan; the next node is touched once they are ready. So a
cluster of one node pauses, and one of many is short of one node at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.gateway.limits.intersect import intersect
from turbofit.launch.cluster.node_state import outcome
from turbofit.launch.cluster.promise import bounds_of_cluster, in_words

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

    from turbofit.core.cluster import ClusterPlan, NodePlan
    from turbofit.launch.cluster.controller import Controller
    from turbofit.launch.cluster.node_state import NodeState
    from turbofit.planning.request import PlanRequest

__all__ = ["changed"]


def changed(
    controller: Controller, target: ClusterPlan, request: PlanRequest
) -> Generator[None, None, None]:
    """The steps from what is served to another plan of the same model.

    Args:
        controller: what is served.
        target: the plan to come.
        request: what it was made for.
    """
    before, config = controller.plan, controller.config
    controller.bounds = intersect(controller.bounds, bounds_of_cluster(target))
    controller.plan, controller.config = target, config.changed(request=request)
    controller.say(f"a change of plan begins: {in_words(before)} -> {in_words(target)}")
    moved: dict[str, NodePlan] = {}
    while node_states := _behind(controller):
        done = sum(one.promised is target for one in controller.node_states.values())
        controller.change = f"{done} of {done + len(node_states)} nodes have the new plan"
        node_state = node_states[0]
        moved[node_state.node.id] = node_state.plan
        why = yield from _moved(controller, node_state)
        if why:
            controller.plan, controller.config = before, config
            yield from _undone(controller, moved, why)
            return
    controller.widen()
    controller.change = ""
    controller.say(f"the plan has changed: {in_words(target)}")


def _behind(controller: Controller) -> list[NodeState]:
    """Nodes that were planned for another promise than the controller's, and nodes that came later.

    One that joins is not among them: what was planned for it is looked at when it is done.
    """
    return [
        node_state
        for node_state in controller.node_states.values()
        if node_state.state in ("serving", "unfit") and node_state.promised is not controller.plan
    ]


def _undone(
    controller: Controller, moved: Mapping[str, NodePlan], why: str
) -> Generator[None, None, None]:
    """Back to the plan before, on every node that has the new one."""
    controller.say(f"the new plan does not hold, going back: {why}")
    controller.change = f"going back: {why}"
    while node_states := _behind(controller):
        yield from _moved(controller, node_states[-1], moved.get(node_states[-1].node.id))
    controller.widen()
    controller.change = f"given up: {why}"
    controller.say("the plan before is served again")


def _moved(
    controller: Controller, node_state: NodeState, known: NodePlan | None = None
) -> Generator[None, None, str]:
    """One node to the controller's plan, or a known one; why its engines failed, or nothing."""
    node_state.state = "changing"
    controller.empty(node_state)
    controller.say(f"node {node_state.node.name}: its engines finish what they have")
    while _stays(controller, node_state) and not controller.idle(node_state):
        yield
    while _stays(controller, node_state) and not controller.closed(node_state):
        yield
    if not _stays(controller, node_state):
        return ""
    work = controller.measure(node_state, known)
    while _stays(controller, node_state) and not work.done():
        yield
    if not _stays(controller, node_state):
        return ""
    controller.settle(node_state, outcome(work, node_state))
    planned = controller.plan.node(node_state.node.id)
    if not node_state.replicas and planned is not None and planned.plan is not None:
        return f"node {node_state.node.name} does not serve: {node_state.why_not}"
    while (
        node_state.node.id in controller.node_states
        and node_state.replicas
        and not node_state.ready
    ):
        if node_state.failed:
            return node_state.failed
        yield
    return ""


def _stays(controller: Controller, node_state: NodeState) -> bool:
    """Whether a node is still there, and is not being drained."""
    return node_state.node.id in controller.node_states and node_state.state == "changing"
