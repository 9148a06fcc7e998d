"""The bars of all GPUs: memory from empty to full, by phase and term, on one scale."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Final

from turbofit.core.struct import NA
from turbofit.core.units import GIB, format_bytes, mib
from turbofit.report.page.tag import Markup, join, tag
from turbofit.report.views.plan.memory_view import KINDS, fold_indices, memory_label, stack, sums

if TYPE_CHECKING:
    from turbofit.core.plan import GpuLedger, Plan
    from turbofit.report.views.plan.memory_view import Kind, StackPiece

__all__ = ["bars", "tick_step"]

_MOST_TICKS: Final = 8
#: A tick is left out where it is nearer to the end than this part of the scale.
_CLOSE: Final = 7


def bars(plan: Plan) -> Markup:
    """A bar a GPU; equal GPUs share what is said of them."""
    scale = max(max(gpu.total, sum(piece.bytes for piece in stack(gpu))) for gpu in plan.gpus)
    sets = fold_indices(plan.gpus)
    drawn = [_set(plan, first, members, scale) for members, first in sets]
    return join(*drawn, _legend([first for _, first in sets]))


def _set(plan: Plan, first: GpuLedger, members: list[int], scale: int) -> Markup:
    label = memory_label(first)
    pieces = stack(first)
    rows = [_row(first, index, pieces, scale, label, told=index == members[0]) for index in members]
    return tag(
        "div",
        tag("p", label, class_="words" if first.fits else "words bad"),
        _end(first, pieces, scale),
        *rows,
        _ticks(scale),
        tag("output", "Point at a part, or press Tab and the arrow keys.", class_="readout"),
        _holders(plan, members),
        class_="gpuset",
    )


def _row(
    ledger: GpuLedger,
    index: int,
    pieces: tuple[StackPiece, ...],
    scale: int,
    label: str,
    *,
    told: bool,
) -> Markup:
    """The bar of one GPU; only the first of a set explains its parts."""
    phases = [
        _phase(ledger, kind, list(run), told=told)
        for kind, run in groupby(pieces, key=lambda p: p.kind)
    ]
    need = sum(piece.bytes for piece in pieces)
    end: str = ""
    if need > ledger.total:
        share = f"left:{100 * ledger.total / scale:.3f}%"
        over = f"{share};width:{100 * (need - ledger.total) / scale:.3f}%"
        end = join(tag("span", class_="over", style=over), tag("span", class_="end", style=share))
    inside = tag("div", *phases, class_="stack", style=f"width:{100 * need / scale:.3f}%")
    bar = tag(
        "div", inside, end, class_="bar", tabindex="0", role="group",
        aria_label=f"GPU {index}: {label}. Arrow keys go through its parts.",
    )  # fmt: skip
    return tag("div", tag("span", f"GPU {index}", class_="gpu"), bar, class_="row")


def _phase(ledger: GpuLedger, kind: Kind, pieces: list[StackPiece], *, told: bool) -> Markup:
    size = sum(piece.bytes for piece in pieces)
    letter, name = KINDS[kind]
    terms = [
        tag("i", style=f"flex-grow:{piece.bytes}", data_say=_say(ledger, piece) if told else None)
        for piece in pieces
    ]
    label = join(
        tag("span", letter, class_="letter"),
        tag("span", f" {name}", class_="name"),
        tag("span", f" {format_bytes(size)}", class_="size"),
    )
    return tag(
        "div", *terms, tag("span", label, class_="key", aria_hidden="true"),
        class_=f"phase k-{kind}", style=f"flex-grow:{size}",
    )  # fmt: skip


def _say(ledger: GpuLedger, piece: StackPiece) -> str:
    """A part in words."""
    name = KINDS[piece.kind][1]
    label = name if piece.term is None else f"{piece.name} ({name})"
    share = 100 * piece.bytes / ledger.total
    text = f"{label}: {mib(piece.bytes)} MiB, {share:.1f} % of the card"
    term = piece.term
    if term is None:
        return text
    text += f"; {term.basis}" + (f": {term.note}" if term.note else "")
    if term.worst:
        text += f"; it needs {mib(term.bytes)} MiB in all, what is idle of the pool included"
    if term.rehearsed is not None:
        text += f"; rehearsed: {mib(term.rehearsed)} MiB"
    return text


def _end(ledger: GpuLedger, pieces: tuple[StackPiece, ...], scale: int) -> Markup:
    """Where the card ends, above bars that go beyond it."""
    if sum(piece.bytes for piece in pieces) <= ledger.total:
        return Markup()
    share = 100 * ledger.total / scale
    text = f"the card ends here: {format_bytes(ledger.total)}"
    place = f"right:{100 - share:.3f}%" if share > 50 else f"left:{share:.3f}%"
    mark = f"{text} ▾" if share > 50 else f"▾ {text}"
    label = tag("b", mark, style=place)
    return tag("div", tag("div", label, class_="ends"), class_="row axis")


def _legend(ledgers: list[GpuLedger]) -> Markup:
    """One for all bars: what each kind is, and how much; from the least to the most of them."""
    found: dict[Kind, list[int]] = {}
    overs = []
    for ledger in ledgers:
        pieces = stack(ledger)
        for kind, size in sums(pieces).items():
            found.setdefault(kind, []).append(size)
        overs.append(max(0, sum(piece.bytes for piece in pieces) - ledger.total))
    entries = []
    for kind in (one for one in KINDS if one in found):
        letter, name = KINDS[kind]
        swatch = tag("span", letter, class_=f"swatch k-{kind}", aria_hidden="true")
        entries.append(tag("li", swatch, f" {name} ", tag("b", _range(found[kind]))))
    if any(overs):
        swatch = tag("span", "!", class_="swatch overs", aria_hidden="true")
        entries.append(tag("li", swatch, " more than the card has ", tag("b", _range(overs))))
    return tag("ul", *entries, class_="legend")


def _range(sizes: list[int]) -> str:
    """A size, or the smallest and the largest of several."""
    ends = dict.fromkeys(format_bytes(size) for size in (min(sizes), max(sizes)))
    return " to ".join(ends)


def _holders(plan: Plan, members: list[int]) -> Markup:
    """The processes that hold memory, where the machine showed them."""
    texts = []
    for gpu in plan.machine.gpus:
        for holder in gpu.holders if gpu.index in members else ():
            size = "NA" if holder.bytes == NA else format_bytes(holder.bytes)
            who = holder.name if holder.pid == NA else f"{holder.name} (process {holder.pid})"
            texts.append(f"GPU {gpu.index}: {who} holds {size}")
    return tag("ul", *(tag("li", text) for text in texts), class_="dim") if texts else Markup()


def tick_step(scale: int) -> int:
    """GiB between ticks: a power of two, so that there are few."""
    return int(1 << max(0, (scale // (GIB * _MOST_TICKS)).bit_length()))


def _ticks(scale: int) -> Markup:
    step = tick_step(scale)
    whole = [n for n in range(0, scale // GIB + 1, step) if scale - n * GIB > scale / _CLOSE]
    marks = [
        tag("span", f"{number} GiB", style=f"left:{100 * number * GIB / scale:.3f}%")
        for number in whole
    ]
    marks.append(tag("span", format_bytes(scale), style="left:100%"))
    return tag("div", tag("div", *marks, class_="ticks"), class_="row axis", aria_hidden="true")
