"""The actors of nodes as others find them: the controller, fronts, `turbofit cluster`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from turbofit.core.cluster import ClusterStatus, NodeStatus
from turbofit.core.errors import UsageError
from turbofit.gateway.front import NodeAddress
from turbofit.launch.cluster import ray_adapter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

#: Seconds in which actors answer.
_ANSWER_SECONDS: Final = 3.0


def node_actors(run: str) -> dict[str, Any]:
    """The newest actor of each node of a run, by the node's id."""
    named = ((name.rsplit("/", 2), each) for name, each in sorted(ray_adapter.actors().items()))
    return {node: actor for (of, node, _), actor in named if of == run}


def told(actors: Mapping[str, Any], **asked: bool) -> list[NodeStatus]:
    """What those actors tell that answer."""
    calls = [actor.tell.remote(**asked) for actor in actors.values()]
    answers = ray_adapter.outcomes(calls, _ANSWER_SECONDS)
    return [answer for answer in answers if isinstance(answer, NodeStatus)]


def statuses(address: str, name: str | None) -> list[ClusterStatus]:
    """What all runs serve, or the run of this name.

    Raises:
        UsageError: there is no such run.
    """
    runs = {actor.rsplit("/", 2)[0] for actor in ray_adapter.actors()}
    found = []
    for run in sorted(runs if name is None else runs & {name}):
        by_id = {status.id: status for status in told(node_actors(run))}
        for node in ray_adapter.nodes(address).values():
            silent = NodeStatus(id=node.id, name=node.name, address=node.address, state="joining")
            by_id.setdefault(node.id, silent)
        found.append(ClusterStatus(name=run, source=address, nodes=tuple(by_id.values())))
    if not found:
        what = "nothing" if name is None else f"no {name!r}"
        hint = "turbofit serve MODEL --cluster ray"
        raise UsageError(f"{what} is served on this cluster", hint=hint)
    return found


def drain(served: Sequence[ClusterStatus], name: str) -> str:
    """End the servers of the node with this name or address, or id; returns the node's name.

    Raises:
        UsageError: no node of these runs is called so, or several are.
    """
    found = [
        (status.name, node) for status in served for node in status.nodes
        if name in (node.name, node.address, node.id[: len(name)])
    ]  # fmt: skip
    if len({node.id for _, node in found}) != 1:
        hint = "turbofit cluster status shows names and ids"
        raise UsageError(f"{len(found) or 'no'} nodes are {name!r}", hint=hint)
    for run, node in found:
        ray_adapter.outcome(node_actors(run)[node.id].end.remote(drained=True), _ANSWER_SECONDS)
    return found[0][1].name


def address_source(run: str) -> Callable[[], list[NodeAddress]]:
    """A function that finds the nodes of a run, for a front; one whose actor is silent stays."""
    known: dict[str, NodeAddress] = {}

    def find() -> list[NodeAddress]:
        actors = node_actors(run)
        calls = [actor.address.remote() for actor in actors.values()]
        answers = zip(actors, ray_adapter.outcomes(calls, _ANSWER_SECONDS), strict=True)
        known.update({node: it for node, it in answers if isinstance(it, NodeAddress)})
        return [known[node] for node in actors if node in known and known[node].url]

    return find
