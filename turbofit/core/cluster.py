"""The types of a cluster: its nodes as they were measured, and the plan for all of them."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

from turbofit.core.machine import Machine
from turbofit.core.model import Model
from turbofit.core.plan import Limits, Plan, Remedy, ServeCommand, Workload
from turbofit.core.struct import JsonDocument, Struct, const, doc

CLUSTER_PLAN_SCHEMA: Final = "turbofit.cluster-plan/2"
CLUSTER_STATUS_SCHEMA: Final = "turbofit.cluster-status/3"


class Node(Struct):
    """One machine of a cluster; other nodes reach it at ``address``.

    ``id`` is the cluster's own name of the node, ``gpus`` the number of GPUs that Ray counts.
    ``leaving``: Ray drains the node. ``machine`` is None if the node could not be measured, or has
    no GPU that can serve; ``why_not`` then says why.
    """

    id: str
    name: str
    address: str
    gpus: int = 0
    leaving: bool = False
    machine: Machine | None = None
    why_not: str = ""


class Cluster(Struct):
    """The nodes of a cluster at one moment.

    ``source`` is where the nodes were read: ``ray ADDRESS``, or a text that calls them simulated.
    """

    source: str
    nodes: tuple[Node, ...]


class NodePlan(Struct):
    """What one node of a cluster serves.

    If the node serves nothing, ``plan`` is None, and ``why_not`` says why.
    """

    node: str
    name: str
    address: str
    plan: Annotated[
        Plan | None,
        doc("Its own whole plan; considered is of the first node of each kind."),
    ] = None
    why_not: str = ""
    cards: Annotated[str, doc("Its visible GPUs in words.")] = ""


class ClusterPlan(JsonDocument):
    """The plan for a cluster: limits that hold on every serving node, and a plan for each node.

    ``limits`` and ``longest_request_tokens`` are possible on every node that serves, so that a
    request may go to any such node.
    """

    what: ClassVar[str] = "cluster plan"
    schema: Annotated[str, const(CLUSTER_PLAN_SCHEMA)] = CLUSTER_PLAN_SCHEMA
    turbofit_version: Annotated[str, doc("The version that planned.")]
    created: Annotated[str, doc("When, ISO 8601 with a zone.")]
    fits: Annotated[bool, doc("Whether any node serves.")]
    verdict: Annotated[str, doc("One sentence for people.")]
    model: Model
    workload: Annotated[Workload, doc("What was asked of each node.")]
    limits: Annotated[Limits | None, doc("What every used node holds; null if none serves.")]
    longest_request_tokens: Annotated[int, doc("The longest request that every used node holds.")]
    nodes: Annotated[tuple[NodePlan, ...], doc("All nodes, in the cluster's order.")]
    warnings: tuple[str, ...] = ()
    remedies: Annotated[tuple[Remedy, ...], doc("If nothing fits, what would.")] = ()
    source: Annotated[str, doc("Where the cluster comes from.")] = ""
    serve: Annotated[
        ServeCommand | None,
        doc("What serves it and holds its limits; null if turbofit serve would not serve it."),
    ] = None

    @property
    def plans(self) -> list[Plan]:
        """The plans of the nodes that serve."""
        return [node.plan for node in self.nodes if node.plan is not None]


class NodeStatus(Struct):
    """The state of one node of a cluster that serves a model.

    =========  =========================================  =======================================
    ``state``  what happens                               what comes next
    =========  =========================================  =======================================
    joining    a task measures it, then it is planned     starting, or unfit
    starting   its `turbofit serve` starts                serving, or unfit if that ends
    serving    clients' requests go to it                 draining, or unfit if its server ends
    draining   its server finishes what it has, and ends  drained
    drained    it serves nothing, its GPUs are free       none, until it leaves Ray and comes back
    unfit      it serves nothing, ``why_not`` says why    joining, after a pause
    =========  =========================================  =======================================

    A node that leaves Ray is forgotten in any state.
    """

    schema: Annotated[str, const(CLUSTER_STATUS_SCHEMA)] = CLUSTER_STATUS_SCHEMA
    serves: Annotated[str, doc("The name of what the cluster serves.")]
    id: Annotated[str, doc("Ray's.")]
    name: Annotated[str, doc("The host's name.")]
    address: str
    state: Literal["joining", "starting", "serving", "draining", "drained", "unfit"]
    cards: Annotated[str, doc("Its GPUs in words.")] = ""
    why_not: Annotated[str, doc("Why it serves nothing.")] = ""
    said: Annotated[str, doc("The last line of its server, or that no controller asks.")] = ""
    url: Annotated[str, doc("Where fronts reach it.")] = ""
    at_once: Annotated[int, doc("Requests that it runs at once.")] = 0
    tokens: Annotated[int, doc("KV tokens that its caches hold.")] = 0
    folder: Annotated[str, doc("Its serve's log and plan, on the node.")] = ""
