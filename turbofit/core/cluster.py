"""Several machines that serve one model: nodes as they were measured, and the plan over them."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

from msgspec import UNSET, UnsetType

from turbofit.core.machine import Machine
from turbofit.core.messages import plural
from turbofit.core.model import Model
from turbofit.core.plan import Held, Limits, Plan, Remedy, ServeCommand, Throughput, Workload
from turbofit.core.struct import JsonDocument, Struct, const, doc

CLUSTER_PLAN_SCHEMA: Final = "turbofit.cluster-plan/1"
CLUSTER_STATUS_SCHEMA: Final = "turbofit.cluster-status/2"


class Node(Struct):
    """One machine of a cluster, under the cluster's own ``id``; ``address`` is for other nodes.

    ``gpus`` is as Ray counts them, ``free`` how many of them no job holds; ``leaving``: Ray drains
    the node. ``machine`` is None where it could not be measured or has nothing to serve with;
    ``why_not`` then says why. Versions are empty where nobody told.
    """

    id: str
    name: str
    address: str
    gpus: int = 0
    free: int = 0
    leaving: bool = False
    machine: Machine | None = None
    why_not: str = ""
    turbofit: str = ""
    lmdeploy: str = ""
    pretend: bool = False


class Cluster(Struct):
    """The nodes at one moment; ``source`` is ``ray ADDRESS``, or names simulated machines."""

    source: str
    nodes: tuple[Node, ...]


class NodePlan(Struct):
    """What one node serves; ``plan`` None and ``why_not`` where it serves nothing."""

    node: str
    name: str
    address: str
    plan: Annotated[
        Plan | None,
        doc("Its own whole plan; considered is of the first node of each kind."),
    ] = None
    why_not: str = ""
    at_once: Annotated[
        float, doc("The workload's requests that are there at any time, on average.")
    ] = 0.0
    cards: Annotated[str, doc("Its visible GPUs in words.")] = ""

    def gpus(self) -> set[int]:
        """The node's GPUs that its engines use; an empty set if the node serves nothing."""
        groups = () if self.plan is None else self.plan.parallel.groups
        return {index for group in groups for index in group}


class ClusterPlan(JsonDocument):
    """One promise over all nodes, and what each serves under it.

    ``limits`` and ``longest_request_tokens`` are what every node holds, so that a request may go to
    any of them.
    """

    what: ClassVar[str] = "cluster plan"
    schema: Annotated[str, const(CLUSTER_PLAN_SCHEMA)] = CLUSTER_PLAN_SCHEMA
    turbofit_version: Annotated[str, doc("The version that planned.")]
    created: Annotated[str, doc("When, ISO 8601 with a zone.")]
    fits: Annotated[bool, doc("Whether the nodes that serve keep what was asked.")]
    verdict: Annotated[str, doc("One sentence for people.")]
    model: Model
    workload: Annotated[Workload, doc("What was asked; concurrency is over all nodes.")]
    limits: Annotated[Limits | None, doc("What every used node holds; null where none serves.")]
    longest_request_tokens: Annotated[int, doc("The longest request that every used node holds.")]
    total_tokens: Annotated[int, doc("Tokens of the KV caches of all engines.")]
    engines: int
    nodes: Annotated[tuple[NodePlan, ...], doc("All nodes, in the cluster's order.")]
    throughput: Annotated[Throughput | None, doc("A forecast over all nodes, never a promise.")] = (
        None
    )
    held: Annotated[
        Held | UnsetType,
        doc("Requests at once that all nodes hold; there only where a concurrency was given."),
    ] = UNSET
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    remedies: Annotated[
        tuple[Remedy, ...],
        doc("Where nothing fits, what would."),
    ] = ()
    source: Annotated[str, doc("Where the cluster comes from.")] = ""
    serve: Annotated[
        ServeCommand | None,
        doc("What serves it and holds its limits; null where turbofit serve would not serve it."),
    ] = None

    @property
    def requests_at_once(self) -> int:
        """Requests at once over all nodes: the wished concurrency, else what the nodes run."""
        used = [node.at_once for node in self.nodes if node.plan is not None]
        return self.workload.concurrency or round(sum(used))

    @property
    def promise(self) -> str:
        """The limits that every node enforces on a request, in words."""
        limits, words = self.limits, f"{self.longest_request_tokens:,} tokens a request"
        if limits is None or limits.vision_unit is None:
            return words
        unit = plural(limits.units_per_image, limits.vision_unit)
        images = f"{limits.images_per_request} of up to {limits.units_per_image:,} {unit}"
        return f"{words}, images: {images}"

    def node(self, identity: str) -> NodePlan | None:
        """The plan of the node with this id; None if the plan has no such node."""
        return next((node for node in self.nodes if node.node == identity), None)


class NodeStatus(Struct):
    """One node of a cluster that serves."""

    id: Annotated[str, doc("Ray's.")]
    name: Annotated[str, doc("The host's name.")]
    address: str
    state: Literal["joining", "starting", "serving", "draining", "drained", "unfit"]
    cards: Annotated[str, doc("Its GPUs in words.")] = ""
    why_not: Annotated[str, doc("Why it serves nothing.")] = ""
    said: Annotated[str, doc("The last line of its turbofit serve.")] = ""
    url: Annotated[str, doc("Where fronts reach it.")] = ""
    up: Annotated[bool, doc("Whether the front sends requests there.")] = False
    outstanding: Annotated[int, doc("Requests of the front at it.")] = 0
    at_once: Annotated[float, doc("Requests that it runs at once.")] = 0.0
    tokens: Annotated[int, doc("KV tokens that its caches hold.")] = 0
    folder: Annotated[str, doc("Its serve's log and plan, on the node.")] = ""


class ClusterStatus(Struct):
    """A model that a cluster serves, at one moment."""

    schema: Annotated[str, const(CLUSTER_STATUS_SCHEMA)] = CLUSTER_STATUS_SCHEMA
    name: Annotated[str, doc("What people call it.")]
    model: str
    source: Annotated[str, doc("Ray's address.")]
    pretend: Annotated[bool, doc("Whether its GPUs are pretend ones.")]
    at: Annotated[str, doc("When, as ISO 8601.")]
    urls: Annotated[tuple[str, ...], doc("Of its front.")]
    promise: Annotated[str, doc("What requests are held to, in words.")]
    nodes: tuple[NodeStatus, ...]
    change: Annotated[
        str,
        doc("How far a change of plan has come, empty where none is under way or was asked for."),
    ] = ""
    events: Annotated[tuple[str, ...], doc("What happened last, oldest first.")] = ()
