"""A report before it is painted: blocks of data that terminal, Markdown and HTML share."""

from __future__ import annotations

from typing import Literal

from turbofit.core.struct import Struct

__all__ = [
    "Bar",
    "BarPiece",
    "Block",
    "Code",
    "Column",
    "FactList",
    "Heading",
    "Items",
    "Paragraph",
    "Table",
    "Tone",
]  # fmt: skip

Tone = Literal["plain", "good", "bad", "warn", "dim"]


class Heading(Struct, tag="heading"):
    """The title of what follows."""

    text: str


class Paragraph(Struct, tag="line"):
    """A paragraph."""

    text: str
    tone: Tone = "plain"


class Items(Struct, tag="items"):
    """A list, one entry a bullet."""

    items: tuple[str, ...]
    tone: Tone = "plain"


class FactList(Struct, tag="facts"):
    """Names and what they are."""

    facts: tuple[tuple[str, str], ...]


class Column(Struct):
    """A column of a table.

    ``wrap`` marks one whose text may be broken over lines, ``aside`` one for which a terminal has
    no room: it is left out there.
    """

    title: str
    right: bool = False
    wrap: bool = False
    aside: bool = False


class Table(Struct, tag="table"):
    """Rows of text; ``sums`` are rows set apart below the others."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    sums: tuple[tuple[str, ...], ...] = ()


class Code(Struct, tag="code"):
    """Text to be copied as it is."""

    text: str


class BarPiece(Struct):
    """A piece of a bar: the letter that stands for it, what it is, its bytes."""

    mark: str
    name: str
    bytes: int


class Bar(Struct, tag="bar"):
    """Memory from empty to full; what its parts have beyond ``room`` bytes is not there."""

    title: str
    room: int
    parts: tuple[BarPiece, ...]


Block = Heading | Paragraph | Items | FactList | Table | Code | Bar
