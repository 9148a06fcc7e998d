"""Nodes that are planned as one: alike in hardware, and about equally full.

A kind is planned for the least memory that any member has free, card by card, so that its settings
hold on every member. This is over: the freer members get less cache than they could have, by no
more than the step. Where full cards make many kinds the steps grow, and cards of one node that are
about equally full count as equally full.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from math import log2
from typing import Final

from msgspec.structs import replace

from turbofit.core.cluster import Node
from turbofit.core.machine import Gpu, Machine
from turbofit.core.struct import Struct, known
from turbofit.core.units import GIB, MIB

__all__ = ["Kind", "Rounding", "kinds_of"]


class Rounding(Struct):
    """``step`` bytes of used memory count as one; cards of a node within ``span`` as alike."""

    step: int
    span: int = 0


#: From fine to coarse; the first that leaves few kinds is taken.
_ROUNDINGS: Final = (
    Rounding(step=16 * MIB),
    Rounding(step=64 * MIB, span=256 * MIB),
    Rounding(step=256 * MIB, span=2 * GIB),
    Rounding(step=GIB, span=4 * GIB),
    Rounding(step=2 * GIB, span=8 * GIB),
    Rounding(step=4 * GIB, span=16 * GIB),
)
_EXACT: Final = Rounding(step=1)
#: Searches that are few enough; for more the next coarser rounding is tried. A search over many
#: cards that are all differently full takes as long as so many others.
_MOST_SEARCHES: Final = 24
_UNEVEN_COST: Final = 20
_UNEVEN_LEVELS: Final = 4
_HOST_STEP: Final = 8 * GIB
_HOST_FINE: Final = 64 * GIB
#: Measured speeds that differ by less than a fifth or so are alike.
_OCTAVE: Final = 4


class Kind(Struct):
    """Nodes that run the same settings; ``machine`` is what these are planned for."""

    machine: Machine
    nodes: tuple[Node, ...]


def kinds_of(nodes: Sequence[Node], *, exact: bool = False) -> tuple[tuple[Kind, ...], Rounding]:
    """The nodes by kind, in their order, and how coarsely their memory was rounded.

    Args:
        nodes: all with a machine.
        exact: only nodes that are equally full to the byte are of one kind.
    """
    hardware = [_hardware(_machine(node)) for node in nodes]
    least = len(set(hardware))
    for rounding in (_EXACT,) if exact else _ROUNDINGS:
        found = _fold(nodes, hardware, rounding)
        cost = sum(_cost(_machine(members[0]), rounding) for members in found)
        if cost <= max(_MOST_SEARCHES, least):
            break
    return tuple(_kind(members, rounding) for members in found), rounding


def _fold(
    nodes: Sequence[Node], hardware: Sequence[Hashable], rounding: Rounding
) -> list[list[Node]]:
    found: dict[Hashable, list[Node]] = {}
    for node, same in zip(nodes, hardware, strict=True):
        machine = _machine(node)
        key = (same, _fullness(machine, rounding), _room(machine, fine=not rounding.span))
        found.setdefault(key, []).append(node)
    return list(found.values())


def _cost(machine: Machine, rounding: Rounding) -> int:
    """How long a kind takes to plan: one, or more where many cards are differently full."""
    levels = len(set(_fullness(machine, rounding)))
    return _UNEVEN_COST if levels > _UNEVEN_LEVELS else 1


def _kind(members: list[Node], rounding: Rounding) -> Kind:
    """What the members are planned for; a member that is alone and not levelled stays as it is."""
    first = _machine(members[0])
    worst = [_levelled(_machine(node), rounding.span) for node in members]
    fullest = {index: max(used[index] for used in worst) for index in first.visible}
    available = min(_available(_machine(node)) for node in members)
    gpus = tuple(
        _filled(gpu, fullest[gpu.index]) if gpu.index in fullest else gpu for gpu in first.gpus
    )
    host = first.host
    if available < _available(first):
        host = replace(host, ram_available=int(available))
    return Kind(machine=replace(first, gpus=gpus, host=host), nodes=tuple(members))


def _filled(gpu: Gpu, used: int) -> Gpu:
    more = used - known(gpu.used, 0)
    return replace(gpu, used=used, free=known(gpu.free, 0) - more) if more else gpu


def _fullness(machine: Machine, rounding: Rounding) -> tuple[int, ...]:
    """Used memory of each visible card in whole steps, rounded up."""
    used = _levelled(machine, rounding.span)
    return tuple(-(-used[index] // rounding.step) for index in machine.visible)


def _levelled(machine: Machine, span: int) -> dict[int, int]:
    """Used bytes by index; of equal cards that differ by no more than the span, the fullest's."""
    used = {index: known(machine.gpu(index).used, 0) for index in machine.visible}
    level: dict[tuple[str, object], int] = {}
    for index in sorted(used, key=lambda one: -used[one]):
        gpu = machine.gpu(index)
        top = level.get((gpu.name, gpu.total))
        if top is None or top - used[index] > span:
            level[gpu.name, gpu.total] = top = used[index]
        used[index] = top
    return used


def _hardware(machine: Machine) -> Hashable:
    """All that planning reads of a machine but its used memory, names and processes."""
    cards = tuple(
        (
            gpu.index, gpu.name, gpu.total, gpu.reserved, gpu.compute_capability, gpu.sm_count,
            gpu.l2, gpu.memory_bandwidth, gpu.dense_flops, gpu.pcie, gpu.mig,
        )
        for gpu in machine.gpus
    )  # fmt: skip
    learned = tuple(replace(one, when="") for one in machine.calibrations)
    driver = machine.driver if learned else ""
    return (cards, machine.visible, machine.links, _speeds(machine), learned, driver)


def _speeds(machine: Machine) -> Hashable:
    """Measured speeds, so coarse that equal machines agree."""
    if machine.measured is None:
        return None
    found = machine.measured
    return (
        tuple((one.index, _coarse(one.bandwidth), _coarse(one.flops)) for one in found.cards),
        tuple((one.gpus, one.size, one.right, _coarse(one.seconds)) for one in found.reduces),
    )


def _coarse(value: float) -> int:
    return round(_OCTAVE * log2(value)) if value > 0 else 0


def _room(machine: Machine, *, fine: bool) -> int:
    """Free host memory as a class: the less of a class is what is planned for."""
    available = _available(machine)
    if available == float("inf"):
        return -1
    if fine and available < _HOST_FINE:
        return int(available) // _HOST_STEP
    return _HOST_FINE + int(available).bit_length()


def _available(machine: Machine) -> float:
    available = machine.host.ram_available
    return float("inf") if available == "NA" else float(available)


def _machine(node: Node) -> Machine:
    assert node.machine is not None
    return node.machine
