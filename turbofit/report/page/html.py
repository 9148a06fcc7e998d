"""Paints a document as one HTML page that needs no network and runs nothing but its own script."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from itertools import groupby
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, Final

from turbofit.core.struct import to_builtins
from turbofit.core.units import GIB, format_bytes
from turbofit.report.painters.document import (
    Bar,
    BarPiece,
    Block,
    Code,
    FactList,
    Fold,
    Heading,
    Items,
    Paragraph,
    Table,
    Topology,
    TopologyCard,
    Verdict,
)
from turbofit.report.painters.terminal import clean_lines

if TYPE_CHECKING:
    from collections.abc import Sequence

#: What would end a script element, or a line of JavaScript.
_IN_SCRIPT: Final = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


class Markup(str):
    """Text that is markup: it is not escaped again."""

    __slots__ = ()


def tag(name: str, *children: str, **attributes: Any) -> Markup:
    """An element; ``data_x`` becomes ``data-x``; None and False are left out, True has no value."""
    pieces = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        plain = key.rstrip("_").replace("_", "-")
        pieces.append(plain if value is True else f'{plain}="{_escaped(str(value))}"')
    head = " ".join(pieces)
    return Markup(f"<{head}>{join(*children)}</{name}>")


def join(*children: str) -> Markup:
    return Markup("".join(c if isinstance(c, Markup) else _escaped(c) for c in children))


def json_text(value: Any) -> Markup:
    """A value as JSON that can stand in a script element."""
    text = json.dumps(to_builtins(value), ensure_ascii=False, separators=(",", ":"))
    return Markup(text.translate(_IN_SCRIPT))


def _escaped(text: str) -> str:
    return html.escape(clean_lines(text), quote=True)


_MOST_TICKS: Final = 8
#: A tick is left out where it is nearer to the end than this part of the scale.
_CLOSE: Final = 7


# Bars of memory


def memory_bars(bars: Sequence[Bar]) -> Markup:
    """A bar a GPU on one scale; equal GPUs share what is said of them."""
    scale = max(max(bar.room, bar.need) for bar in bars)
    return join(*(_set(bar, scale) for bar in bars), _legend(bars))


def _set(bar: Bar, scale: int) -> Markup:
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
    end = ""
    if bar.need > bar.room:
        share = f"left:{100 * bar.room / scale:.3f}%"
        over = f"{share};width:{100 * (bar.need - bar.room) / scale:.3f}%"
        end = join(tag("span", class_="over", style=over), tag("span", class_="end", style=share))
    phases = [_phase(part, explained=index == bar.gpus[0]) for part in bar.parts]
    inside = tag("div", *phases, class_="stack", style=f"width:{100 * bar.need / scale:.3f}%")
    drawn = tag(
        "div", inside, end, class_="bar", tabindex="0", role="group",
        aria_label=f"GPU {index}: {bar.label}. Arrow keys go through its parts.",
    )  # fmt: skip
    return tag("div", tag("span", f"GPU {index}", class_="gpu"), drawn, class_="row")


def _phase(part: BarPiece, *, explained: bool) -> Markup:
    terms = [
        tag("i", style=f"flex-grow:{size}", data_say=say if explained else None)
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
    if bar.need <= bar.room:
        return Markup()
    share = 100 * bar.room / scale
    text = f"the {bar.owner} ends here: {format_bytes(bar.room)}"
    place = f"right:{100 - share:.3f}%" if share > 50 else f"left:{share:.3f}%"
    label = tag("b", f"{text} ▾" if share > 50 else f"▾ {text}", style=place)
    return tag("div", tag("div", label, class_="ends"), class_="row axis")


def _legend(bars: Sequence[Bar]) -> Markup:
    """One for all bars: what each kind is, and how much; from the least to the most of them."""
    sizes: dict[tuple[str, str, str], list[int]] = {}
    for part in (part for bar in bars for part in bar.parts):
        sizes.setdefault((part.kind, part.mark, part.name), []).append(part.bytes)
    overs = [max(0, bar.need - bar.room) for bar in bars]
    entries = []
    for (kind, mark, name), amounts in sizes.items():
        swatch = tag("span", mark, class_=f"swatch k-{kind}", aria_hidden="true")
        entries.append(tag("li", swatch, f" {name} ", tag("b", _range(amounts))))
    if any(overs):
        swatch = tag("span", "!", class_="swatch overs", aria_hidden="true")
        owners = " or ".join(dict.fromkeys(bar.owner for bar in bars if bar.need > bar.room))
        entries.append(tag("li", swatch, f" more than the {owners} has ", tag("b", _range(overs))))
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


_FOLDER: Final = Path(__file__).parent
#: What a cell must look like to sort as a number.
_NUMBER: Final = re.compile(r"[+-]?[\d,]+(\.\d+)?(e[+-]?\d+)?")
#: A cell of more characters keeps a width that can be read.
_LONG: Final = 24


def page(blocks: list[Block], document: Any, footer: str) -> str:
    """A whole page: the first heading is its title, each further one of level 2 begins a section.

    The page carries ``document`` as JSON; ``footer`` says who made it, and when.
    """
    parts: list[tuple[str, list[Block]]] = []
    for block in blocks:
        if block.page and isinstance(block, Heading) and (block.level == 2 or not parts):
            parts.append((block.text, []))
        elif block.page:
            parts[-1][1].append(block)
    (title, head), *sections = parts
    named = [
        (f"part-{number}", heading, painted)
        for number, (heading, content) in enumerate(sections, 1)
        if (painted := paint(content))
    ]
    script = page_file("shared.js") + page_file("page.js")
    return Template(page_file("page.html")).substitute(
        title=tag("title", f"{title} - turbofit"),
        policy=policy(script),
        style=page_file("page.css"),
        script=script,
        head=join(tag("h1", title), paint(head)),
        contents=tag("ul", *(tag("li", tag("a", text, href=f"#{id_}")) for id_, text, _ in named)),
        body=join(
            *(
                tag("section", tag("h2", text, id=f"{id_}-title"), content, id=id_,
                    aria_labelledby=f"{id_}-title")
                for id_, text, content in named
            )
        ),
        made=tag("p", footer),
        json=json_text(document),
    )  # fmt: skip


def frame(blocks: list[Block], document: Any, footer: str) -> str:
    """The page in a notebook, which neither its script nor its styles reach."""
    title = next(block.text for block in blocks if isinstance(block, Heading))
    return tag(
        "iframe",
        srcdoc=page(blocks, document, footer),
        sandbox="allow-scripts",
        style="width:100%;height:640px;border:0",
        title=f"turbofit: {title}",
    )


def policy(script: str, *more: str) -> str:
    """The Content-Security-Policy of a page that loads nothing, and runs this script alone.

    ``more`` is what scripts may do beside that.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    may_run = " ".join((f"'sha256-{digest}'", *more))
    return (
        f"default-src 'none'; script-src {may_run}; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def page_file(name: str) -> str:
    """The text of a file beside this one; all pages have page.css, and begin with shared.js."""
    return (_FOLDER / name).read_text(encoding="utf-8")


def paint(blocks: list[Block] | tuple[Block, ...]) -> Markup:
    """Blocks as HTML; bars behind each other share a scale and a legend."""
    parts = []
    for kind, run in groupby((block for block in blocks if block.page), key=type):
        if kind is Bar:
            parts.append(memory_bars([block for block in run if isinstance(block, Bar)]))
        else:
            parts += [_one(block) for block in run]
    return join(*parts)


def _one(block: Block) -> Markup:
    if isinstance(block, Heading):
        return tag("h3", block.text)
    if isinstance(block, Verdict):
        return _verdict(block)
    if isinstance(block, Paragraph):
        return tag("p", block.text, class_=block.tone)
    if isinstance(block, Items):
        return tag("ul", *(tag("li", item) for item in block.items), class_=block.tone)
    if isinstance(block, FactList):
        return tag("dl", *(join(tag("dt", n), tag("dd", v)) for n, v in block.facts))
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Fold):
        return tag("details", tag("summary", block.title), paint(block.blocks))
    if isinstance(block, Code):
        # The script shows the button: without it nothing would happen.
        label = f"Copy {block.name}"
        button = tag("button", "Copy", type="button", class_="copy", aria_label=label, hidden=True)
        code = tag("pre", tag("code", block.text), tabindex="0")
        return tag("div", code, button, class_="command")
    assert isinstance(block, Topology)
    return topology(block)


