"""The nodes of a cluster: of Ray, or of a SPEC of simulated machines.

    --cluster ray                          the Ray cluster that this machine belongs to
    --cluster ray:10.0.0.1:6379            the one with this address
    --cluster sim:4xrtx3090@100/8xh100@2   100 machines of one SPEC and two of another, simulated

A SPEC is a value of ``--on``, also a snapshot in this folder. The last form needs no Ray. A node
that cannot be measured is a node with a reason, never an error.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from turbofit.core.cluster import Cluster, Node
from turbofit.core.errors import TurbofitError, UsageError
from turbofit.core.process.variables import variables
from turbofit.core.version import REFERENCE, __version__
from turbofit.machine.source import machine_from
from turbofit.memory.versions import release
from turbofit.serving.cluster import ray_adapter

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

#: The largest number of simulated nodes; a larger one is taken for a typing error.
_MOST_NODES: Final = 10_000


def measured(nodes: Iterable[Node], seconds: float = 120.0) -> tuple[Node, ...]:
    """The nodes of a Ray cluster, each as a task there has measured it.

    A node that can serve nothing is not measured.
    """
    asked = [node for node in nodes if not node.why_not]
    tasks = [ray_adapter.run_on(node.id, measure_here, __version__) for node in asked]
    answers = dict(zip(asked, ray_adapter.outcomes(tasks, seconds), strict=True))
    return tuple(node_of(node, answers[node]) if node in answers else node for node in nodes)


def measure_here(version: str) -> Node:
    """The node on which this process runs, without its place in the cluster.

    It is the machine that ``TURBOFIT_NODE_SPEC`` names, if that is set. ``version`` is that of the
    turbofit that plans.
    """
    from turbofit.planning.calibrations import pretends, with_calibrations
    from turbofit.serving.engine.launches import find_lmdeploy

    node = Node(id="", name="", address="")
    if version != __version__:
        why = "its memory would be measured and its engines be started by other rules"
        return replace(node, why_not=f"it has turbofit {__version__}, not {version}: {why}")
    with suppress(TurbofitError):  # the engine may be another one; planning says so
        lmdeploy = find_lmdeploy().version
        if release(lmdeploy) != release(REFERENCE):
            return replace(node, why_not=f"it has LMDeploy {lmdeploy}, plans are for {REFERENCE}")
    try:
        machine = machine_from(variables().node_spec or None, environ=raylet_environment())
    except TurbofitError as exc:
        return replace(node, why_not=exc.message)
    # The calibrations of this node: the planner runs on another one.
    pretend = machine.source != "nvml" or pretends()
    return replace(node, machine=with_calibrations(machine, pretend=pretend))


def node_of(node: Node, answer: Node | Exception) -> Node:
    """The node as it measured itself, or with the reason why it did not.

    It has the first of its visible GPUs, as many as Ray counts: Ray gives their numbers to jobs.
    """
    if not isinstance(answer, Node):
        text = " ".join(str(answer).split())[-200:]
        return replace(node, why_not=f"it could not be measured: {text}")
    machine = answer.machine
    if machine is not None:
        machine = replace(machine, visible=machine.visible[: node.gpus])
    return replace(node, machine=machine, why_not=answer.why_not)


def raylet_environment() -> Mapping[str, str]:
    """The environment that Ray was started with on this node: a task may see fewer GPUs."""
    try:
        with open(f"/proc/{os.getppid()}/environ", encoding="utf-8", errors="replace") as file:
            pairs = (entry.partition("=") for entry in file.read().split("\0"))
            return {name: value for name, _, value in pairs}
    except OSError:
        return os.environ


def cluster_from(text: str) -> Cluster:
    """The cluster that a value of ``--cluster`` names.

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
    for part in rest.split("/"):  # each SPEC is read once
        spec, _, number = part.rpartition("@") if "@" in part else (part, "", "1")
        count = int(number) if number.isdecimal() else 0
        if not 1 <= count <= _MOST_NODES - len(nodes) or not spec.strip("./~ "):
            raise UsageError(
                f"--cluster: {part[:60]!r} is not SPEC@COUNT, or more nodes than are simulated",
                hint=f"write it like sim:4xrtx3090@100/node.json@2, {_MOST_NODES:,} nodes at most,"
                " snapshots of this folder by their name alone",
            )
        machine = machine_from(spec)
        names = [f"sim-{len(nodes) + place}" for place in range(1, count + 1)]
        nodes += [Node(id=name, name=name, address="", machine=machine) for name in names]
        counts.append(f"{count:,} of {machine.name}")
    return Cluster(source=f"simulated: {', '.join(counts)}", nodes=tuple(nodes))
