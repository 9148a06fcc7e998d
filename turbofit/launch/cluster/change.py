"""A change of plan while clients are served: node by node, and back again where it fails.

While engines of both plans serve, requests are held to what both keep. A node's engines finish what
they have, end, and start with the new plan; the next node is touched once they are ready. So a
cluster of one node pauses, and one of many is short of one node at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.gateway.meet import meet
from turbofit.launch.cluster.promise import bounds_of_cluster, in_words
from turbofit.launch.cluster.site import outcome

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

    from turbofit.core.cluster import ClusterPlan, NodePlan
    from turbofit.launch.cluster.keeper import Keeper
    from turbofit.launch.cluster.site import Site
    from turbofit.planning.request import PlanRequest

__all__ = ["changed"]


def changed(
    keeper: Keeper, target: ClusterPlan, request: PlanRequest
) -> Generator[None, None, None]:
    """The steps from what is served to another plan of the same model.

    Args:
        keeper: what is served.
        target: the plan to come.
        request: what it was made for.
    """
    before, config = keeper.plan, keeper.config
    keeper.bounds = meet(keeper.bounds, bounds_of_cluster(target))
    keeper.plan, keeper.config = target, config.changed(request=request)
    keeper.say(f"a change of plan begins: {in_words(before)} -> {in_words(target)}")
    moved: dict[str, NodePlan] = {}
    while sites := _behind(keeper):
        done = sum(one.promised is target for one in keeper.sites.values())
        keeper.change = f"{done} of {done + len(sites)} nodes have the new plan"
        site = sites[0]
        moved[site.node.id] = site.plan
        why = yield from _moved(keeper, site)
        if why:
            keeper.plan, keeper.config = before, config
            yield from _undone(keeper, moved, why)
            return
    keeper.widen()
    keeper.change = ""
    keeper.say(f"the plan has changed: {in_words(target)}")


def _behind(keeper: Keeper) -> list[Site]:
    """Nodes that were planned for another promise than the keeper's, those that came since too.

    One that joins is not among them: what was planned for it is looked at when it is done.
    """
    return [
        site
        for site in keeper.sites.values()
        if site.state in ("serving", "unfit") and site.promised is not keeper.plan
    ]


def _undone(keeper: Keeper, moved: Mapping[str, NodePlan], why: str) -> Generator[None, None, None]:
    """Back to the plan before, on every node that has the new one."""
    keeper.say(f"the new plan does not hold, going back: {why}")
    keeper.change = f"going back: {why}"
    while sites := _behind(keeper):
        yield from _moved(keeper, sites[-1], moved.get(sites[-1].node.id))
    keeper.widen()
    keeper.change = f"given up: {why}"
    keeper.say("the plan before is served again")


def _moved(keeper: Keeper, site: Site, known: NodePlan | None = None) -> Generator[None, None, str]:
    """One node to the keeper's plan, or a known one; why its engines failed, or nothing."""
    site.state = "changing"
    keeper.empty(site)
    keeper.say(f"node {site.node.name}: its engines finish what they have")
    while _stays(keeper, site) and not keeper.idle(site):
        yield
    while _stays(keeper, site) and not keeper.closed(site):
        yield
    if not _stays(keeper, site):
        return ""
    work = keeper.measure(site, known)
    while _stays(keeper, site) and not work.done():
        yield
    if not _stays(keeper, site):
        return ""
    keeper.settle(site, outcome(work, site))
    planned = keeper.plan.node(site.node.id)
    if not site.posts and planned is not None and planned.plan is not None:
        return f"node {site.node.name} does not serve: {site.why_not}"
    while site.node.id in keeper.sites and site.posts and not site.ready:
        if site.failed:
            return site.failed
        yield
    return ""


def _stays(keeper: Keeper, site: Site) -> bool:
    """Whether a node is still there, and nobody drains it meanwhile."""
    return site.node.id in keeper.sites and site.state == "changing"
