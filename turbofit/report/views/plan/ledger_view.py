"""The ledgers of a plan as tables: a row a term, a column for each set of equal GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.core.messages import indices
from turbofit.core.units import mib
from turbofit.report.painters.document import Column, Heading, Items, Paragraph, Table

if TYPE_CHECKING:
    from turbofit.core.plan import GpuLedger, Plan, Term
    from turbofit.report.painters.document import Block

__all__ = ["fold", "fold_indices", "fullest", "ledger_blocks"]

#: Sets of GPUs beside each other; more start a new table, so that 80 columns hold it.
_ABREAST: Final = 3


def fold(ledgers: tuple[GpuLedger, ...]) -> list[tuple[str, GpuLedger]]:
    """Equal GPUs together, as ``("GPU 0-3", ledger of the first)``, in order of first index."""
    return [(f"GPU {indices(members)}", first) for members, first in fold_indices(ledgers)]


def fullest(ledgers: tuple[GpuLedger, ...]) -> tuple[str, GpuLedger]:
    """The set of equal GPUs that has the least left."""
    return min(fold(ledgers), key=lambda one: one[1].headroom)


def fold_indices(ledgers: tuple[GpuLedger, ...]) -> list[tuple[list[int], GpuLedger]]:
    """As `fold`, with the indices of each set."""
    sets: list[tuple[list[int], GpuLedger]] = []
    for ledger in ledgers:
        for members, first in sets:
            if _same(ledger, first):
                members.append(ledger.index)
                break
        else:
            sets.append(([ledger.index], ledger))
    return sets


def ledger_blocks(plan: Plan) -> list[Block]:
    """The tables of all GPUs in MiB, and how their sums are to be read."""
    blocks: list[Block] = []
    sets = fold(plan.gpus)
    for start in range(0, len(sets), _ABREAST):
        part = sets[start : start + _ABREAST]
        blocks += [
            Heading(text=f"Ledger of {', '.join(title for title, _ in part)}, in MiB"),
            _table(part),
        ]
    if any(term.phase == "transient" for ledger in plan.gpus for term in ledger.ledger):
        text = "transient: each needs its size alone, never together; * is the one that decides"
        blocks.append(Paragraph(text=text, tone="dim"))
    estimates = {
        term.term: term.note
        for ledger in plan.gpus
        for term in ledger.ledger
        if term.basis == "estimate" and term.note
    }
    if estimates:
        blocks.append(Paragraph(text="estimates, which enter at their upper end:", tone="dim"))
        items = tuple(f"{term}: {note}" for term, note in estimates.items())
        blocks.append(Items(items=items, tone="dim"))
    return blocks


def _same(a: GpuLedger, b: GpuLedger) -> bool:
    """Whether two ledgers say the same of two cards of one kind."""
    return (
        a.name == b.name
        and (a.total, a.reserved, a.used, a.free) == (b.total, b.reserved, b.used, b.free)
        and (a.steady, a.load_peak, a.peak, a.margin) == (b.steady, b.load_peak, b.peak, b.margin)
        and [(t.term, t.bytes) for t in a.ledger] == [(t.term, t.bytes) for t in b.ledger]
    )


def _table(sets: list[tuple[str, GpuLedger]]) -> Table:
    terms: dict[tuple[str, str], Term] = {}
    for _, ledger in sets:
        for term in ledger.ledger:
            terms.setdefault((term.phase, term.term), term)
    rows = []
    for key, term in terms.items():
        cells = []
        for _, ledger in sets:
            found = next((t for t in ledger.ledger if (t.phase, t.term) == key), None)
            cells.append("-" if found is None else mib(found.bytes))
        name = f"{term.term} *" if term.worst else term.term
        rows.append((term.phase, name, *cells, term.basis, term.note))
    columns = (
        Column(title="phase"),
        Column(title="term", wrap=True),
        *(Column(title=title, right=True) for title, _ in sets),
        Column(title="basis"),
        Column(title="note", aside=True),
    )
    return Table(columns=columns, rows=tuple(rows), sums=tuple(_sums(sets)))


def _sums(sets: list[tuple[str, GpuLedger]]) -> list[tuple[str, ...]]:
    lines = (
        ("total", "of the card", [g.total for _, g in sets]),
        ("reserved", "by the driver", [g.reserved for _, g in sets]),
        ("steady", "after warm-up, as nvidia-smi shows it", [g.steady for _, g in sets]),
        ("load peak", "while loading", [g.load_peak for _, g in sets]),
        ("peak", "in the worst case", [g.peak for _, g in sets]),
        ("headroom", "left at the higher peak", [g.headroom for _, g in sets]),
        ("margin", "wanted of the headroom", [g.margin for _, g in sets]),
    )
    return [("sum", name, *map(mib, values), "", note) for name, note, values in lines]
