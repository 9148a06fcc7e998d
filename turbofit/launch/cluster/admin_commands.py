"""What other commands ask of a cluster that serves: another plan, a node that is to be emptied."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from turbofit.core.cluster import Cluster
from turbofit.core.errors import DoesNotFitError, LaunchError, TurbofitError, UsageError
from turbofit.gateway.limits.intersect import intersect
from turbofit.gateway.routing.fleet_updater import check_gateways
from turbofit.launch.cluster.change import changed
from turbofit.launch.cluster.promise import bounds_of_cluster, expected_routing_table
from turbofit.planning.cluster import plan_cluster

if TYPE_CHECKING:
    from collections.abc import Callable

    from turbofit.core.cluster import ClusterPlan
    from turbofit.core.json_types import Document
    from turbofit.launch.cluster.controller import Controller
    from turbofit.launch.cluster.node_state import NodeState
    from turbofit.planning.request import PlanRequest

    Answer = Callable[[int, dict[str, Any]], None]

__all__ = ["AdminCommands"]


class AdminCommands:
    """Takes questions and answers them, some of them later.

    Args:
        controller: what serves.
        answer: sends an answer to a question's number.
    """

    def __init__(self, controller: Controller, answer: Answer) -> None:
        self._controller, self._answer = controller, answer
        #: A plan that is being made: the question's number, its request, the future.
        self._planning: tuple[int, PlanRequest, Any] | None = None

    def take(self, number: int, document: Document) -> None:
        """A question."""
        try:
            if document.get("kind") == "change":
                self._change(number, dict(document.get("keywords", {})))
            elif document.get("kind") == "drain":
                node_state = self._node_state(str(document.get("node", "")))
                self._controller.drain(node_state)
                self._answer(number, {"said": f"node {node_state.node.name} finishes what it has"})
            else:
                raise UsageError("nobody knows this question", hint="use one turbofit on all nodes")
        except TurbofitError as exc:
            self._answer(number, exc.to_dict())

    def tick(self) -> None:
        """Go on with what takes longer."""
        if self._planning is None or not self._planning[2].done():
            return
        (number, request, work), self._planning = self._planning, None
        try:
            target: ClusterPlan = work.result()
            self._follow(number, target, request)
        except TurbofitError as exc:
            self._answer(number, exc.to_dict())
        except Exception as exc:  # noqa: BLE001 - a bug of ours must not end what serves
            error = LaunchError(f"planning failed: {type(exc).__name__}: {exc}", hint="report it")
            self._answer(number, error.to_dict())

    def _change(self, number: int, keywords: dict[str, Any]) -> None:
        if self._planning is not None or self._controller.changing:
            raise LaunchError(
                "a change is under way already", hint="see turbofit cluster status, and wait"
            )
        controller = self._controller
        request = controller.config.request.changed(**keywords)
        cluster = Cluster(source=f"ray {controller.connection.address}", nodes=controller.nodes())
        self._planning = number, request, controller.later(lambda: plan_cluster(request, cluster))

    def _follow(self, number: int, target: ClusterPlan, request: PlanRequest) -> None:
        if not target.fits or target.spans:
            hint = "nothing has changed; see turbofit plan --cluster for what would fit"
            raise DoesNotFitError(target.verdict, hint=hint)
        check_gateways(expected_routing_table(target, self._controller.gateways))
        intersect(
            self._controller.bounds, bounds_of_cluster(target)
        )  # refused here, not on the way
        self._controller.follow(changed(self._controller, target, request))
        self._answer(number, {"said": f"{target.verdict}; node by node from here on"})

    def _node_state(self, name: str) -> NodeState:
        """The node with this name, address or beginning of an id.

        Raises:
            UsageError: none, or several.
        """
        found = [
            node_state
            for node_state in self._controller.node_states.values()
            if name
            and (
                name in (node_state.node.name, node_state.node.address)
                or node_state.node.id.startswith(name)
            )
        ]
        if len(found) != 1:
            many = "no node" if not found else f"{len(found)} nodes"
            raise UsageError(
                f"{many} is {name!r}" if not found else f"{many} are {name!r}",
                hint="turbofit cluster status shows names and ids",
            )
        return found[0]
