"""A machine in about ten lines: equal GPUs in one, links and holders in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from turbofit.core.messages import indices
from turbofit.core.struct import NA
from turbofit.core.units import format_bytes
from turbofit.report.painters.document import Block, FactList, Heading, Items, Table
from turbofit.report.views.machine.machine_view import gpu_table, host_facts
from turbofit.report.views.plan.interconnect import ways_text
from turbofit.report.views.summary_lines import MORE

if TYPE_CHECKING:
    from turbofit.core.machine import Holder, Machine, Measured

__all__ = ["machine_summary"]

#: Warnings and holders that are shown; the whole text has all.
_WARNINGS: Final = 3
_HOLDERS: Final = 3


def machine_summary(machine: Machine) -> list[Block]:
    """GPUs, who holds memory, how they reach each other, the host, and where there is more."""
    blocks: list[Block] = [
        Heading(text=f"{machine.name} ({machine.source})"),
        _folded(gpu_table(machine)),
        FactList(facts=_facts(machine)),
    ]
    left = len(machine.warnings) - _WARNINGS
    if machine.warnings:
        more = (f"and {left} more",) if left > 0 else ()
        blocks.append(Items(items=(*machine.warnings[:_WARNINGS], *more), tone="warn"))
    return [*blocks, MORE]


def _folded(table: Table) -> Table:
    """Rows that differ in their index alone as one."""
    found: dict[tuple[str, ...], list[int]] = {}
    for index, *facts in table.rows:
        found.setdefault(tuple(facts), []).append(int(index))
    rows = tuple((indices(numbers), *facts) for facts, numbers in found.items())
    return replace(table, rows=rows)


def _facts(machine: Machine) -> tuple[tuple[str, str], ...]:
    host = dict(host_facts(machine))
    known = [
        f"{name} {value}"
        for name, value in (("RAM", host["memory"]), ("CPUs", host["CPUs"]))
        if NA not in value.split()
    ]
    found = [("held by", _holders(machine)), ("links", ways_text(machine))]
    if machine.measured is not None:
        found.append(("measured", _measured(machine.measured)))
    if machine.driver != NA:
        known.append(f"driver {host['driver']}")
    found.append(("host", "; ".join(known)))
    return tuple((name, value) for name, value in found if value)


def _holders(machine: Machine) -> str:
    """Who has most of the memory that is used; who has the same on several GPUs, once."""
    held: dict[Holder, list[int]] = {}
    for gpu in machine.gpus:
        for holder in gpu.holders:
            held.setdefault(holder, []).append(gpu.index)
    found = sorted(
        held.items(), key=lambda pair: -pair[0].bytes if isinstance(pair[0].bytes, int) else 0
    )
    told = [_held(holder, gpus) for holder, gpus in found[:_HOLDERS]]
    left = len(found) - len(told)
    return "; ".join([*told, *([f"{left} more"] if left else [])]) or "nobody that can be seen"


def _held(holder: Holder, gpus: list[int]) -> str:
    who = holder.name if holder.pid == NA else f"{holder.name} ({holder.pid})"
    of = "of" if len(gpus) == 1 else "of each of"
    return f"{who} {_size(holder.bytes)} {of} GPU {indices(gpus)}"


def _size(value: int | str) -> str:
    return format_bytes(value) if isinstance(value, int) else value


def _measured(measured: Measured) -> str:
    """The slowest card; the slowest pair; whether data arrived."""
    found = []
    if measured.cards:
        bandwidth = min(one.bandwidth for one in measured.cards)
        flops = min(one.flops for one in measured.cards)
        found.append(f"a card at least {bandwidth / 1e9:,.0f} GB/s, {flops / 1e12:,.1f} TFLOP/s")
    if measured.pairs:
        slowest = min(one.bandwidth for one in measured.pairs)
        found.append(f"a pair at least {slowest / 1e9:,.1f} GB/s")
    wrong = sum(not one.right for one in measured.pairs)
    if wrong:
        found.append(f"{wrong} pairs copy wrong data")
    return "; ".join(found)
