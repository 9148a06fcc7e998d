"""What the engine did on pretend GPUs: the end, and the cases."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.core.messages import indices, plural
from turbofit.core.units import format_bytes, mib
from turbofit.report.painters.document import Column, Heading, Items, Paragraph, Table

if TYPE_CHECKING:
    from turbofit.core.plan import Plan, Rehearsal
    from turbofit.report.painters.document import Block, Tone

__all__ = ["rehearsal_blocks"]

_MOST_CASES = 12
#: Characters of a bar.
_CELLS = 20


def rehearsal_blocks(plan: Plan, *, timeline: bool = True) -> list[Block]:
    """Blocks for a rehearsed plan, with its phases or without; none for one that was not."""
    rehearsal = plan.rehearsal
    if rehearsal is None:
        return []
    blocks: list[Block] = [Heading(text="Rehearsal")]
    for numbers in plan.unlike_groups():
        found = plan.of_group(numbers[0]).rehearsal
        if found is not None:
            members = plan.parallel.groups[numbers[0]]
            blocks += _end(found, f"GPU {indices(members)}: " if plan.by_group else "")
            blocks += _timeline(plan, members, found) if timeline else []
    if rehearsal.not_known:
        blocks.append(Paragraph(text="not seen by it, charged from the forecast:", tone="dim"))
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
    return [Paragraph(text=text, tone=tone), *_death(rehearsal), *_cases(rehearsal)]


def _death(rehearsal: Rehearsal) -> list[Block]:
    death = rehearsal.death
    if death is None:
        return []
    text = f"it ended in {death.phase}, at {death.where}"
    if death.asked is not None and death.left is not None:
        text += f": {format_bytes(death.asked)} asked, {format_bytes(death.left)} left"
    return [Paragraph(text=text, tone="bad")]


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
    more = len(rehearsal.cases) - len(rows)
    rest = f"{more} more {plural(more, 'case')}: --json has all of them"
    table = Table(columns=columns, rows=rows)
    return [table, Paragraph(text=rest, tone="dim")] if more else [table]


def _timeline(plan: Plan, members: tuple[int, ...], rehearsal: Rehearsal) -> list[Block]:
    """What the fullest card had in use, phase by phase."""
    if not rehearsal.timeline:
        return []
    places = range(len(rehearsal.timeline[0].peak))
    fullest = max(places, key=lambda i: max(one.peak[i] for one in rehearsal.timeline))
    card = members[fullest]
    ledger = next(gpu for gpu in plan.gpus if gpu.index == card)
    room = ledger.total - ledger.reserved
    rows = tuple(
        (
            f"{one.phase}{' (images)' if one.image else ''}",
            mib(one.peak[fullest]),
            mib(one.end[fullest]),
            _drawn(one.peak[fullest], one.end[fullest], room),
        )
        for one in rehearsal.timeline
    )
    columns = (
        Column(title="phase", wrap=True),
        Column(title="at most", right=True),
        Column(title="at its end", right=True),
        Column(title="of the card"),
    )
    title = f"In use on GPU {card}, phase by phase, in MiB"
    return [Heading(text=title), Table(columns=columns, rows=rows)]


def _drawn(peak: int, end: int, room: int) -> str:
    """A bar: what stays, and what a phase took above it."""
    most, stays = (min(_CELLS, round(_CELLS * size / room)) for size in (peak, end))
    return f"[{'#' * stays}{'+' * (most - stays)}{'.' * (_CELLS - most)}]"