def _verdict(block: Verdict) -> Markup:
    if not block.badge:
        return tag("p", block.text, class_=f"verdict {block.tone}")
    mark = "✔" if block.tone == "good" else "✖"
    badge = tag("strong", f"{mark} {block.badge}", class_=f"badge {block.tone}")
    return tag("p", badge, " ", block.text.removeprefix(f"{block.badge}: "), class_="verdict")


def _table(block: Table) -> Markup:
    heads = []
    for column in block.columns:
        button = tag("button", column.title, type="button")
        inside = button if block.sortable and column.title else column.title
        heads.append(tag("th", inside, scope="col", class_="n" if column.right else None))
    body = [
        tag("tr", *_cells(block, row), class_="chosen" if i == block.chosen else None)
        for i, row in enumerate(block.rows)
    ]
    foot = [tag("tr", *_cells(block, row)) for row in block.sums]
    inner = [tag("thead", tag("tr", *heads)), tag("tbody", *body)]
    inner += [tag("tfoot", *foot)] if foot else []
    drawn = tag("table", *inner, class_="sortable" if block.sortable else None)
    label = "Table; scrolls where it is wider than the page"
    return tag("div", drawn, class_="scroll", tabindex="0", role="group", aria_label=label)


def _cells(block: Table, row: tuple[str, ...]) -> list[Markup]:
    cells = []
    for column, text in zip(block.columns, row, strict=True):
        if column.drawn:
            cells.append(tag("td", _drawn(text)))
            continue
        cls = "n" if column.right else None if column.wrap else "t"
        if column.wrap and len(text) > _LONG:
            cls = "w"
        value = text.replace(",", "") if block.sortable and _NUMBER.fullmatch(text) else None
        cells.append(tag("td", text, class_=cls, data_v=value))
    return cells


def _drawn(text: str) -> Markup:
    """``#`` of a bar in letters stays, ``+`` is taken beyond it for a time."""
    parts = [
        tag("i", class_=kind, style=f"width:{100 * text.count(mark) / (len(text) - 2):g}%")
        for mark, kind in (("#", "stays"), ("+", "beyond"))
    ]
    return tag("div", *parts, class_="drawn")
