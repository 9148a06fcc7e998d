"""The elements of a page: tags, JSON in a script, bars of memory."""

from __future__ import annotations

import html
import json
from typing import TYPE_CHECKING, Any, Final

from turbofit.core.struct import to_builtins
from turbofit.core.units import format_bytes
from turbofit.report.painters.terminal import clean_lines

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turbofit.report.painters.document import Bar, BarPiece

#: Characters that could end a script element or a line of JavaScript, with their escapes.
_IN_SCRIPT: Final = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


class Markup(str):
    """Text that is HTML already and is not escaped again."""

    __slots__ = ()


def tag(name: str, *children: str, **attributes: Any) -> Markup:
    """An element; ``data_x`` becomes ``data-x``, None and False are left out, True has no value."""
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
    """Encode a value as JSON that can stand in a script element."""
    text = json.dumps(to_builtins(value), ensure_ascii=False, separators=(",", ":"))
    return Markup(text.translate(_IN_SCRIPT))


def _escaped(text: str) -> str:
    return html.escape(clean_lines(text), quote=True)


def memory_bars(bars: Sequence[Bar]) -> Markup:
    """One bar per GPU, all on one scale; equal GPUs share their label and legend."""
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
        share = f"left:{100 * bar.room / scale:.3f}%"
        over = f"{share};width:{100 * (bar.need - bar.room) / scale:.3f}%"
        end = join(tag("span", class_="over", style=over), tag("span", class_="end", style=share))
    phases = [_phase(part, explained=index == bar.gpus[0]) for part in bar.parts]
    inside = tag("div", *phases, class_="stack", style=f"width:{100 * bar.need / scale:.3f}%")
    drawn = tag(
        "div", inside, end, class_="bar", tabindex="0", role="group",
        aria_label=f"GPU {index}: {bar.label}. Arrow keys go through its parts.",
    )  # fmt: skip
    return tag("div", tag("span", f"GPU {index}", class_="gpu"), drawn, class_="row")


def _phase(part: BarPiece, *, explained: bool) -> Markup:
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
    """One legend for all bars: each kind of memory and its sizes, the smallest and the largest."""
    sizes: dict[tuple[str, str, str], list[int]] = {}
    for part in (part for bar in bars for part in bar.parts):
        sizes.setdefault((part.kind, part.mark, part.name), []).append(part.bytes)
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
