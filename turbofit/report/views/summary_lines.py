"""Lines that all short texts end with: the first warnings, and where there is more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.core.messages import BESIDE_COMMANDS, plural
from turbofit.report.painters.document import Items, Paragraph

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turbofit.report.painters.document import Block

__all__ = ["MORE", "first_warnings"]

#: How to see the whole text.
MORE: Final = Paragraph(text="more: --full, --md or --json", tone="dim")


def first_warnings(warnings: Sequence[str], assumed: Sequence[str] = ()) -> list[Block]:
    """What was assumed of what was asked, else the first warning; and how many more there are.

    Args:
        warnings: all of them. What stands beside commands is left out.
        assumed: those of them that say how the input was read.
    """
    kept = [text for text in warnings if not any(one in text for one in BESIDE_COMMANDS)]
    kept.sort(key=lambda text: text not in assumed)
    shown = kept[: max(1, sum(text in assumed for text in kept))]
    left = len(kept) - len(shown)
    if left:
        shown[-1] += f" (and {left} more {plural(left, 'warning')})"
    return [Items(items=tuple(shown), tone="warn")] if shown else []
