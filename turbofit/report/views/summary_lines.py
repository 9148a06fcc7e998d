"""Lines that all short texts end with: what was assumed, the first warning, where there is more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.core.messages import plural
from turbofit.machine.presets import match_preset
from turbofit.report.painters.document import Items, Paragraph

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turbofit.core.machine import Machine
    from turbofit.report.painters.document import Block

__all__ = ["MORE", "first_warning"]

#: How to see the whole text.
MORE: Final = Paragraph(text="more: --full, --md or --json", tone="dim")


def first_warning(warnings: Sequence[str], machine: Machine | None = None) -> list[Block]:
    """The most important warning, and how many more there are; before it what a machine is.

    Args:
        warnings: those of the plan, among them the machine's.
        machine: what the plan is for; where it has cards of which not all is known, or parts of
            cards, all figures rest on what was assumed of them.
    """
    gpus = [machine.gpu(index) for index in machine.visible] if machine else []
    assumed = machine.warnings if machine and None in map(match_preset, gpus) else ()
    items = [f"assumed: {text}" for text in assumed]
    rest = [text for text in warnings if text not in assumed]
    if rest:
        left = len(rest) - 1
        more = f" (and {left} more {plural(left, 'warning')})" if left else ""
        items.append(f"{rest[0]}{more}")
    return [Items(items=tuple(items), tone="warn")] if items else []
