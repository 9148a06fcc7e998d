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
from turbofit.core.version import __version__
from turbofit.launch.cluster import ray_adapter
from turbofit.machine.source import machine_from

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from turbofit.launch.cluster.ray_adapter import RayCallError

_SECONDS: Final = 120.0


def measure_nodes(address: str | None) -> Cluster:
    """The nodes of a Ray cluster, measured by a task on each; None is the cluster of this host."""
    with ray_adapter.connected(address) as ray:
        nodes = ray.alive().values()
        with_gpus = [node.id for node in nodes if node.gpus]
        answers = ray_adapter.run_on_each(with_gpus, measure_here, _SECONDS)
        measured = tuple(node_of(node, answers.get(node.id)) for node in nodes)
        return Cluster(source=f"ray {ray.address}", nodes=measured)


def measure_here(*, pretend: bool = True) -> Node:
    """The node on which this process runs, without its place in the cluster.

    ``pretend``: it is the machine that ``TURBOFIT_NODE_SPEC`` names, if that is set.
    """
    from turbofit.launch.engine.launches import find_lmdeploy
    from turbofit.observe.calibrations import pretends, with_calibrations

    node = Node(id="", name="", address="", turbofit=__version__)
    with suppress(TurbofitError):  # the engine may be another one; planning says so
        node = replace(node, lmdeploy=find_lmdeploy().version)
    try:
        spec = variables().node_spec or None if pretend else None
        machine = machine_from(spec, environ=raylet_environment())
    except TurbofitError as exc:
        return replace(node, why_not=exc.message)
    # The calibrations of this node: the planner runs on another one.
    node = replace(node, pretend=machine.source != "nvml" or pretends())
    return replace(node, machine=with_calibrations(machine, pretend=node.pretend))


def held_only(node: Node, gpus: Iterable[str]) -> Node:
    """The node with only these GPUs to plan for."""
    from turbofit.machine.visible import select

    machine = node.machine
    if machine is None:
        return node
    known = [gpu.index for gpu in machine.gpus]
    if machine.source != "nvml":  # a pretend machine may have fewer GPUs than Ray was told
        gpus = [gpu for gpu in gpus if not gpu.isdigit() or int(gpu) < len(known)]
    try:
        indices = {select(gpu, machine.gpus, known)[0] for gpu in gpus}
    except TurbofitError as exc:  # Ray was told of more than there are
        return replace(node, machine=None, why_not=exc.message)
    visible = tuple(index for index in machine.visible if index in indices)
    return replace(node, machine=replace(machine, visible=visible))


def node_of(node: Node, answer: Node | RayCallError | None) -> Node:
    """The node with its own answer, or with the reason why there is none."""
    if isinstance(answer, Node):
        return replace(answer, id=node.id, name=node.name, address=node.address)
    text = " ".join(str(answer).split())
    why = f"it could not be measured: {text[-200:]}"
    if answer is None:
        why = "Ray counts no GPU there"
    elif "No module named 'turbofit" in text:
        why = "turbofit is not installed there"
    elif text.startswith("System error"):  # Ray's words if a result cannot be read
        why = f"its turbofit answers otherwise: {text[-200:]}"
    return replace(node, why_not=why)


def raylet_environment() -> Mapping[str, str]:
    """The environment that Ray was started with on this node: a task may see fewer GPUs."""
    try:
        with open(f"/proc/{os.getppid()}/environ", encoding="utf-8", errors="replace") as file:
            pairs = (entry.partition("=") for entry in file.read().split("\0"))
            return {name: value for name, _, value in pairs}
    except OSError:
        return os.environ


#: The largest number of simulated nodes; a larger one is taken for a typing error.
_MOST_NODES: Final = 10_000


def cluster_from(text: str) -> Cluster:
    """The cluster that a value of ``--cluster`` names.

    Raises:
        UsageError: the text names no cluster, or its file cannot be read.
    """
    kind, _, rest = text.partition(":")
    if kind == "ray":
        return measure_nodes(rest or None)
    if kind == "sim":
        return _simulated(rest)
    raise UsageError(
        f"--cluster {text[:60]!r} is no cluster",
        hint="give ray, ray:ADDRESS, or sim:4xrtx3090@100/node.json@2 with a snapshot in this "
        "folder (turbofit machine --save node.json)",
    )


def _simulated(text: str) -> Cluster:
    """The cluster of ``SPEC@COUNT`` parts joined by ``/``; each SPEC is read once."""
    nodes: list[Node] = []
    counts = []
    for part in text.split("/"):
        spec, _, number = part.rpartition("@") if "@" in part else (part, "", "1")
        count = int(number) if number.isdecimal() else 0
        if not 1 <= count <= _MOST_NODES - len(nodes):
            raise UsageError(
                f"--cluster: {part[:60]!r} is not SPEC@COUNT, or more nodes than are simulated",
                hint=f"write it like sim:4xrtx3090@100/8xh100@2, {_MOST_NODES:,} nodes at most",
            )
        if text and not spec.strip("./~ "):
            raise UsageError(
                f"--cluster: {text[:60]!r} has a machine without a name: / parts machines",
                hint="start turbofit in a snapshot's folder, and name the snapshot without it",
            )
        machine = machine_from(spec)
        for _ in range(count):
            name = f"sim-{len(nodes) + 1}"
            nodes.append(Node(id=name, name=name, address="", machine=machine))
        counts.append(f"{count:,} of {machine.name}")
    return Cluster(source=f"simulated: {', '.join(counts)}", nodes=tuple(nodes))
