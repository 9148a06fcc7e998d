"""What the engine did on pretend GPUs: the end, and the cases."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.core.units import format_bytes, mib
from turbofit.report.document import Column, Heading, Items, Line, Table

if TYPE_CHECKING:
    from turbofit.core.plan import Plan, Rehearsal
    from turbofit.report.document import Block, Tone

__all__ = ["rehearsal_blocks"]

_MOST_CASES = 12


def rehearsal_blocks(plan: Plan) -> list[Block]:
    """Blocks for a rehearsed plan; none for one that was not."""
    rehearsal = plan.rehearsal
    if rehearsal is None:
        return []
    text = (
        f"{rehearsal.outcome} in {rehearsal.seconds:.1f} s with LMDeploy {rehearsal.engine_version}"
        " on pretend GPUs: memory is the engine's own, words and speed are not real"
    )
    tone: Tone = "good" if rehearsal.outcome == "served" else "bad"
    blocks: list[Block] = [Heading(text="Rehearsal"), Line(text=text, tone=tone)]
    blocks += _death(rehearsal)
    blocks += _cases(rehearsal)
    if rehearsal.not_known:
        blocks.append(Line(text="not seen by it, charged from the forecast:", tone="dim"))
        blocks.append(Items(items=rehearsal.not_known, tone="dim"))
    return blocks


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
