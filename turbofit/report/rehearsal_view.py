"""What the engine did on pretend GPUs: the end, the cases, and forecast against engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.core.units import format_bytes, mib
from turbofit.core.words import indices
from turbofit.report.document import Column, Heading, Items, Line, Table
from turbofit.report.ledger_view import fold

if TYPE_CHECKING:
    from turbofit.core.plan import GpuLedger, Plan, Rehearsal
    from turbofit.report.document import Block, Tone

__all__ = ["rehearsal_blocks"]

_MOST_CASES = 12


def rehearsal_blocks(plan: Plan) -> list[Block]:
    """Blocks for a rehearsed plan; none for one that was not."""
    rehearsal = plan.rehearsal
    if rehearsal is None:
        return []
    blocks: list[Block] = [Heading(text="Rehearsal")]
    for numbers in plan.unlike_groups():
        own = plan.of_group(numbers[0]).rehearsal
        if own is not None:
            gpus = indices(plan.parallel.groups[numbers[0]])
            blocks += _end(own, f"GPU {gpus}: " if plan.by_group else "")
    blocks += _compared(plan)
    if rehearsal.not_known:
        blocks.append(Line(text="not seen by it, charged from the forecast:", tone="dim"))
        blocks.append(Items(items=rehearsal.not_known, tone="dim"))
    return blocks


def _end(rehearsal: Rehearsal, where: str) -> list[Block]:
    """How one group's rehearsal ended, and its cases."""
    text = (
        f"{where}{rehearsal.outcome} in {rehearsal.seconds:.1f} s with LMDeploy"
        f" {rehearsal.engine_version} on pretend GPUs:"
        " memory is the engine's own, words and speed are not real"
    )
    tone: Tone = "good" if rehearsal.outcome == "served" else "bad"
    return [Line(text=text, tone=tone), *_death(rehearsal), *_cases(rehearsal)]


def _death(rehearsal: Rehearsal) -> list[Block]:
    death = rehearsal.death
    if death is None:
        return []
    text = f"it ended in {death.phase}, at {death.where}"
    if death.asked is not None and death.left is not None:
        text += f": {format_bytes(death.asked)} asked, {format_bytes(death.left)} left"
    return [Line(text=text, tone="bad")]


def _cases(rehearsal: Rehearsal) -> list[Block]:
    if not rehearsal.cases:
        return []
    rows = tuple(
        (
            case.name,
            mib(max(case.transient, default=0)),
            mib(max(case.peak, default=0)),
            mib(case.pinned),
        )
        for case in rehearsal.cases[:_MOST_CASES]
    )
    columns = (
        Column(title="case"),
        Column(title="pool MiB", right=True),
        Column(title="fullest GPU", right=True),
        Column(title="pinned host", right=True),
    )
    return [Table(columns=columns, rows=rows)]


def _compared(plan: Plan) -> list[Block]:
    blocks: list[Block] = []
    for title, ledger in fold(plan.gpus):
        rows = _rows(ledger)
        if rows:
            columns = (
                Column(title="term", wrap=True),
                Column(title="forecast", right=True),
                Column(title="engine", right=True),
                Column(title="engine - forecast", right=True),
            )
            blocks += [
                Heading(text=f"Forecast and engine on {title}, in MiB"),
                Table(columns=columns, rows=rows),
            ]
    return blocks


def _rows(ledger: GpuLedger) -> tuple[tuple[str, ...], ...]:
    rows = []
    for term in ledger.ledger:
        if term.rehearsed is not None:
            difference = f"{(term.rehearsed - term.bytes) / (1 << 20):+,.2f}"
            rows.append((term.term, mib(term.bytes), mib(term.rehearsed), difference))
    return tuple(rows)
