"""How the GPUs of a machine reach each other, and how many pairs do so in each way."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Final, NamedTuple

from turbofit.core.struct import NA

if TYPE_CHECKING:
    from turbofit.core.machine import Link, Machine

__all__ = ["WAYS", "LinkKind", "way", "ways", "ways_text"]

#: The kinds of ways, the weakest first.
WAYS: Final = ("unread", "host", "peer", "nvlink")


class LinkKind(NamedTuple):
    """One of ``WAYS``, and what it is."""

    kind: str
    text: str


def way(link: Link) -> LinkKind:
    """How two GPUs reach each other."""
    if link.nvlinked:
        speed = link.nvlink_bandwidth
        text = f"NVLink, {link.nvlinks} lanes"
        if isinstance(speed, int):
            text += f", {speed / 1e9:.0f} GB/s each way"
        return LinkKind("nvlink", text)
    if link.peers:
        return LinkKind("peer", "PCIe, peer access")
    if NA in (link.p2p_read, link.p2p_write):
        return LinkKind("unread", "peer access could not be read")
    return LinkKind("host", "no peer access: through host memory")


def ways(machine: Machine) -> dict[LinkKind, int]:
    """How many pairs have each way."""
    counts: dict[LinkKind, int] = {}
    for a, b in combinations([gpu.index for gpu in machine.gpus], 2):
        found = way(machine.link(a, b))
        counts[found] = counts.get(found, 0) + 1
    return counts


def ways_text(machine: Machine) -> str:
    """All pairs in a sentence; empty for one GPU."""
    return "; ".join(
        f"{count} {'pair' if count == 1 else 'pairs'} {one.text}"
        for one, count in ways(machine).items()
    )
