"""How fast a group's all-reduce is: the worst link between any two of its GPUs decides."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

from turbofit.core.machine import Gpu, Link, Machine
from turbofit.core.struct import known

__all__ = ["LinkClass", "group_class", "link_class", "nvlink_bandwidth"]


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
