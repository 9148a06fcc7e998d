"""Two plans side by side in about twenty lines: what they promise, and how full each GPU gets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.report.compare import compared_table, folded
from turbofit.report.painters.document import Block, Heading, Paragraph

if TYPE_CHECKING:
    from turbofit.report.compare import ComparedRow, ComparedSide, Comparison

__all__ = ["compare_summary"]

#: Rows that are shown; the whole text has all.
_ROWS: Final = 14
#: Rows of GPUs for which others give way; the promise has eight.
_GPU_ROWS: Final = 6
#: Sections of few rows that matter to everybody, in their order; a GPU's peak and headroom follow.
_SECTIONS: Final = ("What it holds", "Shape", "Limits", "Settings")
_OF_GPU: Final = {"= peak": "in use at most", "= headroom": "left then"}
#: Limits whose name alone says nothing.
_LABELS: Final = {"n": "answers a request"}


def compare_summary(found: Comparison) -> list[Block]:
    """Both verdicts, what differs most, and where there is more."""
    blocks: list[Block] = [Heading(text="A and B")]
    for name, side in (("A", found.a), ("B", found.b)):
        text = f"{name}: {_title(side)}: {'fits' if side.fits else side.verdict}"
        blocks.append(Paragraph(text=text, tone="good" if side.fits else "bad"))
    rows = _rows(found)
    if rows:
        blocks.append(compared_table(rows))
    left = sum(not row.same for _, told in folded(found.rows) for row in told) - len(rows)
    if not left:
        return blocks if rows else [*blocks, Paragraph(text="nothing differs", tone="dim")]
    more = f"{left} more figures differ; all of them: --full, --md or --json"
    return [*blocks, Paragraph(text=more, tone="dim")]


def _title(side: ComparedSide) -> str:
    return f"{side.model} on {side.machine} ({side.where})"


def _rows(found: Comparison) -> list[ComparedRow]:
    """What differs, the most important first; of bytes what each GPU needs at most."""
    sections = dict(folded(found.rows))
    plain = [
        row.on(_LABELS.get(row.what, row.what))
        for name in _SECTIONS
        for row in sections.get(name, ())
        if not row.same
    ]
    cards = [
        row.on(f"{name}: {_OF_GPU[row.what]}, MiB")
        for name, rows in sections.items()
        if name not in _SECTIONS
        for row in rows
        if row.what in _OF_GPU and not row.same
    ]
    cards = cards[: max(_GPU_ROWS, _ROWS - len(plain))]
    return [*plain[: _ROWS - len(cards)], *cards]
