"""What another request would give, as a table: for every view of a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.report.painters.document import Column, Heading, Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turbofit.core.plan import Remedy
    from turbofit.report.painters.document import Block

__all__ = ["remedies_table"]


def remedies_table(remedies: Sequence[Remedy], title: str = "") -> list[Block]:
    """Changes and their effects, under a title where there is one; nothing where there are none."""
    if not remedies:
        return []
    columns = (Column(title="change", wrap=True), Column(title="effect", wrap=True))
    rows = tuple((remedy.change, remedy.effect) for remedy in remedies)
    table = Table(columns=columns, rows=rows)
    return [Heading(text=title), table] if title else [table]
