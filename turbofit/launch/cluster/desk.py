"""What other commands ask of a cluster that serves: another plan, a node that is to be emptied."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from turbofit.core.cluster import Cluster
from turbofit.core.errors import LaunchError, TurbofitError, UsageError
from turbofit.gateway.meet import meet
from turbofit.gateway.roster import check_gateways
from turbofit.launch.cluster.change import changed
from turbofit.launch.cluster.promise import bounds_of_cluster, expected_roll
from turbofit.planning.cluster import plan_cluster

if TYPE_CHECKING:
    from collections.abc import Callable

    from turbofit.core.cluster import ClusterPlan
    from turbofit.launch.cluster.keeper import Keeper
    from turbofit.launch.cluster.site import Site
    from turbofit.planning.request import PlanRequest

    Answer = Callable[[int, dict[str, Any]], None]

__all__ = ["Desk"]


class Desk:
    """Takes questions and answers them, some of them later.

    Args:
        keeper: what serves.
        answer: sends an answer to a question's number.
    """

    def __init__(self, keeper: Keeper, answer: Answer) -> None:
        self._keeper, self._answer = keeper, answer
        #: A plan that is being made: the question's number, its request, the future.
        self._planning: tuple[int, PlanRequest, Any] | None = None

    def take(self, number: int, document: dict[str, Any]) -> None:
        """A question."""
        try:
            if document.get("kind") == "change":
                self._change(number, dict(document.get("keywords", {})))
            elif document.get("kind") == "drain":
                site = self._site(str(document.get("node", "")))
                self._keeper.drain(site)
                self._answer(number, {"said": f"node {site.node.name} finishes what it has"})
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
        if self._planning is not None or self._keeper.changing:
            raise LaunchError(
                "a change is under way already", hint="see turbofit cluster status, and wait"
            )
        keeper = self._keeper
        request = keeper.config.request.changed(**keywords)
        cluster = Cluster(source=f"ray {keeper.connection.address}", nodes=keeper.nodes())
        self._planning = number, request, keeper.later(lambda: plan_cluster(request, cluster))

    def _follow(self, number: int, target: ClusterPlan, request: PlanRequest) -> None:
        if not target.fits or target.spans:
            hint = "nothing has changed; see turbofit plan --cluster for what would fit"
            raise LaunchError(target.verdict, hint=hint)
        check_gateways(expected_roll(target, self._keeper.gateways))
        meet(self._keeper.bounds, bounds_of_cluster(target))  # refused here, not on the way
        self._keeper.follow(changed(self._keeper, target, request))
        self._answer(number, {"said": f"{target.verdict}; node by node from here on"})

    def _site(self, name: str) -> Site:
        """The node with this name, address or beginning of an id.

        Raises:
            UsageError: none, or several.
        """
        found = [
            site
            for site in self._keeper.sites.values()
            if name
            and (name in (site.node.name, site.node.address) or site.node.id.startswith(name))
        ]
        if len(found) != 1:
            many = "no node" if not found else f"{len(found)} nodes"
            raise UsageError(
                f"{many} is {name!r}" if not found else f"{many} are {name!r}",
                hint="turbofit cluster status shows names and ids",
            )
        return found[0]
