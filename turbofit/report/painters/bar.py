"""Draws a bar in characters: as many cells as a line has, one letter a part."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.core.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turbofit.report.painters.document import Bar

__all__ = ["END", "OVER", "cells", "legend"]

#: Where the card ends, and what is beyond.
END: Final = "|"
OVER: Final = "!"


def cells(bar: Bar, width: int) -> list[str]:
    """One letter a cell, ``width`` of them; every part that is there has at least one.

    What exceeds the card is ``!`` behind a ``|``.
    """
    need = sum(part.bytes for part in bar.parts)
    if need <= bar.room:
        return _fill([part.bytes for part in bar.parts], [p.mark for p in bar.parts], width)
    inside = min(max(1, round((width - 1) * bar.room / need)), width - 2)
    kept, marks, room = [], [], bar.room
    for part in bar.parts:
        if room > 0:
            kept.append(min(part.bytes, room))
            marks.append(part.mark)
            room -= part.bytes
    return [*_fill(kept, marks, inside), END, *[OVER] * (width - 1 - inside)]


def legend(bar: Bar) -> list[str]:
    """Every part with its letter and its size."""
    texts = [f"{part.mark}={part.name} {format_bytes(part.bytes)}" for part in bar.parts]
    over = sum(part.bytes for part in bar.parts) - bar.room
    if over > 0:
        texts.append(f"{OVER}={format_bytes(over)} more than the card has")
    return texts


def _fill(sizes: Sequence[int], marks: Sequence[str], width: int) -> list[str]:
    """Cells by the largest remainder, after one each."""
    if not sizes:
        return []
    marks, sizes = marks[:width], sizes[:width]
    spare, total = width - len(sizes), sum(sizes) or 1
    # One cell is given already: only what a part has beyond it is shared out.
    beyond = [max(0.0, size / total * width - 1) for size in sizes]
    scale = spare / (sum(beyond) or 1)
    exact = [size * scale for size in beyond]
    counts = [1 + int(one) for one in exact]
    order = sorted(range(len(sizes)), key=lambda i: exact[i] - int(exact[i]), reverse=True)
    for i in order[: width - sum(counts)]:
        counts[i] += 1
    return [mark for mark, count in zip(marks, counts, strict=True) for _ in range(count)]
