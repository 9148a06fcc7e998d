"""The actors of nodes as others find them: the controller, fronts, `turbofit cluster`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from turbofit.core.cluster import NodeStatus
from turbofit.core.errors import UsageError
from turbofit.gateway.front import NodeAddress
from turbofit.serving.cluster import ray_adapter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

#: Seconds in which actors answer.
_ANSWER_SECONDS: Final = 3.0


def node_actors(run: str) -> dict[str, Any]:
    """The newest actor of each node of a run, by the node's id."""
    named = ((name.rsplit("/", 2), each) for name, each in sorted(ray_adapter.actors().items()))
    return {node: actor for (of, node, _), actor in named if of == run}


def told(actors: Mapping[str, Any]) -> list[NodeStatus]:
    """What those actors tell that answer."""
    calls = [actor.tell.remote() for actor in actors.values()]
    answers = ray_adapter.outcomes(calls, _ANSWER_SECONDS)
    return [answer for answer in answers if isinstance(answer, NodeStatus)]


def statuses(run: str | None) -> list[NodeStatus]:
    """What all nodes tell that serve, or those of one run.

    Raises:
        UsageError: there is no such run.
    """
    found = [status for status in told(ray_adapter.actors()) if run in (None, status.serves)]
    if not found:
        what = "nothing" if run is None else f"no {run!r}"
        raise UsageError(f"{what} is served there", hint="turbofit serve MODEL --cluster ray")
    return sorted(found, key=lambda status: (status.serves, status.name))


def drain(run: str | None, name: str) -> NodeStatus:
    """End the server of the node with this name or address, or id.

    Raises:
        UsageError: no node is called so, or several are.
    """
    nodes = statuses(run)
    found = [it for it in nodes if name in (it.name, it.address, it.id[: len(name)])]
    if len(found) != 1:
        hint = "turbofit cluster status shows names and ids; --name: what it serves"
        raise UsageError(f"{len(found) or 'no'} nodes are {name!r}", hint=hint)
    node = found[0]
    node_actors(node.serves)[node.id].end.remote()
    return node


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
