"""A bar for each set of equal GPUs: its memory from empty to full."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.core.units import format_bytes
from turbofit.report.painters.document import Bar, BarPiece, Heading
from turbofit.report.views.plan.ledger_view import fold
from turbofit.report.views.plan.memory_breakdown import KINDS, stack, sums

if TYPE_CHECKING:
    from turbofit.core.plan import GpuLedger, Plan
    from turbofit.report.painters.document import Block

__all__ = ["memory_bar", "memory_blocks", "memory_label", "need_of"]


def memory_blocks(plan: Plan) -> list[Block]:
    """The bars, each with what it means in a sentence."""
    blocks: list[Block] = [Heading(text="Memory from empty to full")]
    for title, ledger in fold(plan.gpus):
        blocks.append(memory_bar(ledger, f"{title}: {memory_label(ledger)}"))
    return blocks


def memory_bar(ledger: GpuLedger, title: str) -> Bar:
    """One card's forecast from empty to full."""
    parts = tuple(
        BarPiece(mark=KINDS[kind][0], name=KINDS[kind][1], bytes=size)
        for kind, size in sums(stack(ledger)).items()
    )
    return Bar(title=title, room=ledger.total, parts=parts)


def need_of(ledger: GpuLedger) -> tuple[str, str]:
    """The most that is in use on a GPU, and when."""
    when = "while loading" if ledger.most > ledger.peak else "in the worst case"
    return format_bytes(ledger.most), when


def memory_label(ledger: GpuLedger) -> str:
    """What the bar means, in a sentence."""
    need, when = need_of(ledger)
    card = f"{ledger.name}, {format_bytes(ledger.total)}: {need} in use {when}"
    if ledger.headroom < 0:
        return f"{card}, {format_bytes(-ledger.headroom)} more than there are"
    left = f"{card}, {format_bytes(ledger.headroom)} left"
    if ledger.fits:
        return f"{left} ({format_bytes(ledger.margin)} of them are the margin)"
    return f"{left}, less than the margin of {format_bytes(ledger.margin)}"
