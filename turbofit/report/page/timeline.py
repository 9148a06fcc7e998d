"""What a rehearsal or a run had in use from phase to phase, as a picture and as a list."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.core.messages import indices
from turbofit.core.units import format_bytes, mib
from turbofit.report.page.blocks import scrolled, table
from turbofit.report.page.chart import DASHES, ChartSlot, Lane, chart
from turbofit.report.page.tag import Markup, join, tag
from turbofit.report.painters.document import Column, Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turbofit.core.plan import Plan
    from turbofit.core.run_report import RunReport

__all__ = ["timeline"]


def timeline(plan: Plan, run: RunReport | None) -> Markup:
    """The run's where it was measured, else the rehearsal's; nothing where neither is there."""
    shown = _measured(plan, run)
    if shown is not None:
        text = (
            "Measured by NVML when each phase began, with what others hold. Each phase has the "
            "same width here; its seconds are in the list."
        )
        return _shown(plan, [gpu.index for gpu in plan.gpus], shown, text, None)
    rehearsal = plan.rehearsal
    if rehearsal is None or not rehearsal.timeline:
        return Markup()
    members = list(plan.parallel.groups[_group(plan)])
    slots = [
        ChartSlot(one.phase, tuple(zip(one.peak, one.end, strict=True)), one.image)
        for one in rehearsal.timeline
    ]
    death = rehearsal.death
    outcome = None
    if death is not None:
        outcome = f"{rehearsal.outcome.replace('_', ' ')} in {death.phase}, at {death.where}"
        if death.asked is not None and death.left is not None:
            outcome += f": {format_bytes(death.asked)} asked, {format_bytes(death.left)} left"
    text = (
        "On pretend GPUs: memory is the engine's own, with what is charged from the forecast; time "
        "is not real, so each phase has the same width. The line is what stays, the stroke above "
        "it what a phase took at most."
    )
    return _shown(plan, members, slots, text, outcome)


def _group(plan: Plan) -> int:
    """The group whose rehearsal the plan shows: where groups differ, the one that ended worst."""
    rehearsals = [one.rehearsal for one in plan.by_group]
    return rehearsals.index(plan.rehearsal) if plan.rehearsal in rehearsals else 0


def _measured(plan: Plan, run: RunReport | None) -> list[ChartSlot] | None:
    keys = [str(gpu.index) for gpu in plan.gpus]
    moments = run.last.moments if run is not None and run.last is not None else ()
    if not any(key in one.used for one in moments for key in keys):
        return None
    found = []
    for one, after in zip(moments, (*moments[1:], None), strict=True):
        spans = tuple((one.used[key], one.used[key]) if key in one.used else None for key in keys)
        image = "check" in one.phase and plan.limits.vision_unit is not None
        seconds = None if after is None else after.at - one.at
        found.append(ChartSlot(one.phase, spans, image, seconds))
    return found


def _shown(
    plan: Plan, members: list[int], slots: list[ChartSlot], text: str, death: str | None
) -> Markup:
    ledgers = {gpu.index: gpu for gpu in plan.gpus}
    lanes = _lanes(members, slots)
    parts = [tag("p", text, class_="dim")]
    if death:
        parts.append(tag("p", f"✖ {death}", class_="bad"))
    cards = [ledgers[index] for index in members]
    picture = chart(cards, lanes[: len(DASHES)], slots, death is not None)
    parts.append(scrolled(picture, "Picture"))
    parts.append(_phases(slots))
    if len(lanes) > len(DASHES):
        parts.append(tag("p", f"{len(lanes) - len(DASHES)} more lines are in the list."))
    listed = tag("summary", "The same as a list")
    parts.append(tag("details", listed, _list(lanes, slots)))
    return join(*parts)


def _phases(slots: Sequence[ChartSlot]) -> Markup:
    """What the numbers below the picture are."""
    items = [
        tag(
            "li", tag("b", str(number)), slot.name,
            "" if slot.seconds is None else f", {slot.seconds:,.1f} s",
            class_="pic" if slot.image else None,
        )
        for number, slot in enumerate(slots, 1)
    ]  # fmt: skip
    return tag("ol", *items, class_="phases")


def _lanes(members: Sequence[int], slots: Sequence[ChartSlot]) -> list[Lane]:
    """Cards whose figures are the same share a line."""
    found: dict[tuple[tuple[int, int] | None, ...], list[int]] = {}
    for place in range(len(members)):
        found.setdefault(tuple(slot.spans[place] for slot in slots), []).append(place)
    return [
        Lane(f"GPU {indices(members[place] for place in places)}", places[0])
        for places in found.values()
    ]


def _list(lanes: Sequence[Lane], slots: Sequence[ChartSlot]) -> Markup:
    timed = any(slot.seconds is not None for slot in slots)
    columns = [Column(title="#", right=True), Column(title="phase")]
    columns += [Column(title="seconds", right=True)] if timed else []
    for lane in lanes:
        columns += [Column(title=f"{lane.title} at most, MiB", right=True)]
        columns += [Column(title="at the end, MiB", right=True)]
    rows = []
    for number, slot in enumerate(slots, 1):
        row = [str(number), slot.name + (" (images)" if slot.image else "")]
        if timed:
            row.append("" if slot.seconds is None else f"{slot.seconds:,.1f}")
        for lane in lanes:
            span = slot.spans[lane.place]
            row += ["-", "-"] if span is None else [mib(span[0]), mib(span[1])]
        rows.append(tuple(row))
    return table(Table(columns=tuple(columns), rows=tuple(rows)))
