"""Shows the memory of each set of equal GPUs: a bar from empty to full, and the ledger."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from turbofit.core.memory_stack import (
    BEFORE_CACHE,
    KINDS,
    StackPiece,
    equal_ledgers,
    memory_label,
    stack,
    sums,
)
from turbofit.core.messages import indices
from turbofit.core.units import mib
from turbofit.report.painters.document import (
    Bar,
    BarPiece,
    Heading,
    Table,
    listed,
    remark,
    table,
)

if TYPE_CHECKING:
    from turbofit.core.plan import GpuLedger, Plan, Term
    from turbofit.report.painters.document import Block


def memory_blocks(plan: Plan) -> list[Block]:
    """Return a bar for each set of equal GPUs, then all terms of the ledgers.

    The only bar of the short answer is the bar of the GPUs with the least headroom.
    """
    blocks: list[Block] = [Heading("Memory from empty to full")]
    sets = equal_ledgers(plan.ledgers)
    least = min((ledger for _, ledger in sets), key=lambda ledger: ledger.headroom, default=None)
    for members, ledger in sets:
        label = memory_label(ledger)
        blocks.append(
            replace(
                memory_bar(ledger, f"GPU {indices(members)}: {label}"),
                gpus=tuple(members),
                label=f"{ledger.name}: {label}",
                short=ledger is least,
            )
        )
    return [*blocks, *_ledger_blocks(plan)]


def memory_bar(ledger: GpuLedger, title: str) -> Bar:
    """Return the bar of a GPU, with a part for each kind of memory."""
    pieces = stack(ledger)
    names = {kind: name for kind, (_, name) in KINDS.items()}
    if any(piece.name == BEFORE_CACHE for piece in pieces):
        names["before"] = "in use before the cache"
    parts = tuple(
        BarPiece(
            mark=KINDS[kind][0],
            name=names[kind],
            bytes=size,
            kind=kind,
            parts=tuple(
                (piece.bytes, _piece_text(ledger, piece)) for piece in pieces if piece.kind == kind
            ),
        )
        for kind, size in sums(pieces).items()
    )
    room, owner = ledger.total - ledger.beyond_budget, "card" if ledger.budget is None else "budget"
    return Bar(title=title, room=room, parts=parts, fits=ledger.fits, owner=owner)


def _piece_text(ledger: GpuLedger, piece: StackPiece) -> str:
    """Return a piece of memory in words: its term, size, share, basis and note."""
    name, term = KINDS[piece.kind][1], piece.term
    share = 100 * piece.bytes / ledger.total
    size = f"{mib(piece.bytes)} MiB, {share:.1f} % of the card"
    if term is None:
        return f"{name}: {size}"
    text = f"{piece.name} ({name}): {size}; {term.basis}" + (f": {term.note}" if term.note else "")
    if term.worst:
        text += f"; it needs {mib(term.bytes)} MiB in all, with the idle memory of the pool"
    if term.rehearsed is not None:
        text += f"; rehearsed: {mib(term.rehearsed)} MiB"
    return text


def _ledger_blocks(plan: Plan) -> list[Block]:
    """Return a table of all terms, and the notes of the estimates."""
    sets = [(f"GPU {indices(members)}", ledger) for members, ledger in equal_ledgers(plan.ledgers)]
    title = f"Ledger of {', '.join(title for title, _ in sets)}, in MiB"
    blocks: list[Block] = [Heading(title, level=3), _table(sets)]
    if any(term.phase == "transient" for ledger in plan.ledgers for term in ledger.terms):
        text = "transient: each needs its size alone, never together; * is the one that decides"
        blocks.append(remark(text))
    estimates = {
        term.term: term.note
        for ledger in plan.ledgers
        for term in ledger.terms
        if term.basis == "estimate" and term.note
    }
    notes = (f"{term}: {note}" for term, note in estimates.items())
    return [*blocks, *listed("Estimates, which enter at their upper end", notes, "dim", level=3)]


def _table(sets: list[tuple[str, GpuLedger]]) -> Table:
    """Return a table with a row for each term and a column for each set of equal GPUs."""
    terms: dict[tuple[str, str], Term] = {}
    for _, ledger in sets:
        for term in ledger.terms:
            terms.setdefault((term.phase, term.term), term)
    rows = []
    for key, term in terms.items():
        cells = (
            next((mib(t.bytes) for t in ledger.terms if (t.phase, t.term) == key), "-")
            for _, ledger in sets
        )
        name = f"{term.term} *" if term.worst else term.term
        rows.append((term.phase, name, *cells, term.basis, term.note))
    cards = [title for title, _ in sets]
    return table(
        ("phase", "term", *cards, "basis", "note"),
        (*rows, *_sums(sets)),
        right=cards,
        wrap=("term",),
        aside=("note",),
    )


def _sums(sets: list[tuple[str, GpuLedger]]) -> list[tuple[str, ...]]:
    """Return the rows of totals below the terms."""
    ledgers = [ledger for _, ledger in sets]
    lines = (
        ("total", "of the card", [it.total for it in ledgers]),
        ("reserved", "by the driver", [it.reserved for it in ledgers]),
        ("steady", "after warm-up, as nvidia-smi shows it", [it.steady for it in ledgers]),
        ("load peak", "while loading", [it.load_peak for it in ledgers]),
        ("peak", "in the worst case", [it.peak for it in ledgers]),
        ("headroom", "left at the higher peak", [it.headroom for it in ledgers]),
        ("margin", "wanted of the headroom", [it.margin for it in ledgers]),
    )
    return [("sum", name, *map(mib, values), "", note) for name, note, values in lines]
