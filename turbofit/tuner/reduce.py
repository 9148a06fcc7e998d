"""How long a group's all-reduce takes: a latency and a bandwidth by the class of its worst link."""

from __future__ import annotations

from collections.abc import Sequence
from math import log2

from turbofit.core.machine import Gpu, Machine
from turbofit.core.struct import Struct, known
from turbofit.tuner.links import LinkClass, group_class, nvlink_bandwidth
from turbofit.tuner.rates import Rates

__all__ = ["Reduce", "reduce_of"]


class Reduce(Struct):
    """An all-reduce of ``ranks`` GPUs.

    ``latency`` is of two ranks in seconds; ``bandwidth`` is what one of two GPUs sends, in bytes/s.
    ``shared_by`` ranks cross one host bridge and take from each other what two of them have.
    """

    ranks: int
    latency: float = 0.0
    bandwidth: float = 1.0
    shared_by: int = 2

    def seconds(self, size: float) -> float:
        """Seconds for ``size`` bytes: a latency, half of it by the tree's depth; a ring's traffic."""
        if self.ranks == 1:
            return 0.0
        traffic = 2 * size * (self.ranks - 1) / self.ranks
        traffic *= max(2, min(self.ranks, self.shared_by)) / 2
        return self.latency * (1 + log2(self.ranks)) / 2 + traffic / self.bandwidth


def reduce_of(machine: Machine, gpus: Sequence[Gpu], figures: Rates) -> Reduce:
    """The all-reduce of a group. Unread links count as the slowest, so the forecast is low."""
    kind, ranks = group_class(machine, gpus), len(gpus)
    if kind == LinkClass.ALONE:
        return Reduce(ranks=1)
    slot = figures.pcie_bandwidth * min(_pcie_scale(gpu) for gpu in gpus)
    host = min(figures.host_bandwidth, slot * figures.host_factor)
    if kind == LinkClass.NVLINK:
        bandwidth = nvlink_bandwidth(machine, gpus) * figures.nvlink_efficiency
        return Reduce(ranks=ranks, latency=figures.nvlink_latency, bandwidth=max(bandwidth, host))
    if kind == LinkClass.PCIE_PEER:
        return Reduce(
            ranks=ranks,
            latency=figures.pcie_latency,
            bandwidth=slot,
            shared_by=figures.bridge_ranks,
        )
    if kind == LinkClass.ACROSS_HOST:
        host *= figures.across_factor
    return Reduce(
        ranks=ranks, latency=figures.host_latency, bandwidth=host, shared_by=figures.bridge_ranks
    )


def _pcie_scale(gpu: Gpu) -> float:
    """The card's PCIe link relative to 3.0 x16; the older where unknown."""
    generation, width = known(gpu.pcie.generation, 3), known(gpu.pcie.width, 16)
    return float(2.0 ** (generation - 3) * width / 16)
