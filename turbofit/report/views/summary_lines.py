"""Lines that all short texts end with: the first warning, and where there is more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.core.messages import plural
from turbofit.report.painters.document import Items, Paragraph

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turbofit.report.painters.document import Block

__all__ = ["MORE", "first_warning"]

#: How to see the whole text.
MORE: Final = Paragraph(text="more: --full, --md or --json", tone="dim")


def first_warning(warnings: Sequence[str]) -> list[Block]:
    """The most important warning, and how many more there are."""
    if not warnings:
        return []
    left = len(warnings) - 1
    more = f" (and {left} more {plural(left, 'warning')})" if left else ""
    return [Items(items=(f"{warnings[0]}{more}",), tone="warn")]
