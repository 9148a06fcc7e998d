"""What each node of a Ray cluster is: one short task a node measures it as `turbofit machine` does.

A node that cannot be measured is a node with a reason, never an error.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec.structs import replace

from turbofit.core.cluster import Cluster, Node
from turbofit.core.errors import TurbofitError
from turbofit.core.process.variables import variables
from turbofit.core.version import __version__
from turbofit.launch.cluster import ray_adapter

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from turbofit.core.machine import Machine
    from turbofit.launch.cluster.ray_adapter import RayCallError, RayNode

__all__ = ["held_only", "measure_here", "measure_nodes", "raylet_environment"]

_SECONDS: Final = 120.0


def measure_nodes(address: str | None, *, pretend: bool = False) -> Cluster:
    """The nodes of a Ray cluster, measured; None is the one of this host."""
    with ray_adapter.connected(address) as ray:
        nodes = ray.alive().values()
        with_gpus = [node.id for node in nodes if node.gpus]
        found = ray_adapter.run_on_each(with_gpus, measure_here, pretend, _SECONDS)
        told = tuple(_told(node, found.get(node.id)) for node in nodes)
        return Cluster(source=f"ray {ray.address}", nodes=told)


def measure_here(pretend: bool) -> bytes:
    """What this node is, as JSON; runs on the node."""
    return msgspec.json.encode(_here(pretend=pretend))


def held_only(node: Node, gpus: Iterable[str]) -> Node:
    """The node with none but these GPUs to plan for."""
    from turbofit.machine.visible import select

    machine = node.machine
    if machine is None:
        return node
    known = [gpu.index for gpu in machine.gpus]
    held = {select(one, machine.gpus, known)[0] for one in gpus if _has(machine, one)}
    visible = tuple(index for index in machine.visible if index in held)
    return replace(node, machine=replace(machine, visible=visible))


def _has(machine: Machine, gpu: str) -> bool:
    """Whether the machine has the GPU: a pretend one may have fewer GPUs than Ray was told."""
    return machine.source == "nvml" or not gpu.isdigit() or int(gpu) < len(machine.gpus)


def _told(node: RayNode, found: bytes | RayCallError | None) -> Node:
    """What a node says, or why it says nothing."""
    why = "Ray counts no GPU there"
    if isinstance(found, bytes):
        try:
            told = msgspec.json.decode(found, type=Node)
            return replace(told, id=node.id, address=node.address)
        except msgspec.MsgspecError as exc:  # another turbofit
            why = f"its turbofit answers otherwise: {exc}"
    elif isinstance(found, ray_adapter.ResultTimeoutError):
        why = f"it did not answer within {_SECONDS:.0f} s"
    elif found is not None:
        text = " ".join(str(found).split())
        why = f"it could not be measured: {text[-200:]}"
        if "No module named 'turbofit" in text:
            why = "turbofit is not installed there"
    return Node(id=node.id, name=node.name, address=node.address, why_not=why)


def _here(*, pretend: bool) -> Node:
    from turbofit.launch.engine.environment import find_lmdeploy
    from turbofit.machine.source import machine_from
    from turbofit.observe.calibrations import pretends, with_calibrations

    node = Node(id="", name=socket.gethostname(), address="", turbofit=__version__)
    with suppress(TurbofitError):  # the engine may be another one; planning tells
        node = replace(node, lmdeploy=find_lmdeploy().version)
    try:
        spec = variables().node_spec or None if pretend else None
        machine = machine_from(spec, environ=raylet_environment())
        # What was learned on this node: it is not the one that plans.
        machine = with_calibrations(machine, pretend=machine.source != "nvml" or pretends())
    except TurbofitError as exc:
        return replace(node, why_not=exc.message)
    return replace(node, machine=machine, pretend=pretend)


def raylet_environment() -> Mapping[str, str]:
    """The environment that Ray was started with on this node: a task may see fewer GPUs."""
    try:
        with open(f"/proc/{os.getppid()}/environ", encoding="utf-8", errors="replace") as file:
            pairs = (entry.partition("=") for entry in file.read().split("\0"))
            return {name: value for name, _, value in pairs}
    except OSError:
        return os.environ
