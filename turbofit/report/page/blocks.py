"""Paints the blocks of a document as HTML."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from turbofit.report.page.tag import Markup, join, tag
from turbofit.report.painters.bar import legend
from turbofit.report.painters.document import Bar, Code, FactList, Heading, Items, Paragraph, Table

if TYPE_CHECKING:
    from collections.abc import Iterable

    from turbofit.report.painters.document import Block

__all__ = ["command", "paint", "scrolled", "table"]

#: What a cell must look like to sort as a number.
_NUMBER: Final = re.compile(r"[+-]?[\d,]+(\.\d+)?(e[+-]?\d+)?")

#: Columns of a table that fit on a phone.
_MOST_COLUMNS: Final = 4

#: A cell of more characters keeps a width that can be read.
_LONG: Final = 24


def paint(blocks: Iterable[Block]) -> Markup:
    """The blocks, headings at the third level."""
    return join(*(_one(block) for block in blocks))


def table(block: Table, *, sortable: bool = False, chosen: int | None = None) -> Markup:
    """A table in a box that scrolls by itself.

    Args:
        block: the table.
        sortable: whether its headings are buttons.
        chosen: a row to set off.
    """
    heads = []
    for column in block.columns:
        cls = "n" if column.right else None
        title = column.title
        inside = tag("button", title, type="button") if sortable and title else title
        heads.append(tag("th", inside, scope="col", class_=cls))
    body = [
        tag("tr", *_cells(block, row, sortable), class_="chosen" if i == chosen else None)
        for i, row in enumerate(block.rows)
    ]
    foot = [tag("tr", *_cells(block, row, False)) for row in block.sums]
    inner = [tag("thead", tag("tr", *heads)), tag("tbody", *body)]
    inner += [tag("tfoot", *foot)] if foot else []
    names = [name for name, so in (("sortable", sortable), ("stacks", _stacks(block))) if so]
    cls = " ".join(names) or None
    return scrolled(tag("table", *inner, class_=cls), "Table")


def command(text: str, name: str) -> Markup:
    """A command with a button that copies it."""
    label = f"Copy {name}"  # the script shows the button: without it nothing would happen
    button = tag("button", "Copy", type="button", class_="copy", aria_label=label, hidden=True)
    return tag("div", tag("pre", tag("code", text), tabindex="0"), button, class_="command")


def scrolled(content: Markup, what: str) -> Markup:
    """A box for what may be wider than the page; by keyboard too."""
    label = f"{what}; scrolls where it is wider than the page"
    return tag("div", content, class_="scroll", tabindex="0", role="group", aria_label=label)


def _one(block: Block) -> Markup:
    if isinstance(block, Heading):
        return tag("h3", block.text)
    if isinstance(block, Paragraph):
        return tag("p", block.text, class_=block.tone)
    if isinstance(block, Items):
        return tag("ul", *(tag("li", item) for item in block.items), class_=block.tone)
    if isinstance(block, FactList):
        rows = [join(tag("dt", name), tag("dd", value)) for name, value in block.facts]
        return tag("dl", *rows)
    if isinstance(block, Table):
        return table(block)
    if isinstance(block, Bar):
        return tag("p", f"{block.title}: {', '.join(legend(block))}")
    assert isinstance(block, Code)
    return command(block.text, "this command")


def _stacks(block: Table) -> bool:
    """Whether its rows stand as lists on a phone: more columns than fit there."""
    return len(block.columns) > _MOST_COLUMNS


def _cells(block: Table, row: tuple[str, ...], sortable: bool) -> list[Markup]:
    cells = []
    for column, text in zip(block.columns, row, strict=True):
        cls = "n" if column.right else "w" if column.wrap and len(text) > _LONG else None
        value = text.replace(",", "") if sortable and _NUMBER.fullmatch(text) else None
        label = column.title if _stacks(block) else None
        cells.append(tag("td", text, class_=cls, data_v=value, data_label=label))
    return cells
