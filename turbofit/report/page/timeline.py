"""What a rehearsal or a run had in use from phase to phase, as a picture and as a list."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from turbofit.core.units import GIB, format_bytes, mib
from turbofit.core.words import indices
from turbofit.report.document import Column, Table
from turbofit.report.page.blocks import table
from turbofit.report.page.tag import Markup, join, tag

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turbofit.core.plan import GpuLedger, Plan
    from turbofit.report.run import Run

__all__ = ["timeline"]

_WIDTH: Final = 960
_HEIGHT: Final = 300
_LEFT: Final = 56
_RIGHT: Final = 108
_TOP: Final = 30
_BOTTOM: Final = 30
#: Lines that can be told apart by their dashes; more GPUs that differ are in the list only.
_DASHES: Final = ("", "7 3", "2 3")


class _Slot(NamedTuple):
    """A phase: its name, (peak, end) of each card, whether images ran, seconds where real."""

    name: str
    spans: tuple[tuple[int, int] | None, ...]
    image: bool
    seconds: float | None = None


class _Lane(NamedTuple):
    """A line: the GPUs that share it, and where they stand in the slots."""

    title: str
    place: int


def timeline(plan: Plan, run: Run | None) -> Markup:
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
    members = list(plan.parallel.groups[0])
    slots = [
        _Slot(one.phase, tuple(zip(one.peak, one.end, strict=True)), one.image)
        for one in rehearsal.timeline
    ]
    death = rehearsal.death
    words = None
    if death is not None:
        words = f"{rehearsal.outcome.replace('_', ' ')} in {death.phase}, at {death.where}"
        if death.asked is not None and death.left is not None:
            words += f": {format_bytes(death.asked)} asked, {format_bytes(death.left)} left"
    text = (
        "On pretend GPUs: memory is the engine's own, with what is charged from the forecast; time "
        "is not real, so each phase has the same width. The line is what stays, the stroke above "
        "it what a phase took at most."
    )
    return _shown(plan, members, slots, text, words)


def _measured(plan: Plan, run: Run | None) -> list[_Slot] | None:
    if run is None or run.last is None or not any(one.used for one in run.last.moments):
        return None
    keys = [str(gpu.index) for gpu in plan.gpus]
    moments = run.last.moments
    found = []
    for one, after in zip(moments, (*moments[1:], None), strict=True):
        spans = tuple((one.used[key], one.used[key]) if key in one.used else None for key in keys)
        image = "check" in one.phase and plan.limits.vision_unit is not None
        seconds = None if after is None else after.at - one.at
        found.append(_Slot(one.phase, spans, image, seconds))
    return found


def _shown(
    plan: Plan, members: list[int], slots: list[_Slot], text: str, death: str | None
) -> Markup:
    ledgers = {gpu.index: gpu for gpu in plan.gpus}
    lanes = _lanes(members, slots)
    parts = [tag("p", text, class_="dim")]
    if death:
        parts.append(tag("p", f"✖ {death}", class_="bad"))
    cards = [ledgers[index] for index in members]
    picture = _picture(cards, lanes[: len(_DASHES)], slots, death is not None)
    parts.append(tag("div", picture, class_="scroll", tabindex="0", role="group"))
    parts.append(_phases(slots))
    if len(lanes) > len(_DASHES):
        parts.append(tag("p", f"{len(lanes) - len(_DASHES)} more lines are in the list."))
    listed = tag("summary", "The same as a list")
    parts.append(tag("details", listed, _list(lanes, slots)))
    return join(*parts)


def _phases(slots: Sequence[_Slot]) -> Markup:
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


def _lanes(members: Sequence[int], slots: Sequence[_Slot]) -> list[_Lane]:
    """Cards whose figures are the same share a line."""
    found: dict[tuple[tuple[int, int] | None, ...], list[int]] = {}
    for place in range(len(members)):
        found.setdefault(tuple(slot.spans[place] for slot in slots), []).append(place)
    return [
        _Lane(f"GPU {indices(members[place] for place in places)}", places[0])
        for places in found.values()
    ]


def _list(lanes: Sequence[_Lane], slots: Sequence[_Slot]) -> Markup:
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


def _picture(
    cards: Sequence[GpuLedger], lanes: Sequence[_Lane], slots: Sequence[_Slot], died: bool
) -> Markup:
    room = max(card.total - card.reserved for card in cards)
    seen = [span[0] for slot in slots for span in slot.spans if span]
    top = max(room, *seen) * 1.06
    axis = _Axis(len(slots), top)
    least = min(cards, key=lambda card: card.total - card.reserved)
    limit, margin = least.total - least.reserved, least.margin
    parts: list[Markup] = [*_grid(axis, room), *_bands(axis, slots)]
    parts.append(
        tag(
            "rect", x=_LEFT, y=f"{axis.y(limit):.1f}", width=_WIDTH - _LEFT - _RIGHT,
            height=f"{max(1.5, axis.y(limit - margin) - axis.y(limit)):.1f}", class_="marginband",
        )
    )  # fmt: skip
    parts.append(
        tag("text", "margin", x=_WIDTH - _RIGHT + 6, y=f"{axis.y(limit) + 4:.1f}", class_="small")
    )
    for lane, dash in zip(lanes, _DASHES, strict=False):
        parts += _line(axis, lane, slots, dash)
    if died:
        x, y = axis.x(len(slots) - 1) + axis.slot * 0.5, axis.y(limit)
        parts.append(tag("text", "✖", x=f"{x:.1f}", y=f"{y + 7:.1f}", class_="death"))
    return tag(
        "svg", *parts, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", class_="timeline",
        aria_label="Memory in use from phase to phase; the list below has every figure",
    )  # fmt: skip


class _Axis:
    """Where phases and bytes lie in the picture."""

    def __init__(self, slots: int, top: float) -> None:
        self.slot = (_WIDTH - _LEFT - _RIGHT) / max(1, slots)
        self._top = top

    def x(self, number: int) -> float:
        """The left end of a phase."""
        return _LEFT + number * self.slot

    def y(self, size: float) -> float:
        """The height of a size."""
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * size / self._top


def _grid(axis: _Axis, room: int) -> list[Markup]:
    step = next((s for s in (1, 2, 4, 8, 16, 32) if room / (s * GIB) <= 7), 64)
    parts = []
    for number in range(0, room // GIB + 1, step):
        y = f"{axis.y(number * GIB):.1f}"
        parts.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", f"{number} GiB", x=_LEFT - 6, y=y, dy="4", class_="small end"))
    return parts


def _bands(axis: _Axis, slots: Sequence[_Slot]) -> list[Markup]:
    """The number of each phase, and a band where images ran."""
    parts = []
    for number, slot in enumerate(slots):
        x, middle = axis.x(number), axis.x(number) + axis.slot / 2
        if slot.image:
            height = _HEIGHT - _TOP - _BOTTOM
            parts.append(
                tag("rect", x=f"{x:.1f}", y=_TOP, width=f"{axis.slot:.1f}", height=height,
                    class_="imageband")
            )  # fmt: skip
            parts.append(_image(middle))
        parts.append(
            tag("text", tag("title", slot.name), str(number + 1), x=f"{middle:.1f}",
                y=_HEIGHT - 10, class_="small mid")
        )  # fmt: skip
    return parts


def _image(middle: float) -> Markup:
    """A small picture of a picture: an image came in here."""
    frame = tag("rect", x=f"{middle - 9:.1f}", y=8, width=18, height=14, rx=2, class_="icon")
    x = middle - 9
    hills = f"M{x + 2:.1f} 19l5-6 4 4 2-2 3 4z"
    sun = tag("circle", cx=f"{middle + 4:.1f}", cy=12, r=1.6, class_="iconfill")
    return tag("g", tag("title", "images"), frame, tag("path", d=hills, class_="iconfill"), sun)


def _line(axis: _Axis, lane: _Lane, slots: Sequence[_Slot], dash: str) -> list[Markup]:
    """A step for what stays, a stroke for what a phase took at most."""
    parts: list[Markup] = []
    path = ""
    height = axis.y(0)
    for number, slot in enumerate(slots):
        span = slot.spans[lane.place]
        if span is None:
            continue
        x, peak, height = axis.x(number), axis.y(span[0]), axis.y(span[1])
        path += f"{'L' if path else 'M'}{x:.1f} {height:.1f}L{x + axis.slot:.1f} {height:.1f}"
        if span[0] > span[1]:
            middle = x + axis.slot / 2
            ends = {"x1": f"{middle:.1f}", "x2": f"{middle:.1f}"}
            caps = {"x1": f"{middle - 6:.1f}", "x2": f"{middle + 6:.1f}"}
            top = f"{peak:.1f}"
            parts.append(tag("line", **ends, y1=f"{height:.1f}", y2=top, class_="peak"))
            parts.append(tag("line", **caps, y1=top, y2=top, class_="peak"))
    parts.append(tag("path", d=path, class_="held", stroke_dasharray=dash or None))
    x, y = _WIDTH - _RIGHT + 6, height + 14 + 15 * _DASHES.index(dash)
    sample = f"M{x} {y:.1f}h22"
    parts.append(tag("path", d=sample, class_="held", stroke_dasharray=dash or None))
    parts.append(tag("text", lane.title, x=x + 27, y=f"{y + 4:.1f}", class_="small lane"))
    return parts
