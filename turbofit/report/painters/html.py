"""Writes a document as one HTML page. The page loads nothing and runs only its own script."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from string import Template
from typing import Any, Final

from turbofit.core.struct import to_builtins
from turbofit.core.units import format_bytes, grouped
from turbofit.report.painters.document import (
    Bar,
    BarPiece,
    Block,
    Code,
    FactList,
    Heading,
    Items,
    Paragraph,
    Table,
    Verdict,
)
from turbofit.report.painters.terminal import clean_lines

#: Characters that could end a script element or a line of JavaScript, with their escapes.
_IN_SCRIPT: Final = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}
_FOLDER: Final = Path(__file__).parent / "page"
#: A cell with more characters than this has a minimum width.
_LONG: Final = 24


class Markup(str):
    """Text that is HTML already and is not escaped again."""


def tag(name: str, *children: str, **attributes: Any) -> Markup:
    """Return an HTML element.

    The attribute ``data_x`` becomes ``data-x``; None and False are left out, True has no value.
    """
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
    """Encode a value as JSON for a script element."""
    text = json.dumps(to_builtins(value), ensure_ascii=False, separators=(",", ":"))
    return Markup(text.translate(_IN_SCRIPT))


def _escaped(text: str) -> str:
    return html.escape(clean_lines(text), quote=True)


def memory_bars(bars: Sequence[Bar]) -> Markup:
    """Draw one bar per GPU, all bars on one scale; equal GPUs share a label."""
    scale = max(max(bar.room, bar.need) for bar in bars)
    return join(*(_set(bar, scale) for bar in bars), _legend(bars))


def _set(bar: Bar, scale: int) -> Markup:
    return tag(
        "div",
        tag("p", bar.label, class_="words" if bar.fits else "words bad"),
        *(_row(bar, index, scale) for index in bar.gpus),
        tag("output", "Point at a part, or press Tab and the arrow keys.", class_="readout"),
        class_="gpuset",
    )


def _row(bar: Bar, index: int, scale: int) -> Markup:
    """Draw the bar of one GPU; only the first bar of a set of equal GPUs explains its parts."""
    end = ""
    if bar.need > bar.room:
        place = f"left:{100 * bar.room / scale:.3f}%"
        over = f"{place};width:{100 * (bar.need - bar.room) / scale:.3f}%"
        end = join(tag("span", class_="over", style=over), tag("span", class_="end", style=place))
    phases = [_phase(part, explained=index == bar.gpus[0]) for part in bar.parts]
    inside = tag("div", *phases, class_="stack", style=f"width:{100 * bar.need / scale:.3f}%")
    drawn = tag(
        "div", inside, end, class_="bar", tabindex="0", role="group",
        aria_label=f"GPU {index}: {bar.label}. Arrow keys go through its parts.",
    )  # fmt: skip
    return tag("div", tag("span", f"GPU {index}", class_="gpu"), drawn, class_="row")


def _phase(part: BarPiece, *, explained: bool) -> Markup:
    """Draw one kind of memory of a bar, with its terms and its label."""
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


def _legend(bars: Sequence[Bar]) -> Markup:
    """Return a legend for all bars: each kind of memory, its smallest and its largest size."""
    parts = [part for bar in bars for part in bar.parts]
    sizes = grouped(((part.kind, part.mark, part.name), part.bytes) for part in parts)
    overs = [bar.owner for bar in bars if bar.need > bar.room]
    entries = []
    for (kind, mark, name), amounts in sizes.items():
        swatch = tag("span", mark, class_=f"swatch k-{kind}", aria_hidden="true")
        least_and_most = dict.fromkeys(map(format_bytes, (min(amounts), max(amounts))))
        entries.append(tag("li", swatch, f" {name} ", tag("b", " to ".join(least_and_most))))
    if overs:
        swatch = tag("span", "!", class_="swatch overs", aria_hidden="true")
        entries.append(tag("li", swatch, f" more than the {' or '.join(dict.fromkeys(overs))} has"))
    return tag("ul", *entries, class_="legend")


def page(blocks: list[Block], document: Any) -> str:
    """Return a whole page: the first heading is its title, level-2 headings begin sections.

    The page contains ``document`` as JSON, its version of turbofit and its time.
    """
    made = getattr(document, "plan", document)  # what has the version and the time
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
    links = [tag("li", tag("a", heading, href=f"#{id_}")) for id_, heading, _ in named]
    drawn = [
        tag("section", tag("h2", heading, id=f"{id_}-title"), painted, id=id_,
            aria_labelledby=f"{id_}-title")
        for id_, heading, painted in named
    ]  # fmt: skip
    script = _read("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    return Template(_read("page.html")).substitute(
        title=tag("title", f"{title} - turbofit"),
        policy=policy,
        style=_read("page.css"),
        script=script,
        head=join(tag("h1", title), paint(head)),
        contents=tag("ul", *links),
        body=join(*drawn),
        made=tag("p", f"turbofit {made.turbofit_version}, {made.created}"),
        json=json_text(document),
    )


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def paint(blocks: list[Block] | tuple[Block, ...]) -> Markup:
    """Write blocks as HTML; adjacent bars share a scale and a legend."""
    parts = []
    for kind, run in groupby((block for block in blocks if block.page), key=type):
        if kind is Bar:
            parts.append(memory_bars([block for block in run if isinstance(block, Bar)]))
        else:
            parts += [_painted(block) for block in run]
    return join(*parts)


def _painted(block: Block) -> Markup:
    """Write one block as HTML."""
    if isinstance(block, Heading):
        return tag("h3", block.text)
    if isinstance(block, Verdict):
        return tag("p", block.text, class_=f"verdict {block.tone}")
    if isinstance(block, Paragraph):
        return tag("p", block.text, class_=block.tone)
    if isinstance(block, Items):
        return tag("ul", *(tag("li", item) for item in block.items), class_=block.tone)
    if isinstance(block, FactList):
        return tag("dl", *(join(tag("dt", n), tag("dd", v)) for n, v in block.facts))
    if isinstance(block, Table):
        return _table(block)
    assert isinstance(block, Code)
    # The button needs the script, so the script makes the button visible.
    label = f"Copy {block.name}"
    button = tag("button", "Copy", type="button", class_="copy", aria_label=label, hidden=True)
    code = tag("pre", tag("code", block.text), tabindex="0")
    return tag("div", code, button, class_="command")


def _table(block: Table) -> Markup:
    """Write a table that scrolls by itself, also by the keyboard, if the page is too narrow."""
    heads = [
        tag("th", column.title, scope="col", class_="n" if column.right else None)
        for column in block.columns
    ]
    body = [
        tag("tr", *_cells(block, row), class_="chosen" if i == block.chosen else None)
        for i, row in enumerate(block.rows)
    ]
    drawn = tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *body))
    label = "Table; scrolls where it is wider than the page"
    return tag("div", drawn, class_="scroll", tabindex="0", role="group", aria_label=label)


def _cells(block: Table, row: tuple[str, ...]) -> list[Markup]:
    """Write the cells of a row, with classes for numbers and for long texts."""
    cells = []
    for column, text in zip(block.columns, row, strict=True):
        kind = "n" if column.right else "t"
        if column.wrap:
            kind = "w" if len(text) > _LONG else ""
        cells.append(tag("td", text, class_=kind or None))
    return cells
