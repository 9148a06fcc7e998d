"""The page of `turbofit which`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.report.page.blocks import paint, table
from turbofit.report.page.curve import Series, curve
from turbofit.report.page.frame import framed
from turbofit.report.page.tag import Markup, join, tag
from turbofit.report.painters.document import Items
from turbofit.report.views.plan.which_view import other_items, serving_table, which_text

if TYPE_CHECKING:
    from turbofit.core.which import Which

__all__ = ["which_page"]

_GIB = 1 << 30


def which_page(found: Which) -> str:
    """The answer as HTML."""
    title = f"Cards for {found.model}" if found.model else f"Models on {found.machine}"
    others = paint([Items(items=other_items(found))]) if found.others else Markup()
    parts = [
        ("keep", "What keeps the promise", table(serving_table(found), sortable=True)),
        ("speed", "Forecast of speed by memory", _speeds(found)),
        ("others", "What the others lack", others),
    ]
    if not found.keep:
        parts = parts[2:]
    tone = "good" if found.keep else "bad"
    return framed(
        title=f"{title} - turbofit",
        head=join(tag("h1", title), tag("p", which_text(found), class_=f"verdict {tone}")),
        sections=[part for part in parts if part[2]],
        made=f"turbofit {found.turbofit_version}, planned {found.created}.",
        document=found,
    )


def _speeds(found: Which) -> Markup:
    """Machines as points: their memory, and the requests a second that are forecast."""
    known = [one for one in found.keep if one.requests_per_second is not None]
    if found.model is None or not known:
        return Markup()
    points = tuple((one.bytes / _GIB, one.requests_per_second or 0.0) for one in known)
    names = tuple(one.on for one in known)
    series = [Series("machines", points, joined=False, names=names)]
    return curve(series, x="GiB of GPU memory", y="requests a second")
