"""A machine as a document: GPUs, the processes that hold memory, and the links between GPUs."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Final

from turbofit.core.messages import counted, indices
from turbofit.core.struct import NA
from turbofit.core.units import format_bytes, grouped, mib
from turbofit.report.painters.document import (
    MORE,
    ONLY_SHORT,
    Heading,
    Items,
    Table,
    known_facts,
    listed,
    remark,
    table,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from turbofit.core.machine import Link, Machine, Measured
    from turbofit.core.struct import NaType
    from turbofit.report.painters.document import Block

#: Holders in the short answer; the whole text lists all.
_HOLDERS: Final = 3
#: The most pairs of GPUs that are listed by name for one kind of link.
_PAIRS: Final = 16
#: The connection between two GPUs, by NVML's names.
_PATHS: Final = {
    "internal": "on one board", "single": "by one PCIe switch", "multiple": "by PCIe switches",
    "hostbridge": "by a host bridge", "node": "in a NUMA node", "system": "between NUMA nodes",
}  # fmt: skip


def machine_view(machine: Machine) -> list[Block]:
    """Return blocks on a machine's GPUs, warnings, holders of memory, links and host.

    The only table of the short answer is the table of GPUs.
    """
    host, measured = _host(machine).items(), ""
    if machine.measured is not None:
        wrong = sum(not pair.right for pair in machine.measured.pairs)
        measured = f"with torch {machine.measured.torch}: --full has it"
        measured += f"; wrong data between {counted(wrong, 'pair')}" if wrong else ""
    blocks: list[Block] = [
        Heading(f"{machine.name} ({machine.source})", short=True),
        _gpu_table(machine),
        known_facts(
            {
                "held by": _holders(machine),
                "links": ways_text(machine),
                "measured": measured,
                "host": "; ".join(
                    f"{name} {text}" for name, text in host if not text.startswith(NA)
                ),
            },
            **ONLY_SHORT,
        ),
    ]
    if machine.warnings:
        blocks += [Heading("Warnings"), Items(machine.warnings, tone="warn", short=True)]
    blocks.append(Heading("Who holds memory"))
    holders = tuple(
        (str(gpu.index), str(holder.pid), holder.name, _mib(holder.bytes))
        for gpu in machine.gpus
        for holder in gpu.holders
    )
    if holders:
        titles = ("GPU", "pid", "name", "MiB")
        blocks.append(table(titles, holders, right=("GPU", "pid", "MiB"), wrap=("name",)))
    else:
        blocks.append(remark("no visible process"))
    if len(machine.gpus) > 1:
        blocks += [Heading("Links"), Items(tuple(_links(machine)))]
    if machine.measured is not None:
        blocks += _measured(machine.measured)
    return [*blocks, Heading("Host"), known_facts(_host(machine)), MORE]


def _gpu_table(machine: Machine) -> Table:
    """Return the table of GPUs; equal GPUs share a row."""
    numbers = ("cc", "total", "reserved", "used", "free MiB")
    rows: dict[tuple[str, ...], list[int]] = {}
    for gpu in machine.gpus:
        hidden = machine.visible and gpu.index not in machine.visible
        capability = gpu.compute_capability
        generation = NA if gpu.pcie.generation == NA else f"{gpu.pcie.generation}.0"
        row = (
            f"{gpu.name}{' (MIG)' if gpu.mig else ''}{' (not visible)' if hidden else ''}",
            NA if capability == NA else f"{capability[0]}.{capability[1]}",
            *(_mib(value) for value in (gpu.total, gpu.reserved, gpu.used, gpu.free)),
            NA if generation == gpu.pcie.width == NA else f"{generation} x{gpu.pcie.width}",
        )
        rows.setdefault(row, []).append(gpu.index)
    return table(
        ("GPU", "name", *numbers, "PCIe"),
        ((indices(members), *row) for row, members in rows.items()),
        right=("GPU", *numbers),
        wrap=("name",),
        short=True,
    )


def _mib(value: int | NaType) -> str:
    return NA if value == NA else mib(value)


def _size(value: int | NaType) -> str:
    return NA if value == NA else format_bytes(value)


def _host(machine: Machine) -> dict[str, str]:
    host = machine.host
    return {
        "memory": f"{_size(host.ram_available)} available of {_size(host.ram_total)}",
        "/dev/shm": f"{_size(host.shm_available)} available",
        "CPUs": str(host.cpus),
        "driver": f"{machine.driver}, CUDA {machine.cuda}",
    }


def _holders(machine: Machine) -> str:
    """Return who holds the most memory; a holder of equal memory on several GPUs is named once."""
    gpus = grouped((holder, gpu.index) for gpu in machine.gpus for holder in gpu.holders)
    holders = sorted(gpus, key=lambda holder: -holder.bytes if isinstance(holder.bytes, int) else 0)
    texts = []
    for holder in holders[:_HOLDERS]:
        who = holder.name if holder.pid == NA else f"{holder.name} ({holder.pid})"
        of = "of" if len(gpus[holder]) == 1 else "of each of"
        texts.append(f"{who} {_size(holder.bytes)} {of} GPU {indices(gpus[holder])}")
    left = len(holders) - len(texts)
    return "; ".join([*texts, *([f"{left} more"] if left else [])]) or "no visible process"


def _measured(measured: Measured) -> list[Block]:
    """Return the measured speeds of cards, copies and all-reduces."""
    lines = [
        f"GPU {card.index}: memory {card.bandwidth / 1e9:,.0f} GB/s, 16-bit"
        f" {card.flops / 1e12:,.1f} TFLOP/s"
        for card in measured.cards
    ]
    for pair in measured.pairs:
        way = "peer access" if pair.peer else "through host"
        lines.append(
            f"copy {pair.source}-{pair.target}: {pair.bandwidth / 1e9:,.1f} GB/s, by host"
            f" {pair.host_bandwidth / 1e9:,.1f}, small {pair.latency * 1e6:,.1f} us:"
            f" {way if pair.right else 'wrong data'}"
        )
    for reduction in measured.reduces:
        wrong = "" if reduction.right else ", wrong sums"
        lines.append(
            f"all-reduce of {indices(reduction.gpus)}, {reduction.size:,} bytes:"
            f" {reduction.seconds * 1e6:,.0f} us{wrong}"
        )
    return [
        *listed(f"Measured with torch {measured.torch}", lines),
        *listed("Not measured", measured.left_out, "dim"),
    ]


def ways_text(machine: Machine) -> str:
    """Return in words how many pairs of GPUs each kind of link joins."""
    ways = _ways(machine, _way).items()
    return "; ".join(f"{counted(len(pairs), 'pair')}: {way}" for way, pairs in ways)


def _ways(machine: Machine, way: Callable[[Link], str]) -> dict[str, list[str]]:
    """Return the pairs of GPUs by kind of link, which ``way`` describes."""
    pairs = combinations([gpu.index for gpu in machine.gpus], 2)
    return grouped((way(machine.link(a, b)), f"{a}-{b}") for a, b in pairs)


def _way(link: Link) -> str:
    """Return in words how two GPUs reach each other."""
    if link.nvlinked:
        text = f"NVLink, {link.nvlinks} lanes"
        if isinstance(link.nvlink_bandwidth, int):
            text += f", {link.nvlink_bandwidth / 1e9:.0f} GB/s each way"
        return text
    if link.peers:
        return "PCIe, peer access"
    if NA in (link.p2p_read, link.p2p_write):
        return "peer access could not be read"
    if link.p2p_read or link.p2p_write:
        return "peer access one way alone"
    return "no peer access, through host memory"


def _links(machine: Machine) -> Iterator[str]:
    """Yield a line for each kind of link, with the pairs of GPUs."""

    def way_and_path(link: Link) -> str:
        path = None if link.nvlinked else _PATHS.get(link.ancestor)
        return f"{_way(link)} ({path})" if path else _way(link)

    for way, pairs in _ways(machine, way_and_path).items():
        named = f" ({', '.join(pairs)})" if len(pairs) <= _PAIRS else ""
        yield f"{counted(len(pairs), 'pair')}{named}: {way}"
