"""Where a cluster comes from: Ray, a file, or a SPEC of simulated machines.

    --cluster ray                          the Ray cluster that this machine belongs to
    --cluster ray:10.0.0.1:6379            the one with this address
    --cluster nodes.json                   a file of schema turbofit.cluster/1
    --cluster sim:4xrtx3090@100/8xh100@2   100 machines of one SPEC and two of another, simulated

A SPEC is what ``--on`` takes. Nobody needs Ray for the last two.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from msgspec.structs import replace

from turbofit.core.cluster import CLUSTER_SCHEMA, Cluster, Node
from turbofit.core.errors import UsageError
from turbofit.core.struct import NA
from turbofit.machine.snapshot import check_possible
from turbofit.machine.spec import parse_spec

__all__ = ["MOST_NODES", "cluster_from"]

#: More simulated nodes than this are taken for a typing error.
MOST_NODES: Final = 10_000
_SIM: Final = "sim:"
_RAY: Final = "ray"
_EXAMPLE: Final = "ray, ray:ADDRESS, a file that ends in .json, or sim:4xrtx3090@100/8xh100@2"


def cluster_from(text: str) -> Cluster:
    """The cluster that ``--cluster`` names."""
    if text.startswith(_SIM):
        return _simulated(text.removeprefix(_SIM))
    if text == _RAY or text.startswith(f"{_RAY}:"):
        from turbofit.launch.cluster.nodes import measure_nodes

        return measure_nodes(text.partition(":")[2] or None)
    if "/" in text or text.endswith(".json"):
        return _from_file(text)
    raise UsageError(f"--cluster {text[:60]!r} is no cluster", hint=f"give {_EXAMPLE}")


def _simulated(text: str) -> Cluster:
    """``SPEC@COUNT`` joined by ``/``; each SPEC is read once."""
    nodes: list[Node] = []
    told = []
    for part in text.split("/"):
        spec, at, number = part.rpartition("@")
        if not at:
            spec, number = part, "1"
        if not number.strip().isdecimal() or not 1 <= int(number) <= MOST_NODES:
            raise UsageError(
                f"--cluster: {part[:60]!r} is not SPEC@COUNT",
                hint=f"write it like sim:4xrtx3090@100/8xh100@2, {MOST_NODES:,} nodes at most",
            )
        machine = parse_spec(spec)
        for _ in range(int(number)):
            name = f"sim-{len(nodes) + 1}"
            nodes.append(Node(id=name, name=name, address="", machine=machine))
        told.append(f"{int(number):,} of {machine.name}")
    if len(nodes) > MOST_NODES:
        raise UsageError(
            f"--cluster: {len(nodes):,} nodes", hint=f"simulate {MOST_NODES:,} at most"
        )
    return Cluster(source=f"simulated: {', '.join(told)}", nodes=tuple(nodes))


def _from_file(path: str) -> Cluster:
    what = f"cluster {path}"
    try:
        data = Path(path).read_bytes()
    except OSError as exc:
        raise UsageError(
            f"{path} cannot be read: {exc.strerror or exc}", hint=f"give {_EXAMPLE}"
        ) from None
    cluster = Cluster.from_json(data, what=what)
    if cluster.schema != CLUSTER_SCHEMA:
        raise UsageError(
            f"{what} has schema {cluster.schema[:60]!r}; this turbofit reads {CLUSTER_SCHEMA!r}",
            hint="a cluster that turbofit measured is such a file",
        )
    if len({node.id for node in cluster.nodes}) != len(cluster.nodes):
        raise UsageError(f"{what}: two nodes have one id", hint="measure the cluster again")
    nodes = tuple(_checked(node, what) for node in cluster.nodes)
    return replace(cluster, source=f"{cluster.source} ({path})", nodes=nodes)


def _checked(node: Node, what: str) -> Node:
    """The node with GPUs whose memory was read, all visible ones unless it says which."""
    machine = node.machine
    if machine is None:
        return node
    check_possible(machine, f"node {node.name} of {what}")
    visible = machine.visible or tuple(gpu.index for gpu in machine.gpus)
    read = tuple(i for i in visible if NA not in (machine.gpu(i).total, machine.gpu(i).free))
    why = node.why_not if read else "the memory of its GPUs could not be read"
    return replace(node, machine=replace(machine, visible=read), why_not=why)
