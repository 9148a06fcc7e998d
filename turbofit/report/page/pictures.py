"""What a page draws: bars of memory, GPUs in their groups, curves."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, NamedTuple

from turbofit.core.units import GIB, format_bytes
from turbofit.report.page.tag import Markup, join, tag

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turbofit.report.painters.document import (
        Bar,
        BarPiece,
        Curve,
        Series,
        Topology,
        TopologyCard,
    )

#: Pixels of a curve, and what is left around its axes.
_WIDTH: Final = 960
_HEIGHT: Final = 300
_LEFT: Final = 80
_RIGHT: Final = 24
_ABOVE: Final = 34
_BELOW: Final = 48
#: Lines that can be told apart by their dashes; more are not drawn.
_DASHES: Final = ("", "7 3", "2 3")
_MOST_TICKS: Final = 8
#: A tick is left out where it is nearer to the end than this part of the scale.
_CLOSE: Final = 7


# Bars of memory


def bars(found: Sequence[Bar]) -> Markup:
    """A bar a GPU on one scale; equal GPUs share what is said of them."""
    scale = max(max(bar.room, sum(part.bytes for part in bar.parts)) for bar in found)
    return join(*(_set(bar, scale) for bar in found), _legend(found))


def _set(bar: Bar, scale: int) -> Markup:
    """The GPUs that share a bar."""
    holders = tag("ul", *(tag("li", text) for text in bar.holders), class_="dim")
    return tag(
        "div",
        tag("p", bar.label, class_="words" if bar.fits else "words bad"),
        _end(bar, scale),
        *(_row(bar, index, scale) for index in bar.gpus),
        _ticks(scale),
        tag("output", "Point at a part, or press Tab and the arrow keys.", class_="readout"),
        holders if bar.holders else "",
        class_="gpuset",
    )


def _row(bar: Bar, index: int, scale: int) -> Markup:
    """The bar of one GPU; only the first of a set explains its parts."""
    need = sum(part.bytes for part in bar.parts)
    end = ""
    if need > bar.room:
        share = f"left:{100 * bar.room / scale:.3f}%"
        over = f"{share};width:{100 * (need - bar.room) / scale:.3f}%"
        end = join(tag("span", class_="over", style=over), tag("span", class_="end", style=share))
    phases = [_phase(part, told=index == bar.gpus[0]) for part in bar.parts]
    inside = tag("div", *phases, class_="stack", style=f"width:{100 * need / scale:.3f}%")
    drawn = tag(
        "div", inside, end, class_="bar", tabindex="0", role="group",
        aria_label=f"GPU {index}: {bar.label}. Arrow keys go through its parts.",
    )  # fmt: skip
    return tag("div", tag("span", f"GPU {index}", class_="gpu"), drawn, class_="row")


def _phase(part: BarPiece, *, told: bool) -> Markup:
    terms = [
        tag("i", style=f"flex-grow:{size}", data_say=say if told else None)
        for size, say in part.parts
    ]
    label = join(
        tag("span", part.mark, class_="letter"),
        tag("span", f" {part.name}", class_="name"),
        tag("span", f" {format_bytes(part.bytes)}", class_="size"),
    )
    return tag(
        "div", *terms, tag("span", label, class_="key", aria_hidden="true"),
        class_=f"phase k-{part.kind}", style=f"flex-grow:{part.bytes}",
    )  # fmt: skip


def _end(bar: Bar, scale: int) -> Markup:
    """Where the card ends, above bars that go beyond it."""
    if sum(part.bytes for part in bar.parts) <= bar.room:
        return Markup()
    share = 100 * bar.room / scale
    text = f"the card ends here: {format_bytes(bar.room)}"
    place = f"right:{100 - share:.3f}%" if share > 50 else f"left:{share:.3f}%"
    label = tag("b", f"{text} ▾" if share > 50 else f"▾ {text}", style=place)
    return tag("div", tag("div", label, class_="ends"), class_="row axis")


def _legend(found: Sequence[Bar]) -> Markup:
    """One for all bars: what each kind is, and how much; from the least to the most of them."""
    sizes: dict[tuple[str, str, str], list[int]] = {}
    for part in (part for bar in found for part in bar.parts):
        sizes.setdefault((part.kind, part.mark, part.name), []).append(part.bytes)
    overs = [max(0, sum(part.bytes for part in bar.parts) - bar.room) for bar in found]
    entries = []
    for (kind, mark, name), each in sizes.items():
        swatch = tag("span", mark, class_=f"swatch k-{kind}", aria_hidden="true")
        entries.append(tag("li", swatch, f" {name} ", tag("b", _range(each))))
    if any(overs):
        swatch = tag("span", "!", class_="swatch overs", aria_hidden="true")
        entries.append(tag("li", swatch, " more than the card has ", tag("b", _range(overs))))
    return tag("ul", *entries, class_="legend")


def _range(sizes: list[int]) -> str:
    """A size, or the smallest and the largest of several."""
    return " to ".join(dict.fromkeys(format_bytes(size) for size in (min(sizes), max(sizes))))


def _ticks(scale: int) -> Markup:
    step = 1 << (scale // (GIB * _MOST_TICKS)).bit_length()  # a power of two, so that there are few
    whole = [n for n in range(0, scale // GIB + 1, step) if scale - n * GIB > scale / _CLOSE]
    marks = [tag("span", f"{n} GiB", style=f"left:{100 * n * GIB / scale:.3f}%") for n in whole]
    marks.append(tag("span", format_bytes(scale), style="left:100%"))
    return tag("div", tag("div", *marks, class_="ticks"), class_="row axis", aria_hidden="true")


# Curves


class _Axes(NamedTuple):
    """Where values lie in a curve: the largest value of either axis."""

    right: float
    top: float

    def x(self, value: float) -> float:
        """Pixels from the left."""
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * value / self.right

    def y(self, value: float) -> float:
        """Pixels from above."""
        return _HEIGHT - _BELOW - (_HEIGHT - _ABOVE - _BELOW) * value / self.top


def curve(block: Curve) -> Markup:
    """The series over axes that begin at zero; nothing where there is no point."""
    points = [point for one in block.series for point in one.points]
    if not points:
        return Markup()
    axes = _Axes(*(_axis_end(max(values)) for values in zip(*points, strict=True)))
    marks = []
    for number in range(6):
        x, y = axes.right * number / 5, axes.top * number / 5
        across, text = f"{axes.y(y):.1f}", f"{y:,.4g}"
        marks.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=across, y2=across, class_="grid"))
        marks.append(tag("text", text, x=_LEFT - 8, y=across, dy="4", class_="small end"))
        marks.append(
            tag("text", f"{x:,.4g}", x=f"{axes.x(x):.1f}", y=_HEIGHT - 30, class_="small mid")
        )
    marks.append(tag("text", block.y, x=_LEFT, y=18, class_="small"))
    marks.append(tag("text", block.x, x=_WIDTH - _RIGHT, y=_HEIGHT - 8, class_="small end"))
    legend = _LEFT + 240
    for one, dash in zip(block.series, _DASHES, strict=False):
        marks += _points(axes, one, dash)
        if len(block.series) > 1:
            sample = f"M{legend} 14h22"
            marks.append(tag("path", d=sample, class_="held", stroke_dasharray=dash or None))
            marks.append(tag("text", one.title, x=legend + 28, y=18, class_="small"))
            legend += 60 + 7 * len(one.title)
    return tag(
        "svg", *marks, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", class_="curve",
        aria_label=f"{block.y} over {block.x}; the table has every figure",
    )  # fmt: skip


def _points(axes: _Axes, one: Series, dash: str) -> list[Markup]:
    marks: list[Markup] = []
    places = [(f"{axes.x(x):.1f}", f"{axes.y(y):.1f}") for x, y in one.points]
    if one.joined and len(places) > 1:
        path = "L".join(f"{x} {y}" for x, y in places)
        marks.append(tag("path", d=f"M{path}", class_="held", stroke_dasharray=dash or None))
    for number, (x, y) in enumerate(places):
        name = one.names[number] if number < len(one.names) else one.title
        cls = "peak" if dash else "held"
        marks.append(tag("circle", tag("title", name), cx=x, cy=y, r=4, class_=cls))
    return marks


def _axis_end(most: float) -> float:
    """The least of 1, 2, 2.5, 5 and 10 times a power of ten that has room."""
    if most <= 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(most))
    return next(unit * step for step in (1, 2, 2.5, 5, 10) if unit * step >= most * 0.999)


# GPUs and their links


def topology(block: Topology) -> Markup:
    """The groups as frames around their GPUs, and which pairs reach each other in which way."""
    cards = {card.index: card for card in block.cards}
    idle = cards.keys() - {index for group in block.groups for index in group}
    frames = []
    for number, group in enumerate(block.groups):
        engine = f": one engine, tp {len(group)}" if len(group) > 1 else ""
        frames.append(_frame(f"group {number}{engine}", [cards[index] for index in group]))
    if idle:
        frames.append(_frame("not used", [cards[index] for index in sorted(idle)], "group idle"))
    ways = tag("ul", *(tag("li", text) for text in block.ways), class_="dim")
    return join(tag("div", *frames, class_="topology"), ways)


def _frame(title: str, cards: Sequence[TopologyCard], kind: str = "group") -> Markup:
    boxes = [
        tag(
            "div", tag("b", f"GPU {card.index}"), tag("span", card.name), tag("span", card.size),
            class_="card", title=card.uuid,
        )
        for card in cards
    ]  # fmt: skip
    return tag("fieldset", tag("legend", title), *boxes, class_=kind)
