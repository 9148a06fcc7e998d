"""The blocks of a report, which the terminal, Markdown and HTML writers share."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, Literal, TypedDict

from turbofit.core.messages import BESIDE_COMMANDS, HARMLESS
from turbofit.core.struct import Struct

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from turbofit.core.plan import Remedy

Tone = Literal["plain", "good", "bad", "warn", "dim"]
ONLY_SHORT: Final[Places] = {"short": True, "whole": False, "page": False}
ONLY_WHOLE: Final[Places] = {"short": False, "whole": True, "page": False}
ONLY_ON_PAGE: Final[Places] = {"short": False, "whole": False, "page": True}
#: The note with all results of pretend GPUs.
PRETENDED: Final = "on pretend GPUs: memory is the engine's own, words and speed are not real"
#: The most warnings in the short answer.
_WARNINGS: Final = 2
#: The most characters of such a warning.
_WARNING: Final = 75
#: What a cut must not divide: quoted output of a program, and text in parentheses.
_QUOTED: Final = re.compile(r"(?<!\w)'[^']*'(?!\w)|\([^()]*\)")


class Places(TypedDict, total=False):
    short: bool
    whole: bool
    page: bool


class Block(Struct):
    """A part of a report, and the outputs that show this part.

    ``short`` means the short answer on a terminal, ``whole`` the whole text (a terminal with
    --full, Markdown), ``page`` the HTML page.
    """

    short: bool = False
    whole: bool = True
    page: bool = True


class Heading(Block, kw_only=False):
    """The title of the blocks that follow; ``level`` is 2 for a section, 3 for a subsection."""

    text: str
    level: int = 2


class Paragraph(Block, kw_only=False):
    text: str
    tone: Tone = "plain"


class Verdict(Paragraph, kw_only=False):
    """The answer in a sentence; a page shows the sentence in larger letters."""


class Items(Block, kw_only=False):
    items: tuple[str, ...]
    tone: Tone = "plain"


class FactList(Block, kw_only=False):
    """Names and their values."""

    facts: tuple[tuple[str, str], ...]


def remark(text: str, **places: bool) -> Paragraph:
    return Paragraph(text, "dim", **places)


def listed(
    title: str, items: Iterable[str], tone: Tone = "plain", *, level: int = 2
) -> list[Block]:
    """Return a list under its title; no block for an empty list."""
    entries = tuple(items)
    return [Heading(title, level), Items(entries, tone)] if entries else []


def known_facts(facts: Mapping[str, str | None], **places: bool) -> FactList:
    """Make a list of names and values, without the names that have no value.

    ``places`` are fields of `Block`: the outputs that show the list.
    """
    return FactList(tuple((name, text) for name, text in facts.items() if text), **places)


class Column(Struct):
    """A column of a table.

    The text of a ``wrap`` column may be broken over lines; a terminal leaves out an ``aside``
    column.
    """

    title: str
    right: bool = False
    wrap: bool = False
    aside: bool = False


class Table(Block):
    """Rows of text; on a page the ``chosen`` row is marked."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    chosen: int | None = None


def table(
    titles: Sequence[str],
    rows: Iterable[tuple[str, ...]],
    *,
    right: Collection[str] = (),
    wrap: Collection[str] = (),
    aside: Collection[str] = (),
    **more: Any,
) -> Table:
    """Build a table; ``right``, ``wrap`` and ``aside`` are titles of columns (see `Column`)."""
    columns = tuple(
        Column(title=title, right=title in right, wrap=title in wrap, aside=title in aside)
        for title in titles
    )
    return Table(columns=columns, rows=tuple(rows), **more)


class Code(Block, kw_only=False):
    """Text for the reader to copy unchanged."""

    text: str
    name: str = "this command"


class BarPiece(Struct):
    """A part of a bar: ``mark`` is its letter, ``kind`` its style on a page.

    ``parts`` divides the part once more, for a page: the bytes and the text of each term.
    """

    mark: str
    name: str
    bytes: int
    kind: str = ""
    parts: tuple[tuple[int, str], ...] = ()


class Bar(Block):
    """The memory of equal GPUs as a bar; memory beyond ``room`` bytes does not fit.

    ``owner`` is the owner of ``room`` bytes: ``card`` or ``budget``.
    """

    title: str
    room: int
    parts: tuple[BarPiece, ...]
    gpus: tuple[int, ...] = ()
    label: str = ""
    fits: bool = True
    owner: str = "card"

    @property
    def need(self) -> int:
        return sum(part.bytes for part in self.parts)


def text_blocks(blocks: Iterable[Block], *, short: bool = False) -> Iterator[Block]:
    """Return the blocks of the short answer or of the whole text."""
    return (block for block in blocks if (block.short if short else block.whole))


MORE: Final = remark("more: --full, --md or --json", **ONLY_SHORT)


def first_warnings(warnings: Sequence[str], aside: Collection[str] = ()) -> list[Block]:
    """Return the first warnings for the short answer, shortened, with the number of all others.

    Known faults come first: their texts name an issue thread. Warnings in ``aside``, harmless
    warnings, and warnings that stand beside the commands anyway are left out.
    """
    hidden = (*BESIDE_COMMANDS, *HARMLESS)
    kept = [
        text
        for text in warnings
        if text not in aside and not any(phrase in text for phrase in hidden)
    ]
    kept.sort(key=lambda text: "https://" not in text)  # known faults have the address of an issue
    left = len(kept) - _WARNINGS
    shown = [in_brief(text, _WARNING) for text in kept[:_WARNINGS]]
    if left > 0:
        shown[-1] += f" (and {left} more: --full)"
    return [Items(tuple(shown), tone="warn", **ONLY_SHORT)] if shown else []


def in_brief(text: str, width: int) -> str:
    """Cut a text after the last main clause within ``width`` characters; quotes stay whole.

    The text stays whole if no more than half of ``width`` would be left of it.
    """
    masked = _QUOTED.sub(lambda quote: "_" * len(quote[0]), text)
    ends = [found.start() for found in re.finditer(r"[:;.] ", masked[: width + 2])]
    return text[: ends[-1]] if len(text) > width and ends and 2 * ends[-1] > width else text


def remedies_table(remedies: Sequence[Remedy], title: str = "", **places: Any) -> list[Block]:
    """Return a table of changes and their effects; no block without changes.

    ``places`` are fields of `Block`: the outputs that show the table.
    """
    if not remedies:
        return []
    titles = ("change", "effect")
    rows = ((remedy.change, remedy.effect) for remedy in remedies)
    block = table(titles, rows, wrap=titles, **places)
    return [Heading(title, **places), block] if title else [block]
