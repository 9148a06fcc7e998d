"""Measures the nodes of a cluster; finds, asks and ends the actors on the nodes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, Final

from msgspec.structs import replace

from turbofit.core.cluster import Cluster, Node, NodeStatus
from turbofit.core.errors import TurbofitError, UsageError
from turbofit.core.process.files import needed_state_dir
from turbofit.core.version import REFERENCE, __version__
from turbofit.gateway.front import NodeAddress
from turbofit.machine.source import machine_from
from turbofit.memory.versions import release
from turbofit.serving.cluster import ray_adapter

#: The largest number of simulated nodes; a larger number is a typing error.
_MOST_NODES: Final = 10_000
#: Seconds to wait for the answers of actors.
_ANSWER_SECONDS: Final = 3.0


def measured(nodes: Iterable[Node], seconds: float = 120.0) -> tuple[Node, ...]:
    """Return the nodes of a Ray cluster, each measured by a task that runs on it.

    A node that can serve nothing is not measured.
    """
    asked = [node for node in nodes if not node.why_not]
    tasks = [ray_adapter.run_on(node.id, measure_here, __version__) for node in asked]
    answers = dict(zip(asked, ray_adapter.outcomes(tasks, seconds), strict=True))
    return tuple(node_of(node, answers[node]) if node in answers else node for node in nodes)


def measure_here(version: str) -> Node:
    """Return the node on which this process runs, without its id, name and address.

    ``TURBOFIT_NODE_SPEC`` may name another machine in place of this machine. ``version`` is the
    planner's version of turbofit; a node with another version can serve nothing.
    """
    from turbofit.planning.calibrations import pretends, with_calibrations
    from turbofit.serving.engine.lmdeploy import find_lmdeploy

    node = Node(id="", name="", address="")
    if version != __version__:
        why = "another version measures memory and starts engines by other rules"
        return replace(node, why_not=f"it has turbofit {__version__}, not {version}: {why}")
    with suppress(TurbofitError):  # Transformers needs no LMDeploy; the plan says what is missing
        lmdeploy = find_lmdeploy().version
        if release(lmdeploy) != release(REFERENCE):
            return replace(node, why_not=f"it has LMDeploy {lmdeploy}, plans are for {REFERENCE}")
    try:
        needed_state_dir("nodes")
        spec = os.environ.get("TURBOFIT_NODE_SPEC") or None
        machine = machine_from(spec, environ=raylet_environment())
    except TurbofitError as exc:
        return replace(node, why_not=exc.message)
    # The calibrations of this node are here; the planner runs on another node.
    pretend = machine.source != "nvml" or pretends()
    return replace(node, machine=with_calibrations(machine, pretend=pretend))


def node_of(node: Node, answer: Node | Exception) -> Node:
    """Return the node with the machine in ``answer``, or with the reason of a failed measurement.

    Only the first ``node.gpus`` visible GPUs of the machine count: Ray gives a job no other GPUs.
    """
    if not isinstance(answer, Node):
        text = " ".join(str(answer).split())[-200:]
        return replace(node, why_not=f"it could not be measured: {text}")
    machine = answer.machine
    if machine is not None:
        machine = replace(machine, visible=machine.visible[: node.gpus])
    return replace(node, machine=machine, why_not=answer.why_not)


def raylet_environment() -> Mapping[str, str]:
    """Return the environment of Ray's own process on this node.

    Ray may hide GPUs in the environment of a task.
    """
    try:
        with open(f"/proc/{os.getppid()}/environ", encoding="utf-8", errors="replace") as file:
            pairs = (entry.partition("=") for entry in file.read().split("\0"))
            return {name: value for name, _, value in pairs}
    except OSError:
        return os.environ


def cluster_from(text: str) -> Cluster:
    """Return the cluster that ``--cluster`` names; the nodes of a Ray cluster are measured.

    Raises:
        UsageError: the text names no cluster, or its file cannot be read.
    """
    kind, _, rest = text.partition(":")
    if kind == "ray":
        with ray_adapter.connected(rest or None) as address:
            found = measured(ray_adapter.nodes(address).values())
            return Cluster(source=f"ray {address}", nodes=found)
    if kind != "sim":
        raise UsageError(
            f"--cluster {text[:60]!r} is no cluster",
            hint="give ray, ray:ADDRESS, or sim:4xrtx3090@100/node.json@2 with a snapshot in this "
            "folder (turbofit machine --save node.json)",
        )
    nodes: list[Node] = []
    counts = []
    for part in rest.split("/"):
        spec, _, number = part.rpartition("@") if "@" in part else (part, "", "1")
        count = int(number) if number.isdecimal() else 0
        if not 1 <= count <= _MOST_NODES - len(nodes) or not spec.strip("./~ "):
            raise UsageError(
                f"--cluster: {part[:60]!r} is not SPEC@COUNT, or has too many nodes",
                hint="an example is sim:4xrtx3090@100/node.json@2, with a snapshot in this folder; "
                f"{_MOST_NODES:,} nodes are the most",
            )
        machine = machine_from(spec)
        names = [f"sim-{len(nodes) + place}" for place in range(1, count + 1)]
        nodes += [Node(id=name, name=name, address="", machine=machine) for name in names]
        counts.append(f"{count:,} of {machine.name}")
    return Cluster(source=f"simulated: {', '.join(counts)}", nodes=tuple(nodes))


def actor_name(run: str, node: str, number: int) -> str:
    """Return the name of a node's actor; the names of later actors sort behind it."""
    return f"{run}/{node}/{number:010d}"


