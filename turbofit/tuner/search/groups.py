"""Which GPUs go together: every way to cut equal GPUs into groups, without its mirror images.

Two groupings whose groups hold equally full cards behind equal links are the same to every
forecast: only the one with the smallest indices is kept, so permuting equal GPUs changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, combinations, islice, product

from turbofit.core.machine import Gpu, Machine
from turbofit.core.struct import known
from turbofit.core.units import MIB
from turbofit.tuner.speed.all_reduce import reduce_class
from turbofit.tuner.speed.links import LinkClass, group_class

__all__ = ["groupings", "kinds", "like_groups", "mixed_groupings"]

#: Beyond this many equal GPUs every grouping is too many: they are cut in an order of their links.
_EXHAUSTIVE = 8
#: Ways to group one kind by one degree that are tried beside those of another; about how many ways
#: to put kinds side by side are tried.
_MIXED = 4
_MOST_MIXED = 48
#: Cards whose used memory differs by less run one set of settings: it loses them no more than this.
_ALIKE = 64 * MIB

Group = tuple[int, ...]
GroupSignature = tuple[tuple[tuple[int, int, int], ...], LinkClass, int]
Signature = tuple[GroupSignature, ...]


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
    if _uniform(machine, gpus):
        ways = islice(ways, 1)
    distinct: dict[Signature, tuple[Group, ...]] = {}
    seen: dict[Group, GroupSignature] = {}

    def signature_of(group: Sequence[Gpu]) -> GroupSignature:
        indices = tuple(gpu.index for gpu in group)
        if indices not in seen:
            seen[indices] = _signature(machine, group)
        return seen[indices]

    for way in ways:
        signature = tuple(sorted(map(signature_of, way)))
        if signature not in distinct:
            distinct[signature] = tuple(map(_ordered, way))
    return list(distinct.values())


def mixed_groupings(
    machine: Machine,
    parts: Sequence[Sequence[Gpu]],
    tps: Sequence[Sequence[int]],
    replicas: int | None = None,
) -> list[tuple[Group, ...]]:
    """As many groups as each kind of card gives, of two or more kinds side by side.

    Each group is of one kind; kinds may be split by unequal degrees, ``tps`` of each. All kinds
    together and small degrees come first, and what goes on beyond a bound is not looked at. Empty
    where fewer than two kinds give any group. ``replicas`` is how many groups there must be, where
    that is known.
    """
    found = [
        [way for tp in degrees for way in groupings(machine, gpus, tp, len(gpus) // tp)[:_MIXED]]
        for gpus, degrees in zip(parts, tps, strict=True)
    ]
    found = [ways for ways in found if ways]
    sets = (some for k in range(len(found), 1, -1) for some in combinations(found, k))
    together = list(islice(sets, _MOST_MIXED))
    each = max(2, _MOST_MIXED // max(1, len(together)))
    mixed: list[tuple[Group, ...]] = []
    for some in together:
        fitting = (way for way in _side_by_side(some) if replicas in (None, len(way)))
        mixed += islice(fitting, each)
    return mixed[: 2 * _MOST_MIXED]


def like_groups(machine: Machine, groups: Sequence[Group]) -> tuple[tuple[Group, ...], ...]:
    """The groups by what their cards have free, the freest first; links do not matter.

    Cards of a set are equal, place by place, but for a little memory that others hold.
    """
    sets: list[list[Group]] = []
    for group in sorted(groups, key=lambda one: (*_cards(machine, one), one)):
        cards = _cards(machine, group)
        for members in sets:
            first = _cards(machine, members[0])
            if len(first) == len(cards) and all(map(_alike, first, cards)):
                members.append(group)
                break
        else:
            sets.append([group])
    return tuple(tuple(sorted(members)) for members in sets)


def _cards(machine: Machine, group: Group) -> tuple[tuple[int, str, int, int], ...]:
    """Of each card: used memory, name, total, reserved."""
    gpus = [machine.gpu(index) for index in group]
    return tuple(
        (known(gpu.used, 0), gpu.name, known(gpu.total, 0), known(gpu.reserved, 0)) for gpu in gpus
    )


def _alike(one: tuple[int, str, int, int], other: tuple[int, str, int, int]) -> bool:
    return one[1:] == other[1:] and abs(one[0] - other[0]) < _ALIKE


def _side_by_side(kinds: Sequence[Sequence[tuple[Group, ...]]]) -> Iterator[tuple[Group, ...]]:
    """One way of each kind, those first that come early in their own lists."""
    places = product(*(range(len(ways)) for ways in kinds))
    for chosen in sorted(places, key=sum):
        yield tuple(chain(*(ways[place] for ways, place in zip(kinds, chosen, strict=True))))


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


def _uniform(machine: Machine, gpus: Sequence[Gpu]) -> bool:
    """Whether all ways to group these GPUs are the same: equal cards, and equal links or none."""
    cards = {(gpu.total, gpu.reserved, gpu.used) for gpu in gpus}
    if len(cards) > 1 or machine.measured is not None:
        return False
    return len({group_class(machine, pair) for pair in combinations(gpus, 2)}) <= 1


def _signature(machine: Machine, group: Sequence[Gpu]) -> GroupSignature:
    cards = tuple(
        sorted((known(g.total, 0), known(g.reserved, 0), known(g.used, 0)) for g in group)
    )
    return cards, group_class(machine, group), reduce_class(machine, group)


def _ordered(group: Sequence[Gpu]) -> Group:
    return tuple(gpu.index for gpu in sorted(group, key=lambda gpu: (-_left(gpu), gpu.index)))


def _left(gpu: Gpu) -> int:
    return gpu.usable - known(gpu.used, 0)
