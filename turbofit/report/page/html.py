"""Paints a document as one HTML page that needs no network and runs nothing but its own script."""

from __future__ import annotations

import base64
import hashlib
import re
from itertools import groupby
from pathlib import Path
from string import Template
from typing import Any, Final

from turbofit.report.page.pictures import bars, curve, topology
from turbofit.report.page.tag import Markup, join, json_text, scrolled, tag
from turbofit.report.painters.document import (
    Bar,
    Block,
    Code,
    Curve,
    FactList,
    Fold,
    Heading,
    Items,
    Paragraph,
    Table,
    Tiles,
    Topology,
    Verdict,
)

_FOLDER: Final = Path(__file__).parent
#: What a cell must look like to sort as a number.
_NUMBER: Final = re.compile(r"[+-]?[\d,]+(\.\d+)?(e[+-]?\d+)?")
#: A cell of more characters keeps a width that can be read.
_LONG: Final = 24


def page(blocks: list[Block], document: Any, made: str) -> str:
    """A whole page: the first heading is its title, each further one of level 2 begins a section.

    Args:
        blocks: the document as a view made it.
        document: the data that the page carries.
        made: who made it, and when.
    """
    parts: list[list[Block]] = []
    for block in blocks:
        if block.page and isinstance(block, Heading) and (block.level == 2 or not parts):
            parts.append([block])
        elif block.page:
            parts[-1].append(block)
    (title, *head), *sections = parts
    assert isinstance(title, Heading)
    named = []
    for number, (heading, *content) in enumerate(sections, 1):
        assert isinstance(heading, Heading)
        if painted := paint(content):
            named.append((f"part-{number}", heading.text, painted))
    script = shared_script() + _read("page.js")
    return Template(_read("page.html")).substitute(
        title=tag("title", f"{title.text} - turbofit"),
        policy=policy(script),
        style=stylesheet(),
        script=script,
        head=join(tag("h1", title.text), paint(head)),
        contents=tag("ul", *(tag("li", tag("a", text, href=f"#{id_}")) for id_, text, _ in named)),
        body=join(
            *(
                tag("section", tag("h2", text, id=f"{id_}-title"), content, id=id_,
                    aria_labelledby=f"{id_}-title")
                for id_, text, content in named
            )
        ),
        made=tag("p", made),
        json=json_text(document),
    )  # fmt: skip


def stylesheet() -> str:
    """The style of all pages."""
    return _read("page.css")


def shared_script() -> str:
    """What the scripts of all pages begin with."""
    return _read("shared.js")


def policy(script: str, *more: str) -> str:
    """The policy of a page that loads nothing, and runs this script alone.

    Args:
        script: the script.
        more: what scripts may do beside that, in the words of a Content-Security-Policy.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    may_run = " ".join((f"'sha256-{digest}'", *more))
    return (
        f"default-src 'none'; script-src {may_run}; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def paint(blocks: list[Block] | tuple[Block, ...]) -> Markup:
    """Blocks as HTML; bars behind each other share a scale and a legend."""
    parts = []
    for kind, run in groupby((block for block in blocks if block.page), key=type):
        if kind is Bar:
            parts.append(bars([block for block in run if isinstance(block, Bar)]))
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
    if isinstance(block, Tiles):
        tiles = (
            tag("div", tag("span", label, class_="label"), tag("b", value), tag("small", text))
            for label, value, text in block.figures
        )
        return tag("div", *tiles, class_="tiles")
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
    if isinstance(block, Topology):
        return topology(block)
    assert isinstance(block, Curve)
    return curve(block)


def _verdict(block: Verdict) -> Markup:
    if not block.word:
        return tag("p", block.text, class_=f"verdict {'good' if block.good else 'bad'}")
    mark, tone = ("✔", "good") if block.good else ("✖", "bad")
    badge = tag("strong", f"{mark} {block.word}", class_=f"badge {tone}")
    return tag("p", badge, " ", block.text.removeprefix(f"{block.word}: "), class_="verdict")


def _table(block: Table) -> Markup:
    """A table in a box that scrolls by itself."""
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
    return scrolled(tag("table", *inner, class_="sortable" if block.sortable else None), "Table")


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
    """A bar of what is drawn in letters: ``#`` stays, ``+`` is taken beyond it for a time."""
    parts = [
        tag("i", class_=kind, style=f"width:{100 * text.count(mark) / (len(text) - 2):g}%")
        for mark, kind in (("#", "stays"), ("+", "beyond"))
    ]
    return tag("div", *parts, class_="drawn")
