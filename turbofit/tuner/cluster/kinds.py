"""Nodes that are planned as one: alike in hardware, and about equally full.

A kind is planned for the least memory that any member has free, card by card, so that its settings
hold on every member. This is over: the freer members get less cache than they could have, by no
more than the step. Where full cards make many kinds the step grows.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from sys import maxsize
from typing import Final

from msgspec.structs import replace

from turbofit.core.cluster import Node
from turbofit.core.machine import Gpu, Host, Machine
from turbofit.core.plan import Plan
from turbofit.core.struct import NA, Struct, known
from turbofit.core.units import GIB, MIB
from turbofit.core.version import REFERENCE, __version__
from turbofit.memory.versions import release

#: Bytes of used memory that count as one, from fine to coarse, and the kinds that are few enough.
_STEPS: Final = (16 * MIB, 64 * MIB, 256 * MIB, GIB, 2 * GIB, 4 * GIB)
_MOST_KINDS: Final = 24
#: Free host memory within so much is alike, where there is less than so much.
_HOST_STEP: Final = 8 * GIB
_HOST_FINE: Final = 64 * GIB


class Kind(Struct):
    """Nodes that run the same settings; ``machine`` is what these are planned for."""

    machine: Machine
    nodes: tuple[Node, ...]

    def on(self, node: Node, plan: Plan) -> Plan:
        """The kind's plan under a member's own names, counted as full as the kind."""
        member = _machine(node)
        full = {gpu.index: gpu for gpu in self.machine.gpus}
        gpus = tuple(
            replace(gpu, used=full[gpu.index].used, free=full[gpu.index].free)
            for gpu in member.gpus
        )
        uuids = {gpu.index: gpu.uuid for gpu in member.gpus}
        return replace(
            plan,
            machine=replace(member, gpus=gpus, host=self.machine.host),
            gpus=tuple(replace(one, uuid=uuids[one.index]) for one in plan.gpus),
        )


def why_unusable(node: Node) -> str:
    """Why a node cannot be planned for, before any memory is counted; empty where it can.

    A version that is not told is not held against a node: snapshots and SPECs have none.
    """
    if node.machine is None:
        return node.why_not or "it was not measured"
    if not node.machine.visible:
        return node.why_not or "it has no GPU that may be used"
    if node.turbofit and node.turbofit != __version__:
        return (
            f"it has turbofit {node.turbofit}, this one is {__version__}: its memory would be"
            " measured and its engines be started by other rules"
        )
    if node.lmdeploy and release(node.lmdeploy) != release(REFERENCE):
        return f"it has LMDeploy {node.lmdeploy}, and plans are for {REFERENCE}"
    return node.why_not


def kinds_of(nodes: Sequence[Node], *, exact: bool = False) -> tuple[tuple[Kind, ...], int]:
    """The nodes by kind, in their order, and the step that their used memory was rounded by.

    ``exact``: only nodes that are equally full to the byte are of one kind.
    """
    machines = [_machine(node) for node in nodes]
    alike = [_but_for_memory(machine) for machine in machines]
    most = max(_MOST_KINDS, len(set(alike)))
    for step in (1,) if exact else _STEPS:
        found: dict[Hashable, list[Node]] = {}
        for node, machine, same in zip(nodes, machines, alike, strict=True):
            full = tuple(-(-known(machine.gpu(i).used, 0) // step) for i in machine.visible)
            found.setdefault((same, full, _room(machine)), []).append(node)
        if len(found) <= most:
            break
    return tuple(_kind(members) for members in found.values()), step


def _kind(members: list[Node]) -> Kind:
    """What its members have in common: of each card, and of host memory, the least."""
    machines = [_machine(node) for node in members]
    first = machines[0]

    def least(gpu: Gpu) -> Gpu:
        others = [machine.gpu(gpu.index) for machine in machines]
        fullest = max(others, key=lambda one: known(one.used, 0))
        return replace(gpu, used=fullest.used, free=fullest.free)

    gpus = tuple(least(gpu) if gpu.index in first.visible else gpu for gpu in first.gpus)
    rooms = [machine.host.ram_available for machine in machines]
    host = replace(first.host, ram_available=min(rooms, key=lambda room: known(room, maxsize)))
    return Kind(machine=replace(first, gpus=gpus, host=host), nodes=tuple(members))


def _but_for_memory(machine: Machine) -> Machine:
    """The machine without its names, and without what is free of its memory."""
    gpus = tuple(replace(gpu, uuid="", used=0, free=0, holders=()) for gpu in machine.gpus)
    learned = tuple(replace(one, when="") for one in machine.calibrations)
    return replace(
        machine, name="", source="", gpus=gpus, host=Host(), warnings=(), cuda=NA,
        driver=machine.driver if learned else NA, calibrations=learned,
    )  # fmt: skip


def _room(machine: Machine) -> int:
    """Free host memory as a class: the less of a class is what is planned for."""
    available = known(machine.host.ram_available, -_HOST_STEP)
    return available // _HOST_STEP if available < _HOST_FINE else available.bit_length()


def _machine(node: Node) -> Machine:
    assert node.machine is not None
    return node.machine
