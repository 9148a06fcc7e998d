"""A machine as a document: GPUs, who holds what, how they reach each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.core.struct import NA
from turbofit.core.units import format_bytes, mib
from turbofit.report.painters.document import Column, FactList, Heading, Items, Paragraph, Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turbofit.core.machine import Gpu, Link, Machine, Measured
    from turbofit.core.struct import NaType
    from turbofit.report.painters.document import Block

__all__ = ["gpu_table", "host_facts", "link_blocks", "machine_view"]


def machine_view(machine: Machine) -> list[Block]:
    """GPUs, holders, links, host, warnings."""
    blocks: list[Block] = [Heading(text=f"{machine.name} ({machine.source})"), gpu_table(machine)]
    if machine.warnings:
        blocks += [Heading(text="Warnings"), Items(items=machine.warnings, tone="warn")]
    holders = [
        (str(gpu.index), str(holder.pid), holder.name, _mib(holder.bytes))
        for gpu in machine.gpus
        for holder in gpu.holders
    ]
    blocks.append(Heading(text="Who holds memory"))
    if holders:
        columns = (
            Column(title="GPU", right=True),
            Column(title="pid", right=True),
            Column(title="name", wrap=True),
            Column(title="MiB", right=True),
        )
        blocks.append(Table(columns=columns, rows=tuple(holders)))
    else:
        blocks.append(Paragraph(text="nobody that can be seen", tone="dim"))
    if len(machine.gpus) > 1:
        blocks += link_blocks(machine)
    if machine.measured is not None:
        blocks += _measured(machine.measured)
    blocks += [Heading(text="Host"), FactList(facts=host_facts(machine))]
    return blocks


def _measured(measured: Measured) -> list[Block]:
    """What cards and links reached."""
    cards = [
        (str(one.index), f"{one.bandwidth / 1e9:,.0f}", f"{one.flops / 1e12:,.1f}")
        for one in measured.cards
    ]
    pairs = [
        (
            f"{one.source}-{one.target}",
            *(f"{value / 1e9:,.1f}" for value in (one.bandwidth, one.host_bandwidth)),
            f"{one.latency * 1e6:,.1f}",
            "wrong data" if not one.right else "peer access" if one.peer else "through host",
        )
        for one in measured.pairs
    ]
    reduces = [
        (
            "+".join(str(index) for index in one.gpus),
            f"{one.size:,}",
            f"{one.seconds * 1e6:,.0f}",
            "right" if one.right else "wrong",
        )
        for one in measured.reduces
    ]
    tables: tuple[tuple[tuple[str, ...], Sequence[tuple[str, ...]]], ...] = (
        (("GPU", "memory GB/s", "16-bit TFLOP/s"), cards),
        (("copy", "GB/s", "GB/s by host", "small us", "how"), pairs),
        (("all-reduce of", "bytes", "us", "sums"), reduces),
    )
    blocks: list[Block] = [Heading(text=f"Measured with torch {measured.torch}")]
    for titles, rows in tables:
        if rows:
            columns = tuple(Column(title=title, right=title != "how") for title in titles)
            blocks.append(Table(columns=columns, rows=tuple(rows)))
    if measured.left_out:
        blocks.append(Items(items=measured.left_out, tone="dim"))
    return blocks


def gpu_table(machine: Machine) -> Table:
    """A row a GPU."""
    columns = (
        Column(title="GPU", right=True),
        Column(title="name", wrap=True),
        Column(title="cc", right=True),
        Column(title="total", right=True),
        Column(title="reserved", right=True),
        Column(title="used", right=True),
        Column(title="free MiB", right=True),
        Column(title="PCIe"),
    )
    rows = []
    for gpu in machine.gpus:
        hidden = machine.visible and gpu.index not in machine.visible
        rows.append(
            (
                str(gpu.index),
                f"{gpu.name}{' (MIG)' if gpu.mig else ''}{' (not visible)' if hidden else ''}",
                _capability(gpu),
                *(_mib(value) for value in (gpu.total, gpu.reserved, gpu.used, gpu.free)),
                _pcie(gpu),
            )
        )
    return Table(columns=columns, rows=tuple(rows))


def _capability(gpu: Gpu) -> str:
    if gpu.compute_capability == NA:
        return NA
    return f"{gpu.compute_capability[0]}.{gpu.compute_capability[1]}"


def _pcie(gpu: Gpu) -> str:
    if gpu.pcie.generation == NA and gpu.pcie.width == NA:
        return NA
    generation = NA if gpu.pcie.generation == NA else f"{gpu.pcie.generation}.0"
    return f"{generation} x{gpu.pcie.width}"


def _mib(value: int | NaType) -> str:
    return NA if value == NA else mib(value)


def link_blocks(machine: Machine) -> list[Block]:
    """The matrix of `nvidia-smi topo`: above the diagonal the path, below it peer access."""
    order = [gpu.index for gpu in machine.gpus]
    rows = []
    for a in order:
        cells = []
        for b in order:
            if a == b:
                cells.append("X")
            elif a < b:
                cells.append(_path(machine.link(a, b)))
            else:
                cells.append(_peer(machine.link(a, b)))
        rows.append((f"GPU {a}", *cells))
    columns = (Column(title=""), *(Column(title=f"GPU {b}") for b in order))
    return [
        Heading(text="Links"),
        Table(columns=columns, rows=tuple(rows)),
        Paragraph(
            text="above the X: NV# = # NVLinks, PIX = one PCIe switch, PXB = several, PHB = host "
            "bridge, NODE = one NUMA node, SYS = between NUMA nodes; below it: peer access",
            tone="dim",
        ),
    ]


def _path(link: Link) -> str:
    if link.nvlinked:
        return f"NV{link.nvlinks}"
    names = {
        "internal": "INT", "single": "PIX", "multiple": "PXB", "hostbridge": "PHB",
        "node": "NODE", "system": "SYS",
    }  # fmt: skip
    return names.get(link.ancestor, link.ancestor)


def _peer(link: Link) -> str:
    if NA in (link.p2p_read, link.p2p_write):
        return NA
    if link.peers:
        return "yes"
    return "no" if not (link.p2p_read or link.p2p_write) else "one way"


def host_facts(machine: Machine) -> tuple[tuple[str, str], ...]:
    """Memory, CPUs and driver."""
    host = machine.host

    def size(value: int | NaType) -> str:
        return NA if value == NA else format_bytes(value)

    return (
        ("memory", f"{size(host.ram_available)} available of {size(host.ram_total)}"),
        ("/dev/shm", f"{size(host.shm_available)} available"),
        ("CPUs", str(host.cpus)),
        ("driver", f"{machine.driver}, CUDA {machine.cuda}"),
    )
