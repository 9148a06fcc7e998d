"""The GPUs of a machine, how they reach each other, and the groups that the plan made of them."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Final, NamedTuple

from turbofit.core.messages import plural
from turbofit.core.struct import NA
from turbofit.core.units import format_bytes
from turbofit.report.page.blocks import paint, scrolled
from turbofit.report.page.tag import Markup, join, tag
from turbofit.report.views.machine.machine_view import link_blocks
from turbofit.report.views.plan.interconnect import WAYS, way, ways

if TYPE_CHECKING:
    from turbofit.core.machine import Gpu, Link, Machine
    from turbofit.core.plan import Plan

__all__ = ["topology"]

_BOX: Final = 84  # four beside each other fit a phone
_TALL: Final = 54
_GAP: Final = 8
_BETWEEN: Final = 22
_WIDEST: Final = 1020
#: Among more GPUs only pairs with a special link are drawn.
_MANY: Final = 6
_PAD: Final = 10
#: A longer name is written smaller.
_ROOMY: Final = 11
_BRANDS: Final = ("NVIDIA GeForce ", "NVIDIA ", "Tesla ")


def topology(plan: Plan) -> Markup:
    """The picture, what its lines mean, and the matrix."""
    used = {index for group in plan.parallel.groups for index in group}
    groups = [*plan.parallel.groups]
    idle = tuple(gpu.index for gpu in plan.machine.gpus if gpu.index not in used)
    parts = [_picture(plan, groups, idle), _meanings(plan.machine)]
    if len(plan.machine.gpus) > 1:
        summary = tag("summary", "Every pair")
        parts.append(tag("details", summary, paint(link_blocks(plan.machine)[1:])))
    return join(*parts)


class _Room(NamedTuple):
    """A group in the picture: its GPUs, its words, whether the plan made it, and where it lies."""

    gpus: tuple[int, ...]
    title: str
    chosen: bool
    x: float
    row: int

    @property
    def width(self) -> int:
        """Pixels from edge to edge."""
        return _wide(self.gpus)


def _picture(plan: Plan, groups: list[tuple[int, ...]], idle: tuple[int, ...]) -> Markup:
    rooms = _rooms(groups, idle)
    rows = range(rooms[-1].row + 1)
    longest = max(sum(len(room.gpus) for room in rooms if room.row == row) for row in rows)
    pairs = combinations([gpu.index for gpu in plan.machine.gpus], 2)
    many = len(plan.machine.gpus) > _MANY
    drawn = any(not many or _drawn(plan.machine.link(a, b)) for a, b in pairs)
    arcs = _height(longest) if drawn else 4.0
    tall = arcs + _TALL + 3 * _PAD + 22
    frames, boxes, lines = [], [], []
    for row in rows:
        top = row * tall + arcs + _PAD
        places: dict[int, float] = {}
        for room in (one for one in rooms if one.row == row):
            frames.append(_frame(room, top))
            for i, index in enumerate(room.gpus):
                places[index] = room.x + _PAD + i * (_BOX + _GAP)
        boxes += [_box(plan.machine.gpu(index), at, top) for index, at in places.items()]
        lines += _lines(plan.machine, places, top)
    width, height = max(room.x + room.width for room in rooms) + _PAD, tall * len(rows)
    gpus, sets = len(plan.machine.gpus), len(groups)
    text = f"{gpus} {plural(gpus, 'GPU')} in {sets} {plural(sets, 'group')}"
    cls = "topology many" if many else "topology"
    svg = tag(
        "svg", *frames, *lines, *boxes, viewBox=f"0 0 {width:.0f} {height:.0f}", role="img",
        class_=cls, style=f"width:{width:.0f}px", aria_label=text,
    )  # fmt: skip
    return scrolled(svg, "Picture")


def _rooms(groups: list[tuple[int, ...]], idle: tuple[int, ...]) -> list[_Room]:
    """The groups beside each other, in as many rows as they need; idle GPUs last."""
    rooms: list[_Room] = []
    x, row = float(_PAD), 0
    for number, group in enumerate((*groups, idle)):
        if not group:
            continue
        if x + _wide(group) > _WIDEST and x > _PAD:
            x, row = float(_PAD), row + 1
        chosen = number < len(groups)
        title = f"group {number}" if chosen else "not used"
        if chosen and len(group) > 1:
            title += f": one engine, tp {len(group)}"
        rooms.append(_Room(group, title, chosen, x, row))
        x += _wide(group) + _BETWEEN
    return rooms


def _height(places: int) -> float:
    """Room above so many boxes for their arcs."""
    return 18 + 0.75 * _rise(places - 1)


def _rise(apart: int) -> int:
    """How far an arc's handles lie above its ends."""
    return 16 + 15 * min(apart, 8)


