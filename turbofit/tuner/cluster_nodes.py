"""The nodes of a cluster by kind; nodes of a kind have equal cards, equally full."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from sys import maxsize
from typing import Final

from msgspec.structs import replace

from turbofit.core.cluster import Node
from turbofit.core.machine import Host, Machine
from turbofit.core.plan import Plan
from turbofit.core.struct import NA, Struct, known
from turbofit.core.units import GIB
from turbofit.core.version import REFERENCE, __version__
from turbofit.memory.versions import release

#: Nodes of a kind may differ by this much free host memory; the least is planned for.
_HOST_STEP: Final = 8 * GIB


class Kind(Struct, eq=False):  # a key of dictionaries: no machines are compared
    """Nodes that run with the same settings; ``machine`` is used to plan for all of them."""

    machine: Machine
    nodes: tuple[Node, ...]

    def on(self, node: Node, plan: Plan) -> Plan:
        """The kind's plan with one node's machine and GPU ids."""
        machine = machine_of(node)
        gpus = (replace(ledger, uuid=machine.gpu(ledger.index).uuid) for ledger in plan.gpus)
        return replace(plan, machine=machine, gpus=tuple(gpus))


def why_unusable(node: Node) -> str:
    """The reason why a node cannot be planned for, apart from memory; empty if it can be."""
    if node.machine is None:
        return node.why_not or "it was not measured"
    if not node.machine.visible:
        return node.why_not or "it has no GPU that may be used"
    if node.turbofit and node.turbofit != __version__:  # snapshots and SPECs have no version
        return (
            f"it has turbofit {node.turbofit}, this one is {__version__}: its memory would be"
            " measured and its engines be started by other rules"
        )
    if node.lmdeploy and release(node.lmdeploy) != release(REFERENCE):
        return f"it has LMDeploy {node.lmdeploy}, and plans are for {REFERENCE}"
    return node.why_not


def kinds_of(nodes: Sequence[Node]) -> tuple[Kind, ...]:
    by_kind: dict[Hashable, list[Node]] = {}
    for node in nodes:
        by_kind.setdefault(_kind_key(machine_of(node)), []).append(node)
    return tuple(
        Kind(machine=min(map(machine_of, members), key=_host_room), nodes=tuple(members))
        for members in by_kind.values()
    )


def _host_room(machine: Machine) -> int:
    return known(machine.host.ram_available, maxsize)


def _kind_key(machine: Machine) -> Hashable:
    """All that planning reads of a machine; it is equal for all nodes of a kind."""
    gpus = tuple(replace(gpu, uuid="", holders=()) for gpu in machine.gpus)
    learned = tuple(replace(calibration, when="") for calibration in machine.calibrations)
    alike = replace(
        machine, name="", source="", gpus=gpus, host=Host(), warnings=(), cuda=NA,
        driver=machine.driver if learned else NA, calibrations=learned,
    )  # fmt: skip
    return alike, _host_room(machine) // _HOST_STEP


def machine_of(node: Node) -> Machine:
    assert node.machine is not None
    return node.machine


def cards_of(machine: Machine | None) -> str:
    """The visible cards in words; empty if nothing was measured."""
    if machine is None:
        return ""
    names = Counter(machine.gpu(index).name for index in machine.visible)
    return " + ".join(f"{n}x {name}" for name, n in names.items())
