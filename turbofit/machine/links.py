"""How GPUs reach each other: what a preset machine has, and what NVML measured."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from typing import TYPE_CHECKING, Literal

from turbofit.core.machine import Link
from turbofit.core.struct import NA

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turbofit.core.struct import NaType
    from turbofit.machine.presets import GpuPreset

Pair = tuple[int, int]


def preset_links(
    presets: Sequence[GpuPreset | None],
    *,
    nvlink: frozenset[Pair] | None = None,
    p2p: Literal["none", "all"] | None = None,
) -> tuple[Link, ...]:
    """The links of a machine that was described, GPU ``i`` being of ``presets[i]``.

    Args:
        presets: the card of each GPU, in index order; None where nothing is known to join it.
        nvlink: the pairs that NVLink joins; None for what such a machine has by default.
        p2p: peer access between all or no pairs; None for what the driver allows: over NVLink, and
            between equal cards whose driver allows it over PCIe. Unequal cards count as without
            peer access, which errs towards replicas.
    """
    links = []
    for a, b in combinations(range(len(presets)), 2):
        first, second = presets[a], presets[b]
        if first is None or second is None:
            links.append(Link(a=a, b=b, p2p_read=p2p == "all", p2p_write=p2p == "all", nvlinks=0))
            continue
        same = first.name == second.name
        joined = (a, b) in nvlink if nvlink is not None else same and first.nvlink.default
        lanes = min(first.nvlink.lanes_per_pair, second.nvlink.lanes_per_pair) if joined else 0
        speed = min(first.nvlink.lane_bandwidth, second.nvlink.lane_bandwidth)
        allowed = p2p == "all" if p2p else joined or (same and first.p2p.value == "all")
        links.append(
            Link(
                a=a,
                b=b,
                p2p_read=allowed,
                p2p_write=allowed,
                nvlinks=lanes,
                nvlink_bandwidth=lanes * speed if lanes else NA,
            )
        )
    return tuple(links)


#: The active NVLink lanes of one GPU by the bus id of their other end; None: a switch, or unknown.
Lanes = Counter[str | None]


def shared_lanes(
    first: Lanes | None, second: Lanes | None, second_bus: str, *, over_switch: bool | NaType
) -> int | NaType:
    """How many lanes join two GPUs: direct ones, else through switches.

    Args:
        first: lanes of the one; None where nobody can read them.
        second: lanes of the other.
        second_bus: the other's bus id.
        over_switch: whether NVML says that the two reach each other over NVLink.
    """
    if first is None or second is None:
        return NA
    direct = first[second_bus]
    if direct or over_switch is False:
        return direct
    switched = min(first[None], second[None])
    return switched if over_switch is True else (NA if switched else 0)
