"""A report before it is painted: blocks of data that terminal, Markdown and HTML share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal, TypedDict

from turbofit.core.messages import BESIDE_COMMANDS, HARMLESS, plural
from turbofit.core.struct import Struct

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from turbofit.core.plan import Remedy
    from turbofit.core.run_report import RunReport

Tone = Literal["plain", "good", "bad", "warn", "dim"]


class Places(TypedDict, total=False):
    short: bool
    whole: bool
    page: bool


ONLY_SHORT: Final[Places] = {"short": True, "whole": False, "page": False}
ONLY_WHOLE: Final[Places] = {"short": False, "whole": True, "page": False}
ONLY_ON_PAGE: Final[Places] = {"short": False, "whole": False, "page": True}


class Block(Struct):
    """A piece of a report, and where it stands.

    ``short`` is the short answer of a terminal, ``whole`` the whole text (a terminal with --full,
    Markdown).
    """

    short: bool = False
    whole: bool = True
    page: bool = True


class Heading(Block, kw_only=False):
    """The title of what follows; ``level`` 3 is below a section's, which is 2."""

    text: str
    level: int = 2


class Paragraph(Block, kw_only=False):
    text: str
    tone: Tone = "plain"


class Verdict(Paragraph, kw_only=False):
    """The answer in a sentence; on a page a badge has its first words, ``badge``."""

    badge: str = ""


class Items(Block, kw_only=False):
    items: tuple[str, ...]
    tone: Tone = "plain"


class FactList(Block, kw_only=False):
    """Names and what they are."""

    facts: tuple[tuple[str, str], ...]


def remark(text: str, **places: bool) -> Paragraph:
    return Paragraph(text, "dim", **places)


def listed(
    title: str, items: Iterable[str], tone: Tone = "plain", *, level: int = 2
) -> list[Block]:
    """A list under its title; nothing where it is empty."""
    entries = tuple(items)
    return [Heading(title, level), Items(entries, tone)] if entries else []


def known_facts(facts: Mapping[str, str | None], **places: bool) -> FactList:
    """Names and what they are, without those that nothing is said of."""
    return FactList(tuple((name, text) for name, text in facts.items() if text), **places)


class Column(Struct):
    """A column of a table.

    ``wrap`` marks one whose text may be broken over lines, ``aside`` one for which a terminal has
    no room: it is left out there. A page makes a bar of what is ``drawn`` in letters: ``[##+.]``.
    """

    title: str
    right: bool = False
    wrap: bool = False
    aside: bool = False
    drawn: bool = False


class Table(Block):
    """Rows of text; ``sums`` are set apart below the others.

    On a page the titles of a ``sortable`` one are buttons, and the row ``chosen`` is set off.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    sums: tuple[tuple[str, ...], ...] = ()
    sortable: bool = False
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
    """A table whose columns are known by their titles; ``right`` are those of numbers."""
    columns = tuple(
        Column(title=title, right=title in right, wrap=title in wrap, aside=title in aside)
        for title in titles
    )
    return Table(columns=columns, rows=tuple(rows), **more)


class Code(Block, kw_only=False):
    """Text to be copied as it is."""

    text: str
    name: str = "this command"


class Fold(Block):
    """Blocks that a page shows once they are opened."""

    title: str
    blocks: tuple[Block, ...]


class BarPiece(Struct):
    """A piece of a bar: its letter ``mark``, its style on a page ``kind``.

    ``parts`` are the bytes and words of what it is made of.
    """

    mark: str
    name: str
    bytes: int
    kind: str = ""
    parts: tuple[tuple[int, str], ...] = ()


class Bar(Block):
    """Memory of equal GPUs from empty to full; what is beyond ``room`` bytes is not there.

    ``owner`` names what has the room: the card, or a budget.
    """

    title: str
    room: int
    parts: tuple[BarPiece, ...]
    gpus: tuple[int, ...] = ()
    label: str = ""
    fits: bool = True
    holders: tuple[str, ...] = ()
    owner: str = "card"

    @property
    def need(self) -> int:
        return sum(part.bytes for part in self.parts)


class TopologyCard(Struct):
    index: int
    name: str
    uuid: str
    size: str


class Topology(Block):
    """A picture on a page: GPUs, a plan's groups of them, and in words the ways between them."""

    whole: bool = False
    cards: tuple[TopologyCard, ...]
    groups: tuple[tuple[int, ...], ...]
    ways: tuple[str, ...]


def text_blocks(blocks: Iterable[Block], *, short: bool = False) -> Iterator[Block]:
    """The blocks of the short answer, or those of the whole text."""
    for block in blocks:
        if not (block.short if short else block.whole):
            continue
        if isinstance(block, Fold):
            yield from text_blocks(block.blocks)
        else:
            yield block


MORE: Final = remark("more: --full, --md or --json", **ONLY_SHORT)
#: Beside all that a run on pretend GPUs shows.
PRETENDED: Final = "on pretend GPUs: memory is the engine's own, words and speed are not real"


def last_events(run: RunReport, most: int, level: int = 2) -> list[Block]:
    """What happened in a run at last."""
    lines = (f"{event.at} {event.kind}: {event.text}" for event in run.events[-most:])
    return listed("Last events", lines, level=level)


def first_warnings(warnings: Sequence[str], assumed: Sequence[str] = ()) -> list[Block]:
    """The first known fault, how the input was read (``assumed``), else the first; how many more.

    A known fault names its thread. What stands beside commands, and what is harmless, is left out.
    """
    hidden = (*BESIDE_COMMANDS, *HARMLESS)
    kept = [text for text in warnings if not any(phrase in text for phrase in hidden)]
    kept.sort(key=lambda text: text not in assumed)
    shown = [f"assumed: {text}" for text in kept if text in assumed]
    faults = [text for text in kept if "https://" in text and text not in assumed]
    shown = faults[:1] + shown or kept[:1]
    left = len(kept) - len(shown)
    if left:
        shown[-1] += f" (and {left} more {plural(left, 'warning')})"
    return [Items(tuple(shown), tone="warn", **ONLY_SHORT)] if shown else []


def remedies_table(remedies: Sequence[Remedy], title: str = "", **places: Any) -> list[Block]:
    """Changes and their effects; nothing where there are none."""
    if not remedies:
        return []
    titles = ("change", "effect")
    rows = ((remedy.change, remedy.effect) for remedy in remedies)
    block = table(titles, rows, wrap=titles, **places)
    return [Heading(title, **places), block] if title else [block]
