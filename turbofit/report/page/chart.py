"""The picture of a timeline: memory in use from phase to phase, and where images came in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from turbofit.core.units import GIB
from turbofit.report.page.bars import tick_step
from turbofit.report.page.tag import Markup, tag

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turbofit.core.plan import GpuLedger

__all__ = ["DASHES", "ChartSlot", "Lane", "chart"]

_WIDTH: Final = 960
_HEIGHT: Final = 300
_LEFT: Final = 80
_RIGHT: Final = 108
_TOP: Final = 30
_BOTTOM: Final = 30
#: Lines that can be told apart by their dashes; more GPUs that differ are in the list only.
DASHES: Final = ("", "7 3", "2 3")


class ChartSlot(NamedTuple):
    """A phase: its name, (peak, end) of each card, whether images ran, seconds where real."""

    name: str
    spans: tuple[tuple[int, int] | None, ...]
    image: bool
    seconds: float | None = None


class Lane(NamedTuple):
    """A line: the GPUs that share it, and where they stand in the slots."""

    title: str
    place: int


def chart(
    cards: Sequence[GpuLedger], lanes: Sequence[Lane], slots: Sequence[ChartSlot], died: bool
) -> Markup:
    """Lines over phases: what stays, and a stroke for what a phase took at most.

    Args:
        cards: the GPUs of all lines, for the room that they have.
        lanes: the lines, as many as `DASHES` tell apart.
        slots: the phases.
        died: whether the last of them ended it.
    """
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
    for lane, dash in zip(lanes, DASHES, strict=False):
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
    step = tick_step(room)
    parts = []
    for number in range(0, room // GIB + 1, step):
        y = f"{axis.y(number * GIB):.1f}"
        parts.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", f"{number} GiB", x=_LEFT - 6, y=y, dy="4", class_="small end"))
    return parts


def _bands(axis: _Axis, slots: Sequence[ChartSlot]) -> list[Markup]:
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
    """An icon of a picture: an image came in here."""
    frame = tag("rect", x=f"{middle - 9:.1f}", y=8, width=18, height=14, rx=2, class_="icon")
    x = middle - 9
    hills = f"M{x + 2:.1f} 19l5-6 4 4 2-2 3 4z"
    sun = tag("circle", cx=f"{middle + 4:.1f}", cy=12, r=1.6, class_="iconfill")
    return tag("g", tag("title", "images"), frame, tag("path", d=hills, class_="iconfill"), sun)


def _line(axis: _Axis, lane: Lane, slots: Sequence[ChartSlot], dash: str) -> list[Markup]:
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
    x, y = _WIDTH - _RIGHT + 6, height + 14 + 15 * DASHES.index(dash)
    sample = f"M{x} {y:.1f}h22"
    parts.append(tag("path", d=sample, class_="held", stroke_dasharray=dash or None))
    parts.append(tag("text", lane.title, x=x + 27, y=f"{y + 4:.1f}", class_="small lane"))
    return parts
