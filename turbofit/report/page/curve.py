"""A picture of lines or points over two axes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, NamedTuple

from turbofit.report.page.tag import Markup, join, tag

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Series", "curve"]

_WIDTH: Final = 960
_HEIGHT: Final = 300
_LEFT: Final = 80
_RIGHT: Final = 24
_TOP: Final = 34
_BOTTOM: Final = 48
_TICKS: Final = 5
_DASHES: Final = ("", "7 3", "2 3")


class Series(NamedTuple):
    """Points in the order in which a line joins them; ``joined`` False leaves them apart.

    ``names`` say what each point is; the reader sees one when the pointer rests on it.
    """

    title: str
    points: tuple[tuple[float, float], ...]
    joined: bool = True
    names: tuple[str, ...] = ()


def curve(series: Sequence[Series], *, x: str, y: str) -> Markup:
    """The series over axes that begin at zero; nothing where there is no point.

    Args:
        series: at most three are told apart.
        x: what the axis to the right is.
        y: what the axis upwards is.
    """
    points = [point for one in series for point in one.points]
    if not points:
        return Markup()
    right, top = _end(max(p[0] for p in points)), _end(max(p[1] for p in points))
    marks = [*_axis(right, top, x, y)]
    for one, dash in zip(series, _DASHES, strict=False):
        marks += _line(one, dash, right, top)
    marks += _legend(series)
    return tag(
        "svg", *marks, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", class_="timeline",
        aria_label=f"{y} over {x}; the table has every figure",
    )  # fmt: skip


def _axis(right: float, top: float, x: str, y: str) -> list[Markup]:
    found = []
    for number in range(_TICKS + 1):
        at_x, at_y = right * number / _TICKS, top * number / _TICKS
        height, place = _y(at_y, top), _x(at_x, right)
        ends = {"x1": _LEFT, "x2": _WIDTH - _RIGHT}
        found.append(tag("line", **ends, y1=height, y2=height, class_="grid"))
        found.append(tag("text", f"{at_y:,.4g}", x=_LEFT - 8, y=height, dy="4", class_="small end"))
        found.append(
            tag("text", f"{at_x:,.4g}", x=place, y=_HEIGHT - _BOTTOM + 18, class_="small mid")
        )
    found.append(tag("text", y, x=_LEFT, y=_TOP - 16, class_="small"))
    found.append(tag("text", x, x=_WIDTH - _RIGHT, y=_HEIGHT - 8, class_="small end"))
    return found


def _line(one: Series, dash: str, right: float, top: float) -> list[Markup]:
    found: list[Markup] = []
    places = [(_x(x, right), _y(y, top)) for x, y in one.points]
    if one.joined and len(places) > 1:
        path = "L".join(f"{x} {y}" for x, y in places)
        found.append(tag("path", d=f"M{path}", class_="held", stroke_dasharray=dash or None))
    for number, (x, y) in enumerate(places):
        name = one.names[number] if number < len(one.names) else one.title
        cls = "peak" if dash else "held"
        found.append(tag("circle", tag("title", name), cx=x, cy=y, r=4, class_=cls))
    return found


def _legend(series: Sequence[Series]) -> list[Markup]:
    if len(series) < 2:
        return []
    found, x = [], _LEFT + 240
    for one, dash in zip(series, _DASHES, strict=False):
        sample = tag("path", d=f"M{x} {_TOP - 20}h22", class_="held", stroke_dasharray=dash or None)
        found.append(join(sample, tag("text", one.title, x=x + 28, y=_TOP - 16, class_="small")))
        x += 60 + 7 * len(one.title)
    return found


def _end(most: float) -> float:
    """The end of an axis: the least of 1, 2, 2.5, 5 and 10 times a power of ten that has room."""
    if most <= 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(most))
    return next(unit * step for step in (1, 2, 2.5, 5, 10) if unit * step >= most * 0.999)


def _x(value: float, right: float) -> str:
    return f"{_LEFT + (_WIDTH - _LEFT - _RIGHT) * value / right:.1f}"


def _y(value: float, top: float) -> str:
    return f"{_HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * value / top:.1f}"
