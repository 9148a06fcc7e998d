"""One node of the cluster as the keeper has it: what it serves with, and what is held there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from turbofit.core.cluster import NodePlan, NodeStatus
from turbofit.core.errors import TurbofitError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from turbofit.core.cluster import ClusterPlan, Node
    from turbofit.gateway.roll import Member
    from turbofit.launch.cluster.post import Post

__all__ = ["Site", "outcome"]

State = Literal["joining", "serving", "changing", "drained", "unfit"]


class Site:
    """A node.

    Args:
        node: as it was measured, or only named yet.
    """

    def __init__(self, node: Node) -> None:
        self.node = node
        self.plan = NodePlan(node=node.id, name=node.name, address=node.address)
        self.state: State = "joining"
        self.posts: list[Post] = []
        #: When a node that could not serve is looked at again.
        self.again_at = float("inf")
        #: Work on it that is under way elsewhere.
        self.work: Any = None
        #: The cluster's plan whose promise it was planned for last.
        self.promised: ClusterPlan | None = None

    @property
    def why_not(self) -> str:
        """Why it serves nothing."""
        return self.plan.why_not or self.node.why_not

    @property
    def ready(self) -> bool:
        """Whether all its engines are."""
        return bool(self.posts) and all(post.standing.state == "ready" for post in self.posts)

    @property
    def failed(self) -> str:
        """Why one of its engines failed; empty where none did."""
        errors = [p.standing.error for p in self.posts if p.standing.state == "failed"]
        return str(errors[0].get("message", "")) if errors else ""

    def members(self) -> list[Member]:
        """What gateways are told of it."""
        return [member for post in self.posts if (member := post.member()) is not None]

    def status(self, up: Mapping[str, bool], outstanding: Mapping[str, int]) -> NodeStatus:
        """For people and scripts."""
        return NodeStatus(
            id=self.node.id,
            name=self.node.name,
            address=self.node.address,
            state=self.state,
            cards=self.plan.cards,
            why_not="" if self.posts else self.why_not,
            engines=tuple(
                post.status(
                    up=up.get(post.order.name, False),
                    outstanding=outstanding.get(post.order.name, 0),
                )
                for post in self.posts
            ),
        )


def outcome(work: Any, site: Site) -> NodePlan:
    """What a worker planned; a node that it failed for is a node with a reason."""
    try:
        planned: NodePlan = work.result()
    except TurbofitError as exc:
        why = exc.message
    except Exception as exc:  # noqa: BLE001 - one node must not end the others
        why = f"it could not be planned: {type(exc).__name__}: {exc}"
    else:
        return planned
    node = site.node
    return NodePlan(node=node.id, name=node.name, address=node.address, why_not=why)
