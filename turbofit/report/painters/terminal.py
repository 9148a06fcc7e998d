"""Writes a document as plain text of a given width, with or without colour."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import accumulate, groupby, zip_longest
from typing import Final, Literal

from turbofit.core.units import format_bytes
from turbofit.report.painters.document import (
    Bar,
    Block,
    Code,
    Column,
    FactList,
    Heading,
    Items,
    Paragraph,
    Table,
    Tone,
    text_blocks,
)

_SPACES: Final = "  "
_GAP: Final = len(_SPACES)
_NARROWEST: Final = 10
#: Unicode categories of the characters that have no width: combining marks and formats.
_WITHOUT_WIDTH: Final = ("Mn", "Me", "Cf")
_ANSI: Final[dict[Tone | Literal["head"], str]] = {
    "plain": "", "good": "32", "bad": "31", "warn": "33", "dim": "2", "head": "1",
}  # fmt: skip
#: Colours of a bar's letters; the letters alone have the same meaning.
_LETTERS: Final = {
    "r": "90", "o": "35", "c": "36", "W": "34", "K": "32", "b": "33", "t": "31", "l": "95",
    ".": "2", "m": "37", "!": "1;31", "|": "1",
}  # fmt: skip
#: The letter for the end of a card's memory in a bar.
END: Final = "|"
#: The letter for memory that the card does not have.
OVER: Final = "!"
#: Control characters, line separators, and characters that change the direction of text.
_CONTROLS: Final = dict.fromkeys(
    (*range(32), *range(127, 160), *range(0x2028, 0x202F), *range(0x2066, 0x206A)), "?"
)
_CONTROLS_BUT_NEWLINE: Final = {code: mark for code, mark in _CONTROLS.items() if code != 10}


def clean(text: str) -> str:
    """Replace control characters by "?": some texts are names of files that other users chose."""
    return text.translate(_CONTROLS)


def clean_lines(text: str) -> str:
    """Replace control characters like `clean`, but keep the ends of lines."""
    return text.translate(_CONTROLS_BUT_NEWLINE)


def paint(
    blocks: Iterable[Block], *, width: int = 80, colour: bool = False, short: bool = False
) -> str:
    """Write the document as text in lines of at most ``width`` columns, except for longer words."""
    parts: list[str] = []
    last: Block | None = None
    for block in text_blocks(blocks, short=short):
        if isinstance(block, (Heading, Paragraph)):
            tone: Tone | Literal["head"] = "head" if isinstance(block, Heading) else block.tone
            before = "\n" if tone == "head" and parts else ""
            lines = _fold(clean(block.text), width)
            parts.append(before + _tint("\n".join(lines), _ANSI[tone], colour))
        elif isinstance(block, Items):
            for item in block.items:
                lines = _fold(clean(item), width - 4)
                parts.append("  - " + _tint("\n    ".join(lines), _ANSI[block.tone], colour))
        elif isinstance(block, FactList):
            parts.extend(_facts(block, width))
        elif isinstance(block, Table):
            parts.extend(_table(block, width, colour))
        elif isinstance(block, Bar):
            parts.extend(_bar(block, width, colour))
        elif isinstance(block, Code):
            code = clean_lines(block.text)
            before = "\n" if isinstance(last, Code) else ""
            parts.append(before + "\n".join(f"  {line}" for line in code.splitlines()))
        last = block
    return "\n".join(parts) + "\n" if parts else ""


def _tint(text: str, code: str, colour: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if colour and code else text


def _fold(text: str, width: int) -> list[str]:
    """Break text at single spaces; a word longer than a line (a path) stays whole."""
    if _display_width(text) <= width:
        return [text]
    return filled(re.split(r"(?<=\S) (?=\S)", text), max(width, _NARROWEST))


def filled(words: Iterable[str], width: int, gap: str = " ") -> list[str]:
    """Join words to lines of at most ``width`` columns, each with as many words as possible.

    ``gap`` stands between two words.
    """
    lines: list[str] = []
    for word in words:
        if lines and _display_width(f"{lines[-1]}{gap}{word}") <= width:
            lines[-1] += f"{gap}{word}"
        else:
            lines.append(word)
    return lines


def _display_width(text: str) -> int:
    """Return the columns of a text: two for a wide character, 0 for a combining mark."""
    if text.isascii():
        return len(text)
    return sum(
        0
        if unicodedata.category(character) in _WITHOUT_WIDTH
        else 1 + (unicodedata.east_asian_width(character) in "WF")
        for character in text
    )


def _padded(text: str, width: int, *, right: bool = False) -> str:
    spaces = " " * (width - _display_width(text))
    return f"{spaces}{text}" if right else f"{text}{spaces}"


def _facts(block: FactList, width: int) -> list[str]:
    """Return the lines of names and values; all values begin in the same column."""
    left = max((_display_width(clean(name)) for name, _ in block.facts), default=0)
    out = []
    for name, value in block.facts:
        lines = _fold(clean(value), width - left - _GAP - 2)
        out.append(f"  {_padded(clean(name), left)}{_SPACES}{lines[0]}".rstrip())
        out.extend(f"{' ' * (left + _GAP + 2)}{line}" for line in lines[1:])
    return out


def _bar(block: Bar, width: int, colour: bool) -> list[str]:
    """Return the lines of a bar: the title, the letters, and the meaning of each letter."""
    letters = cells(block, width - 4)
    drawn = "".join(
        _tint(clean("".join(run)), _LETTERS.get(mark, ""), colour) for mark, run in groupby(letters)
    )
    lines = filled(map(clean, legend(block)), width - 2, gap="  ")
    title = _fold(clean(block.title), width - 2)
    return [*(f"  {line}" for line in title), f"  [{drawn}]", *(f"  {line}" for line in lines)]


def _table(block: Table, width: int, colour: bool) -> list[str]:
    """Return the lines of a table, without its ``aside`` columns."""
    places = [i for i, column in enumerate(block.columns) if not column.aside]
    columns = [block.columns[i] for i in places]
    titles = [column.title for column in columns]
    rows = [[clean(row[i]) for i in places] for row in block.rows]
    widths = _widths(columns, [titles, *rows], width)
    out = [_tint(line, _ANSI["dim"], colour) for line in _cells(columns, titles, widths)]
    for row in rows:
        out.extend(_cells(columns, row, widths))
    return out


def _widths(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> list[int]:
    """Return the widths of the columns; ``wrap`` columns become narrower until the line fits.

    The widest of these loses one place at a time, but none cuts a word.
    """
    widths = [max(_display_width(row[i]) for row in rows) for i in range(len(columns))]
    over = sum(widths) + _GAP * (len(widths) - 1) + 2 - width
    least = {
        i: max(_display_width(word) for row in rows for word in (row[i].split() or [""]))
        for i, column in enumerate(columns)
        if column.wrap
    }
    while over > 0:
        soft = [i for i, floor in least.items() if widths[i] > max(floor, _NARROWEST)]
        if not soft:
            break
        widths[max(soft, key=lambda i: widths[i])] -= 1
        over -= 1
    return widths


def _cells(columns: Sequence[Column], row: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Return the lines of a row; long cells are broken over several lines."""
    folded = [
        _fold(cell, width) if column.wrap else [cell]
        for cell, width, column in zip(row, widths, columns, strict=True)
    ]
    out = []
    for texts in zip_longest(*folded, fillvalue=""):
        cells = [
            _padded(text, width, right=column.right)
            for text, width, column in zip(texts, widths, columns, strict=True)
        ]
        out.append(("  " + _SPACES.join(cells)).rstrip())
    return out