def _wide(group: tuple[int, ...]) -> int:
    return len(group) * _BOX + (len(group) - 1) * _GAP + 2 * _PAD


def _frame(room: _Room, top: float) -> Markup:
    cls = "group" if room.chosen else "group idle"
    edge = tag(
        "rect", x=f"{room.x:.0f}", y=f"{top - _PAD:.0f}", width=room.width,
        height=_TALL + 2 * _PAD + 20, rx=8, class_=cls,
    )  # fmt: skip
    middle = f"{room.x + room.width / 2:.0f}"
    return join(edge, tag("text", room.title, x=middle, y=f"{top + _TALL + 22:.0f}",
                          class_="small mid"))  # fmt: skip


def _box(gpu: Gpu, x: float, y: float) -> Markup:
    middle = f"{x + _BOX / 2:.0f}"
    size = NA if gpu.total == NA else format_bytes(int(gpu.total))
    name = _short(gpu.name)
    cls = "small" if len(name) <= _ROOMY else "tiny"
    return tag(
        "g",
        tag("title", f"{gpu.name}, {gpu.uuid}"),
        tag("rect", x=f"{x:.0f}", y=f"{y:.0f}", width=_BOX, height=_TALL, rx=5, class_="card"),
        tag("text", f"GPU {gpu.index}", x=middle, y=f"{y + 17:.0f}", class_="mid strong"),
        tag("text", name, x=middle, y=f"{y + 32:.0f}", class_=f"{cls} mid"),
        tag("text", size, x=middle, y=f"{y + 46:.0f}", class_="small mid"),
    )


def _short(name: str) -> str:
    for brand in _BRANDS:
        name = name.removeprefix(brand)
    return name if len(name) <= 14 else name[:13] + "…"


def _lines(machine: Machine, places: dict[int, float], top: float) -> list[Markup]:
    """An arc a pair: the weaker ways first, so that the stronger lie above them."""
    found = []
    order = sorted(places, key=lambda index: places[index])
    for (i, a), (j, b) in combinations(enumerate(order), 2):
        link = machine.link(a, b)
        if len(machine.gpus) > _MANY and not _drawn(link):
            continue
        arc = _arc(places[a], places[b], top, link, j - i)
        if j == i + 1 and len(machine.gpus) <= _MANY and link.nvlinked:
            arc = join(arc, _lanes(places[a], places[b], top, link))
        found.append((WAYS.index(way(link).kind), arc))
    return [markup for _, markup in sorted(found, key=lambda one: one[0])]


def _arc(a: float, b: float, top: float, link: Link, apart: int) -> Markup:
    found = way(link)
    left, right = a + _BOX / 2 + 4, b + _BOX / 2 - 4
    rise = _rise(apart)
    ends = f"{left:.0f} {top - rise:.0f} {right:.0f} {top - rise:.0f} {right:.0f} {top:.0f}"
    parts = [tag("title", f"GPU {link.a} - GPU {link.b}: {found.text}")]
    parts.append(tag("path", d=f"M{left:.0f} {top:.0f}C{ends}", class_=f"way {found.kind}"))
    return tag("g", *parts)


def _lanes(a: float, b: float, top: float, link: Link) -> Markup:
    """How many lanes, above the arc of two neighbours."""
    x, y = f"{(a + b + _BOX) / 2:.0f}", f"{top - _rise(1) * 0.75 - 5:.0f}"
    return tag("text", f"NV{link.nvlinks}", x=x, y=y, class_="small mid strong")


def _drawn(link: Link) -> bool:
    return way(link).kind in ("peer", "nvlink")


def _meanings(machine: Machine) -> Markup:
    """Each way that occurs, with a piece of its line and how many pairs have it."""
    entries = []
    for found, count in ways(machine).items():
        sample = tag("path", d="M1 6H33", class_=f"way {found.kind}")
        svg = tag("svg", sample, viewBox="0 0 34 12", width=34, height=12, aria_hidden="true")
        pairs = "pair" if count == 1 else "pairs"
        if found.kind in WAYS[:2] and len(machine.gpus) > _MANY:
            pairs += ", not drawn"
        entries.append(tag("li", svg, f" {found.text} ", tag("b", f"{count} {pairs}")))
    return tag("ul", *entries, class_="legend") if entries else Markup()
