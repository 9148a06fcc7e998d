"""Which GPUs go together: every way to cut equal GPUs into groups, without its mirror images.

Two groupings whose groups hold equally full cards behind equal links are the same to every
forecast: only the one with the smallest indices is kept, so permuting equal GPUs changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, combinations, product

from turbofit.core.machine import Gpu, Machine
from turbofit.core.struct import known
from turbofit.tuner.links import LinkClass, group_class
from turbofit.tuner.reduce import reduce_class

__all__ = ["groupings", "kinds", "mixed_groupings"]

#: Beyond this many equal GPUs every grouping is too many: they are cut in an order of their links.
_EXHAUSTIVE = 8
#: Ways to group one kind that are tried beside those of another.
_MIXED = 4

Group = tuple[int, ...]
Signature = tuple[tuple[tuple[tuple[int, int, int], ...], LinkClass, int], ...]


def kinds(gpus: Sequence[Gpu]) -> list[tuple[Gpu, ...]]:
    """The GPUs by kind: one tensor-parallel group runs on equal cards only."""
    found: dict[tuple[object, ...], list[Gpu]] = {}
    for gpu in gpus:
        found.setdefault((gpu.name, gpu.total, gpu.compute_capability), []).append(gpu)
    return [tuple(group) for group in found.values()]


def groupings(
    machine: Machine, gpus: Sequence[Gpu], tp: int, replicas: int
) -> list[tuple[Group, ...]]:
    """The distinct ways to make ``replicas`` groups of ``tp`` of these equal GPUs.

    In each group the card with the most free memory comes first: it stages the load.
    """
    if tp * replicas > len(gpus):
        return []
    ways = (
        _partitions(tuple(gpus), tp, replicas)
        if len(gpus) <= _EXHAUSTIVE
        else iter([_in_order(machine, gpus, tp, replicas)])
    )
    distinct: dict[Signature, tuple[Group, ...]] = {}
    for way in ways:
        signature = tuple(sorted(_signature(machine, group) for group in way))
        distinct.setdefault(signature, tuple(_ordered(group) for group in way))
    return list(distinct.values())


def mixed_groupings(
    machine: Machine, parts: Sequence[Sequence[Gpu]], tp: int
) -> list[tuple[Group, ...]]:
    """As many groups of ``tp`` as each kind of card gives, of all kinds side by side.

    Each group is of one kind. Empty where fewer than two kinds give any.
    """
    found = [groupings(machine, gpus, tp, len(gpus) // tp) for gpus in parts if len(gpus) >= tp]
    if len(found) < 2:
        return []
    return [tuple(chain(*way)) for way in product(*(one[:_MIXED] for one in found))]


def _partitions(
    gpus: tuple[Gpu, ...], tp: int, replicas: int
) -> Iterator[tuple[tuple[Gpu, ...], ...]]:
    """Unordered choices of groups, smallest indices first."""
    if replicas == 0:
        yield ()
        return
    for start in range(len(gpus) - tp * replicas + 1):
        first, rest = gpus[start], gpus[start + 1 :]
        for others in combinations(rest, tp - 1):
            left = tuple(gpu for gpu in rest if gpu not in others)
            for more in _partitions(left, tp, replicas - 1):
                yield ((first, *others), *more)


def _in_order(
    machine: Machine, gpus: Sequence[Gpu], tp: int, replicas: int
) -> tuple[tuple[Gpu, ...], ...]:
    """Groups grown one by one from the freest card by the best link; for many GPUs only."""
    left = sorted(gpus, key=lambda gpu: (known(gpu.used, 0), gpu.index))
    groups = []
    for _ in range(replicas):
        group = [left.pop(0)]
        while len(group) < tp:
            best = max(
                left, key=lambda gpu: (group_class(machine, [*group, gpu]), -left.index(gpu))
            )
            left.remove(best)
            group.append(best)
        groups.append(tuple(group))
    return tuple(groups)


def _signature(
    machine: Machine, group: Sequence[Gpu]
) -> tuple[tuple[tuple[int, int, int], ...], LinkClass, int]:
    cards = tuple(
        sorted((known(g.total, 0), known(g.reserved, 0), known(g.used, 0)) for g in group)
    )
    return cards, group_class(machine, group), reduce_class(machine, group)


def _ordered(group: Sequence[Gpu]) -> Group:
    return tuple(
        gpu.index for gpu in sorted(group, key=lambda gpu: (known(gpu.used, 0), gpu.index))
    )
