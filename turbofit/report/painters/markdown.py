"""The conversion of a document to GitHub-flavoured Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from turbofit.report.painters.document import (
    Bar,
    Block,
    Code,
    FactList,
    Heading,
    Items,
    Paragraph,
    Table,
    text_blocks,
)
from turbofit.report.painters.terminal import cells, clean, clean_lines, legend

#: Letters of a bar, as many as GitHub shows in a line.
_BAR: Final = 76
_HEADING: Final = "#"
_SPECIAL: Final = {ord(c): f"\\{c}" for c in "\\`*[]<>|#~"}


def paint(blocks: Iterable[Block]) -> str:
    """Write the blocks as Markdown, separated by empty lines."""
    parts: list[str] = []
    for block in text_blocks(blocks):
        if isinstance(block, Heading):
            level = block.level if parts else 1
            parts.append(f"{_HEADING * level} {_text(block.text)}")
        elif isinstance(block, Paragraph):
            mark = "**" if block.tone in ("good", "bad") else ""
            parts.append(f"{mark}{_text(block.text)}{mark}")
        elif isinstance(block, Items):
            parts.append("\n".join(f"- {_text(item)}" for item in block.items))
        elif isinstance(block, FactList):
            parts.append("\n".join(f"- {_text(n)}: {_text(v)}" for n, v in block.facts))
        elif isinstance(block, Table):
            parts.append(_table(block))
        elif isinstance(block, Bar):
            drawn = clean("".join(cells(block, _BAR)))
            bar = f"```text\n[{drawn}]\n```"
            parts += [_text(block.title), bar, _text(", ".join(legend(block)))]
        elif isinstance(block, Code):
            code = clean_lines(block.text).rstrip()
            fence = "```"
            while fence in code:
                fence += "`"
            parts.append(f"{fence}sh\n{code}\n{fence}")
    return "\n\n".join(parts) + "\n" if parts else ""


def _text(text: str) -> str:
    return clean(text).translate(_SPECIAL)


def _table(block: Table) -> str:
    titles = _row([_text(column.title) for column in block.columns])
    rule = "|" + "|".join("---:" if column.right else "---" for column in block.columns) + "|"
    rows = [_row([_text(cell) for cell in row]) for row in block.rows]
    return "\n".join([titles, rule, *rows])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
