"""How long a group's all-reduce takes: a latency and a bandwidth by the class of its worst link."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from math import log2

from msgspec.structs import replace

from turbofit.core.machine import Gpu, Link, Machine
from turbofit.core.struct import Struct, known
from turbofit.tuner.speed.rates import Rates, rates

__all__ = [
    "AllReduce", "LinkClass", "all_reduce_of", "group_class", "link_class", "nvlink_bandwidth",
    "reduce_class",
]  # fmt: skip


class LinkClass(IntEnum):
    """Kinds of link from slow to fast; unread links count as the slowest."""

    ACROSS_HOST = 0
    HOST = 1
    PCIE_PEER = 2
    NVLINK = 3
    ALONE = 4

    @property
    def words(self) -> str:
        """The class as people say it."""
        return {
            LinkClass.ACROSS_HOST: "through host memory across NUMA nodes",
            LinkClass.HOST: "through host memory, no peer access",
            LinkClass.PCIE_PEER: "PCIe peer access",
            LinkClass.NVLINK: "NVLink",
            LinkClass.ALONE: "one GPU",
        }[self]


def group_class(machine: Machine, gpus: Sequence[Gpu]) -> LinkClass:
    """The class of a group."""
    links = _links(machine, gpus)
    return min((link_class(link) for link in links), default=LinkClass.ALONE)


def nvlink_bandwidth(machine: Machine, gpus: Sequence[Gpu]) -> int:
    """Bytes/s in one direction of the slowest NVLink in the group, 0 where there is none."""
    return min((known(link.nvlink_bandwidth, 0) for link in _links(machine, gpus)), default=0)


def _links(machine: Machine, gpus: Sequence[Gpu]) -> list[Link]:
    return [machine.link(a.index, b.index) for k, a in enumerate(gpus) for b in gpus[:k]]


def link_class(link: Link) -> LinkClass:
    """The class of one link."""
    if link.nvlinked:
        return LinkClass.NVLINK
    if link.peers:
        return LinkClass.PCIE_PEER
    return LinkClass.ACROSS_HOST if link.ancestor == "system" else LinkClass.HOST


class AllReduce(Struct):
    """An all-reduce of ``ranks`` GPUs.

    ``latency`` is of two ranks in seconds; ``bandwidth`` is what one of two GPUs sends, in bytes/s.
    ``shared_by`` ranks cross one host bridge and take from each other what two of them have.
    """

    ranks: int
    latency: float = 0.0
    bandwidth: float = 1.0
    shared_by: int = 2

    @property
    def launch(self) -> float:
        """Seconds whatever the bytes: the latency, half of it by the tree's depth."""
        return 0.0 if self.ranks == 1 else self.latency * (1 + log2(self.ranks)) / 2

    @property
    def seconds_per_byte(self) -> float:
        """Seconds of a byte's traffic."""
        if self.ranks == 1:
            return 0.0
        traffic = 2 * (self.ranks - 1) / self.ranks * max(2, min(self.ranks, self.shared_by)) / 2
        return traffic / self.bandwidth

    def seconds(self, size: float) -> float:
        """Seconds for ``size`` bytes."""
        return self.launch + size * self.seconds_per_byte


def all_reduce_of(machine: Machine, gpus: Sequence[Gpu], figures: Rates) -> AllReduce:
    """The all-reduce of a group. Unread links count as the slowest, so the forecast is low."""
    kind, ranks = group_class(machine, gpus), len(gpus)
    if kind == LinkClass.ALONE:
        return AllReduce(ranks=1)
    found = _measured(machine, gpus)
    if found is not None:
        return found
    slot = figures.pcie_bandwidth * min(_pcie_scale(gpu) for gpu in gpus)
    host = min(figures.host_bandwidth, slot * figures.host_factor)
    if kind == LinkClass.NVLINK:
        bandwidth = nvlink_bandwidth(machine, gpus) * figures.nvlink_efficiency
        return AllReduce(
            ranks=ranks, latency=figures.nvlink_latency, bandwidth=max(bandwidth, host)
        )
    if kind == LinkClass.PCIE_PEER:
        return AllReduce(
            ranks=ranks,
            latency=figures.pcie_latency,
            bandwidth=slot,
            shared_by=figures.bridge_ranks,
        )
    if kind == LinkClass.ACROSS_HOST:
        host *= figures.across_factor
    return AllReduce(
        ranks=ranks, latency=figures.host_latency, bandwidth=host, shared_by=figures.bridge_ranks
    )


def reduce_class(machine: Machine, gpus: Sequence[Gpu]) -> int:
    """Groups of one link class whose measured all-reduces differ by two fifths differ in this."""
    if machine.measured is None or len(gpus) == 1:
        return 0
    return round(2 * log2(all_reduce_of(machine, gpus, rates()).seconds(1 << 20)))


def _measured(machine: Machine, gpus: Sequence[Gpu]) -> AllReduce | None:
    """The group's own all-reduce where it was measured, or that of its slowest measured pair.

    The second is for groups that nobody measured: as if all of it crossed one host bridge, so low.
    """
    if machine.measured is None:
        return None
    indices = frozenset(gpu.index for gpu in gpus)
    by_group: dict[frozenset[int], dict[int, float]] = {}
    for one in machine.measured.reduces:
        if one.right:
            by_group.setdefault(frozenset(one.gpus), {})[one.size] = one.seconds
    curve = by_group.get(indices)
    if curve is not None and len(curve) > 1:
        return _line(curve, len(gpus), len(gpus))
    pairs = [times for group, times in by_group.items() if group <= indices and len(group) == 2]
    wanted = len(indices) * (len(indices) - 1) // 2
    if len(pairs) < wanted or any(len(times) < 2 for times in pairs):
        return None
    lines = [_line(times, 2, len(gpus)) for times in pairs]
    slowest = max(lines, key=lambda line: line.seconds(1 << 20))
    return replace(slowest, shared_by=len(gpus))


def _line(times: dict[int, float], measured: int, ranks: int) -> AllReduce:
    """A latency and a bandwidth through the smallest and the largest size of ``measured`` ranks."""
    small, large = min(times), max(times)
    slope = max((times[large] - times[small]) / (large - small), 1e-15)
    latency = max(times[small] - slope * small, 0.0) / ((1 + log2(measured)) / 2)
    return AllReduce(ranks=ranks, latency=latency, bandwidth=2 * (measured - 1) / measured / slope)


def _pcie_scale(gpu: Gpu) -> float:
    """The card's PCIe link relative to 3.0 x16; the older where unknown, 0 is no answer."""
    generation, width = known(gpu.pcie.generation, 0) or 3, known(gpu.pcie.width, 0) or 16
    return float(2.0 ** (generation - 3) * width / 16)