def last_number(run: str) -> int:
    """Return the largest number in the names of a run's actors; 0 without actors."""
    named = (name.rsplit("/", 2) for name in ray_adapter.actors())
    return max((int(number) for its_run, _, number in named if its_run == run), default=0)


def node_actors(run: str) -> dict[str, Any]:
    """Return the newest actor of each node of a run, by the node's id."""
    named = [(name.rsplit("/", 2), actor) for name, actor in sorted(ray_adapter.actors().items())]
    return {node: actor for (its_run, node, _), actor in named if its_run == run}


def ask_statuses(actors: Mapping[str, Any], call: str = "get_status") -> list[NodeStatus]:
    """Return the status of each actor that answers in time; ``call`` is the method to call."""
    calls = [getattr(actor, call).remote() for actor in actors.values()]
    answers = ray_adapter.outcomes(calls, _ANSWER_SECONDS)
    return [answer for answer in answers if isinstance(answer, NodeStatus)]


def statuses(run: str | None) -> list[NodeStatus]:
    """Return the status of each node of a run; of all runs if ``run`` is None.

    Raises:
        UsageError: no node of the run answers, or no node at all.
    """
    found = [
        status for status in ask_statuses(ray_adapter.actors()) if run in (None, status.serves)
    ]
    if not found:
        what = "nothing" if run is None else f"no {run!r}"
        hint = "turbofit serve MODEL --cluster ray starts a server"
        raise UsageError(f"the cluster serves {what}", hint=hint)
    return sorted(found, key=lambda status: (status.serves, status.name))


def drain(run: str | None, name: str) -> NodeStatus:
    """End the server of a node, and return the node's status; ``name`` may begin an id.

    Raises:
        UsageError: ``name`` is no node's name, address or id, or that of several nodes.
    """
    nodes = statuses(run)
    found = [node for node in nodes if name in (node.name, node.address, node.id[: len(name)])]
    if len(found) != 1:
        raise UsageError(
            f"{len(found) or 'no'} nodes have the name, address or id {name!r}",
            hint="turbofit cluster status shows names and ids; --name chooses a run",
        )
    node = found[0]
    node_actors(node.serves)[node.id].end.remote()
    return node


def address_source(run: str) -> Callable[[], list[NodeAddress]]:
    """Return a function that lists the addresses of a run's nodes, for a front.

    A node whose actor does not answer keeps its last address.
    """
    known: dict[str, NodeAddress] = {}

    def find() -> list[NodeAddress]:
        """Ask the actors for addresses; return the addresses of nodes whose server is open."""
        actors = node_actors(run)
        calls = [actor.address.remote() for actor in actors.values()]
        answers = zip(actors, ray_adapter.outcomes(calls, _ANSWER_SECONDS), strict=True)
        known.update({node: at for node, at in answers if isinstance(at, NodeAddress)})
        return [known[node] for node in actors if node in known and known[node].url]

    return find
