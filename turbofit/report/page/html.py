"""The conversion of a document to one HTML page without network that runs only its own script."""

from __future__ import annotations

import base64
import hashlib
from itertools import groupby
from pathlib import Path
from string import Template
from typing import Any, Final

from turbofit.report.page.elements import Markup, join, json_text, memory_bars, tag
from turbofit.report.painters.document import (
    Bar,
    Block,
    Code,
    FactList,
    Fold,
    Heading,
    Items,
    Paragraph,
    Table,
    Verdict,
)

_FOLDER: Final = Path(__file__).parent
#: A cell with more characters than this keeps a readable minimum width.
_LONG: Final = 24


def page(blocks: list[Block], document: Any) -> str:
    """Return a whole page: the first heading is its title, level-2 headings begin sections.

    The page carries ``document`` as JSON, and says which version made it, and when.
    """
    made = getattr(document, "plan", document)
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
    script = _read("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template(_read("page.html")).substitute(
        title=tag("title", f"{title} - turbofit"),
        policy=(
            f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
            "img-src data:; base-uri 'none'; form-action 'none'"
        ),
        style=_read("page.css"),
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
        made=tag("p", f"turbofit {made.turbofit_version}, {made.created}"),
        json=json_text(document),
    )  # fmt: skip


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def paint(blocks: list[Block] | tuple[Block, ...]) -> Markup:
    """Write blocks as HTML; adjacent bars share a scale and a legend."""
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
    assert isinstance(block, Code)
    # The script shows the button, because it does nothing without the script.
    label = f"Copy {block.name}"
    button = tag("button", "Copy", type="button", class_="copy", aria_label=label, hidden=True)
    code = tag("pre", tag("code", block.text), tabindex="0")
    return tag("div", code, button, class_="command")


def _verdict(block: Verdict) -> Markup:
    if not block.badge:
        return tag("p", block.text, class_=f"verdict {block.tone}")
    mark = "✔" if block.tone == "good" else "✖"
    badge = tag("strong", f"{mark} {block.badge}", class_=f"badge {block.tone}")
    return tag("p", badge, " ", block.text.removeprefix(f"{block.badge}: "), class_="verdict")


def _table(block: Table) -> Markup:
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
    cells = []
    for column, text in zip(block.columns, row, strict=True):
        cls = "n" if column.right else None if column.wrap else "t"
        if column.wrap and len(text) > _LONG:
            cls = "w"
        cells.append(tag("td", text, class_=cls))
    return cells
