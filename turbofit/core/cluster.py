"""Several machines that serve one model: nodes as they were measured, and the plan over them."""

from __future__ import annotations

from typing import Final

from turbofit.core.machine import Machine
from turbofit.core.model import Model
from turbofit.core.plan import Command, Limits, Plan, Remedy, Throughput, Workload
from turbofit.core.struct import Struct, decode, to_json

__all__ = [
    "CLUSTER_PLAN_SCHEMA", "CLUSTER_SCHEMA", "CLUSTER_STATUS_SCHEMA", "Cluster", "ClusterPlan",
    "ClusterStatus", "EngineStatus", "Node", "NodePlan", "NodeStatus", "Span",
]  # fmt: skip

CLUSTER_SCHEMA: Final = "turbofit.cluster/1"
CLUSTER_PLAN_SCHEMA: Final = "turbofit.cluster-plan/1"
CLUSTER_STATUS_SCHEMA: Final = "turbofit.cluster-status/1"


class Node(Struct):
    """One machine of a cluster.

    ``id`` is the cluster's own name for it (Ray's node id, in hexadecimal), ``name`` the host's,
    ``address`` where other nodes reach it. ``machine`` is None where it could not be measured or
    has nothing to serve with; ``why_not`` then says why. ``pretend``: its GPUs are pretend ones.
    """

    id: str
    name: str
    address: str
    machine: Machine | None = None
    why_not: str = ""
    turbofit: str = ""
    lmdeploy: str = ""
    pretend: bool = False


class Cluster(Struct):
    """The nodes at one moment; ``source`` says where it comes from: ``ray ADDRESS`` or a file."""

    schema: str = CLUSTER_SCHEMA
    source: str
    nodes: tuple[Node, ...]

    def to_json(self) -> str:
        """The cluster as JSON."""
        return to_json(self)

    @staticmethod
    def from_json(data: bytes | str, *, what: str = "cluster") -> Cluster:
        """Read a cluster back.

        Raises:
            UsageError: not a cluster of this schema.
        """
        return decode(data, Cluster, what=what)


class NodePlan(Struct):
    """What one node serves; ``plan`` None and ``why_not`` where it serves nothing.

    ``plan`` is complete for this node's own cards, but for ``considered``, which only the first
    node of each kind has. ``at_once`` are the workload's requests that are there at any time, on
    average. ``cards`` are the node's visible GPUs in words.
    """

    node: str
    name: str
    address: str
    plan: Plan | None = None
    why_not: str = ""
    at_once: float = 0.0
    cards: str = ""

    def gpus(self) -> set[int]:
        """The node's GPUs that its engines use; none where it serves nothing."""
        groups = () if self.plan is None else self.plan.parallel.groups
        return {index for group in groups for index in group}


class Span(Struct):
    """One engine over several nodes, where no single one holds the model.

    ``plan`` is of the nodes' cards as if they were one machine without peer access between nodes;
    ``groups`` are its GPUs' indices node by node, in the order of ``nodes``. ``commands`` are
    TurboMind's one a node, in their order, or the PyTorch engine's one on the first node.
    """

    nodes: tuple[str, ...]
    plan: Plan
    groups: tuple[tuple[int, ...], ...]
    commands: tuple[Command, ...]
    at_once: float = 0.0


class ClusterPlan(Struct):
    """One promise over all nodes, and what each serves under it.

    ``limits`` and ``longest_request_tokens`` are what every node holds, so that a request may go to
    any of them. ``total_tokens`` counts the KV caches of all engines. ``source`` is the cluster's.
    """

    schema: str = CLUSTER_PLAN_SCHEMA
    turbofit_version: str
    created: str
    fits: bool
    verdict: str
    model: Model
    workload: Workload
    limits: Limits | None
    longest_request_tokens: int
    total_tokens: int
    engines: int
    nodes: tuple[NodePlan, ...]
    spans: tuple[Span, ...] = ()
    throughput: Throughput | None = None
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    remedies: tuple[Remedy, ...] = ()
    source: str = ""

    def node(self, identity: str) -> NodePlan | None:
        """What the node with this id serves, None where it is not in the plan."""
        return next((one for one in self.nodes if one.node == identity), None)

    def to_json(self) -> str:
        """The plan as JSON."""
        return to_json(self)

    @staticmethod
    def from_json(data: bytes | str, *, what: str = "cluster plan") -> ClusterPlan:
        """Read a plan back.

        Raises:
            UsageError: not a cluster's plan of this schema.
        """
        return decode(data, ClusterPlan, what=what)


class EngineStatus(Struct):
    """One engine of a cluster that serves; ``up`` and ``outstanding`` as its gateways see it.

    ``restarts`` are those of its Ray actor, ``folder`` is its run's, on its node. ``tokens`` is
    what its cache holds. ``error`` is empty where it has not failed.
    """

    name: str
    gpus: tuple[int, ...]
    state: str
    said: str = ""
    url: str = ""
    up: bool = False
    draining: bool = False
    outstanding: int = 0
    tokens: int = 0
    restarts: int = 0
    folder: str = ""
    error: str = ""
    warnings: tuple[str, ...] = ()


class NodeStatus(Struct):
    """One node; ``state`` is ``joining``, ``serving``, ``changing``, ``drained`` or ``unfit``."""

    id: str
    name: str
    address: str
    state: str
    cards: str = ""
    why_not: str = ""
    engines: tuple[EngineStatus, ...] = ()


class ClusterStatus(Struct):
    """A model that a cluster serves, at one moment.

    ``urls`` are its gateways'. ``change`` says how far a change of plan has come, empty where none
    is under way or was asked for; ``events`` are the last things that happened.
    """

    schema: str = CLUSTER_STATUS_SCHEMA
    name: str
    model: str
    source: str
    pretend: bool
    at: str
    urls: tuple[str, ...]
    promise: str
    nodes: tuple[NodeStatus, ...]
    change: str = ""
    events: tuple[str, ...] = ()
