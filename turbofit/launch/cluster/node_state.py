"""One node of the cluster as the controller has it: what it serves with, and what is held there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from turbofit.core.cluster import NodePlan, NodeStatus
from turbofit.core.errors import TurbofitError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from turbofit.core.cluster import ClusterPlan, Node
    from turbofit.gateway.routing.routing_table import Member
    from turbofit.launch.cluster.replica import Replica

__all__ = ["NodeState", "outcome"]

State = Literal["joining", "serving", "changing", "drained", "unfit"]


class NodeState:
    """A node.

    Args:
        node: as it was measured, or only named yet.
    """

    def __init__(self, node: Node) -> None:
        self.node = node
        self.plan = NodePlan(node=node.id, name=node.name, address=node.address)
        self.state: State = "joining"
        self.replicas: list[Replica] = []
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
        return bool(self.replicas) and all(
            replica.engine_state.state == "ready" for replica in self.replicas
        )

    @property
    def failed(self) -> str:
        """Why one of its engines failed; empty where none did."""
        errors = [p.engine_state.error for p in self.replicas if p.engine_state.state == "failed"]
        return str(errors[0].get("message", "")) if errors else ""

    def members(self) -> list[Member]:
        """What gateways are told of it."""
        return [member for replica in self.replicas if (member := replica.member()) is not None]

    def status(self, up: Mapping[str, bool], outstanding: Mapping[str, int]) -> NodeStatus:
        """For people and scripts."""
        return NodeStatus(
            id=self.node.id,
            name=self.node.name,
            address=self.node.address,
            state=self.state,
            cards=self.plan.cards,
            why_not="" if self.replicas else self.why_not,
            engines=tuple(
                replica.status(
                    up=up.get(replica.engine_spec.name, False),
                    outstanding=outstanding.get(replica.engine_spec.name, 0),
                )
                for replica in self.replicas
            ),
        )


def outcome(work: Any, node_state: NodeState) -> NodePlan:
    """Take what a worker planned; where it failed, the node gets the reason."""
    try:
        planned: NodePlan = work.result()
    except TurbofitError as exc:
        why = exc.message
    except Exception as exc:  # noqa: BLE001 - one node must not end the others
        why = f"it could not be planned: {type(exc).__name__}: {exc}"
    else:
        return planned
    node = node_state.node
    return NodePlan(node=node.id, name=node.name, address=node.address, why_not=why)