def cells(bar: Bar, width: int) -> list[str]:
    """Return the ``width`` letters of a bar, one per cell; every part has at least one letter.

    After the end of the card, ``|``, the letter is ``!``.
    """
    starts = accumulate((part.bytes for part in bar.parts), initial=0)
    parts = [
        (min(part.bytes, bar.room - start), part.mark)
        for part, start in zip(bar.parts, starts, strict=False)
        if start < bar.room
    ]
    if bar.need <= bar.room:
        return _fill(parts, width)
    inside = min(max(1, round((width - 1) * bar.room / bar.need)), width - 2)
    return [*_fill(parts, inside), END, *[OVER] * (width - 1 - inside)]


def legend(bar: Bar) -> list[str]:
    """Return the letter, name and size of every part."""
    texts = [f"{part.mark}={part.name} {format_bytes(part.bytes)}" for part in bar.parts]
    if bar.need > bar.room:
        texts.append(f"{OVER}=more than the {bar.owner} has")
    return texts


def _fill(parts: Sequence[tuple[int, str]], width: int) -> list[str]:
    """Return the letters of a bar of ``width`` cells; ``parts`` have a size and a letter each.

    A part ends where its share of the sizes ends, to the nearest cell. Each part has a cell.
    """
    parts = parts[:width]
    ends = list(accumulate(size for size, _ in parts))
    letters: list[str] = []
    for place, (end, (_, mark)) in enumerate(zip(ends, parts, strict=True), 1):
        last_cell = max(round(width * end / ends[-1]), len(letters) + 1)
        cells_of_later_parts = len(parts) - place
        last_cell = min(last_cell, width - cells_of_later_parts)
        letters += [mark] * (last_cell - len(letters))
    return letters
