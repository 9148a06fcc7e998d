"""The types of a cluster: the measured nodes, and the plan for all nodes."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

from turbofit.core.machine import Machine
from turbofit.core.model import Model
from turbofit.core.plan import Plan, Remedy, ServeCommand, Workload
from turbofit.core.promise import Promise
from turbofit.core.struct import JsonDocument, Struct, const, doc

CLUSTER_PLAN_SCHEMA: Final = "turbofit.cluster-plan/2"
CLUSTER_STATUS_SCHEMA: Final = "turbofit.cluster-status/3"


class Node(Struct):
    """One machine of a cluster; other nodes reach it at ``address``.

    ``id`` is the cluster's own name of the node, ``gpus`` the number of GPUs that Ray counts.
    ``leaving``: Ray drains the node. If the node was not measured, or has no GPU that can serve,
    ``machine`` is None and ``why_not`` has the reason.
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

    ``source`` is ``ray ADDRESS``, or a text that says that the nodes are simulated.
    """

    source: str
    nodes: tuple[Node, ...]


class NodePlan(Struct):
    """The plan of one node of a cluster.

    If the node serves nothing, ``plan`` is None and ``why_not`` has the reason.
    """

    node: str
    name: str
    address: str
    plan: Annotated[
        Plan | None,
        doc("The node's plan; only the first node of each kind has `considered`."),
    ] = None
    why_not: str = ""
    cards: Annotated[str, doc("The node's visible GPUs in words.")] = ""


class ClusterPlan(JsonDocument):
    """The plan for a cluster: one promise that every serving node keeps, and a plan for each node.

    A request within ``promise`` may go to any node that serves.
    """

    what: ClassVar[str] = "cluster plan"
    schema: Annotated[str, const(CLUSTER_PLAN_SCHEMA)] = CLUSTER_PLAN_SCHEMA
    turbofit_version: Annotated[str, doc("The version that planned.")]
    created: Annotated[str, doc("The time of planning, ISO 8601 with a zone.")]
    fits: Annotated[bool, doc("Whether any node serves.")]
    verdict: Annotated[str, doc("One sentence for people.")]
    model: Model
    workload: Annotated[Workload, doc("What was asked of each node.")]
    promise: Annotated[
        Promise | None,
        doc("The promise of every serving node, with the requests of all; null if none serves."),
    ]
    nodes: Annotated[tuple[NodePlan, ...], doc("All nodes, in the cluster's order.")]
    warnings: tuple[str, ...] = ()
    remedies: Annotated[tuple[Remedy, ...], doc("If nothing fits: what would fit.")] = ()
    source: Annotated[str, doc("The source of the list of nodes.")] = ""
    serve: Annotated[
        ServeCommand | None,
        doc("The command that serves the plan; null if turbofit serve cannot serve it."),
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
    joining    the node is measured and planned for       starting, or unfit
    starting   its `turbofit serve` starts                serving, or unfit if its server ends
    serving    the node gets clients' requests            draining, or unfit if its server ends
    draining   its server ends after open requests        drained
    drained    its server has ended, its GPUs are free    joining, if the node rejoins Ray
    unfit      ``why_not`` says why it serves nothing     joining, after a pause
    =========  =========================================  =======================================

    A node that leaves Ray is forgotten in any state.
    """

    schema: Annotated[str, const(CLUSTER_STATUS_SCHEMA)] = CLUSTER_STATUS_SCHEMA
    serves: Annotated[str, doc("The name of what the cluster serves.")]
    id: Annotated[str, doc("Ray's id of the node.")]
    name: Annotated[str, doc("The host's name.")]
    address: str
    state: Literal["joining", "starting", "serving", "draining", "drained", "unfit"]
    cards: Annotated[str, doc("The node's GPUs in words.")] = ""
    why_not: Annotated[str, doc("Why the node serves nothing.")] = ""
    said: Annotated[str, doc("Its server's last line, or a warning that no controller asks.")] = ""
    url: Annotated[str, doc("The address to which fronts send requests.")] = ""
    at_once: Annotated[int, doc("Requests that the node runs at once.")] = 0
    tokens: Annotated[int, doc("KV tokens of the node's caches.")] = 0
    folder: Annotated[str, doc("The node's folder with the log and the plan of its server.")] = ""
