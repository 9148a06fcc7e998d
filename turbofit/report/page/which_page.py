"""The page of `turbofit which`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from turbofit.report.page.html import page
from turbofit.report.painters.document import Curve, Heading, Items, Series, Verdict
from turbofit.report.views.plan.which_view import other_items, serving_table, which_text

if TYPE_CHECKING:
    from turbofit.core.which import Which
    from turbofit.report.painters.document import Block

__all__ = ["which_page"]

_GIB = 1 << 30


def which_page(found: Which) -> str:
    """The answer as HTML."""
    title = f"Cards for {found.model}" if found.model else f"Models on {found.machine}"
    blocks: list[Block] = [
        Heading(text=title),
        Verdict(text=which_text(found), good=bool(found.keep)),
    ]
    if found.keep:
        blocks.append(Heading(text="What keeps the promise"))
        blocks.append(replace(serving_table(found), sortable=True))
        blocks += _speeds(found)
    if found.others:
        blocks.append(Heading(text="What the others lack"))
        blocks.append(Items(items=other_items(found)))
    made = f"turbofit {found.turbofit_version}, planned {found.created}."
    return page(blocks, found, made)


def _speeds(found: Which) -> list[Block]:
    """Machines as points: their memory, and the requests a second that are forecast."""
    known = [one for one in found.keep if one.requests_per_second is not None]
    if found.model is None or not known:
        return []
    points = tuple((one.bytes / _GIB, one.requests_per_second or 0.0) for one in known)
    names = tuple(one.on for one in known)
    series = (Series(title="machines", points=points, joined=False, names=names),)
    curve = Curve(series=series, x="GiB of GPU memory", y="requests a second")
    return [Heading(text="Forecast of speed by memory"), curve]
