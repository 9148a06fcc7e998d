"""Blocks of several views: what was assumed, the first warning, remedies, where there is more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.core.messages import BESIDE_COMMANDS, HARMLESS, plural
from turbofit.machine.presets import match_preset
from turbofit.report.painters.document import (
    ONLY_SHORT,
    Heading,
    Items,
    listed,
    remark,
    table,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turbofit.core.machine import Machine
    from turbofit.core.plan import Remedy
    from turbofit.core.run_report import RunReport
    from turbofit.report.painters.document import Block

#: How to see the whole text.
MORE: Final = remark("more: --full, --md or --json", **ONLY_SHORT)


#: What is said of a run on pretend GPUs: what it shows is not measured.
PRETENDED: Final = "on pretend GPUs: memory is the engine's own, words and speed are not real"


def last_events(run: RunReport, most: int, level: int = 2) -> list[Block]:
    """What happened in a run at last."""
    said = (f"{one.at} {one.kind}: {one.text}" for one in run.events[-most:])
    return listed("Last events", said, level=level)


def assumed_of(machine: Machine) -> Sequence[str]:
    """How a machine's name was read, or what is not known of its cards: all figures rest on it."""
    gpus = [gpu for gpu in machine.gpus if gpu.index in machine.visible]
    named = machine.source == "preset"
    return machine.warnings if named or None in map(match_preset, gpus) else ()


def first_warnings(warnings: Sequence[str], assumed: Sequence[str] = ()) -> list[Block]:
    """What was assumed of what was asked, else the first warning; and how many more there are.

    Args:
        warnings: all of them. What stands beside commands, and what is harmless, is left out.
        assumed: those of them that say how the input was read.
    """
    hidden = (*BESIDE_COMMANDS, *HARMLESS)
    kept = [text for text in warnings if not any(one in text for one in hidden)]
    kept.sort(key=lambda text: text not in assumed)
    shown = [f"assumed: {text}" for text in kept if text in assumed] or kept[:1]
    left = len(kept) - len(shown)
    if left:
        shown[-1] += f" (and {left} more {plural(left, 'warning')})"
    return [Items(tuple(shown), tone="warn", **ONLY_SHORT)] if shown else []


def remedies_table(
    remedies: Sequence[Remedy],
    title: str = "",
    *,
    short: bool = False,
    whole: bool = True,
    page: bool = True,
) -> list[Block]:
    """Changes and their effects, under a title where there is one; nothing where there are none."""
    if not remedies:
        return []
    titles = ("change", "effect")
    rows = ((remedy.change, remedy.effect) for remedy in remedies)
    block = table(titles, rows, wrap=titles, short=short, whole=whole, page=page)
    return [Heading(title, short=short, whole=whole, page=page), block] if title else [block]
