"""Which cards keep a promise, or which models a machine serves, as a document."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.core.messages import plural
from turbofit.core.units import GIB, format_bytes
from turbofit.report.painters.document import (
    ONLY_SHORT,
    Column,
    Curve,
    Heading,
    Items,
    Paragraph,
    Series,
    Table,
    Verdict,
)

if TYPE_CHECKING:
    from turbofit.core.which import Serving, Which
    from turbofit.report.painters.document import Block

__all__ = ["which_view"]

#: Rows of a summary, and the others that it says something of; the whole text has all.
_ROWS: Final = 12
_OTHERS: Final = 3
#: Columns that a summary leaves out.
_WIDE: Final = ("engine", "shape", "KV tokens")


def which_view(found: Which) -> list[Block]:
    """The answer first, then those that keep the promise, then what the others lack."""
    title = f"Cards for {found.model}" if found.model else f"Models on {found.machine}"
    others = tuple(f"{one.on if found.model else one.model}: {one.why_not}" for one in found.others)
    blocks: list[Block] = [
        Heading(text=title, short=True),
        Verdict(text=_answer(found), good=bool(found.keep), short=True),
    ]
    if found.keep:
        table = _serving(found)
        places = [i for i, column in enumerate(table.columns) if column.title not in _WIDE]
        columns = tuple(table.columns[i] for i in places)
        rows = tuple(tuple(row[i] for i in places) for row in table.rows[:_ROWS])
        blocks += [
            Table(columns=columns, rows=rows, **ONLY_SHORT),
            Heading(text="What keeps the promise", whole=False),
            table,
            *_speeds(found),
        ]
    else:
        blocks.append(Items(items=others[:_OTHERS], **ONLY_SHORT))
    if others:
        blocks += [Heading(text="Not these"), Items(items=others)]
    kept = max(0, len(found.keep) - _ROWS)
    not_said = len(others) if found.keep else len(others[_OTHERS:])
    counts = {"more that keep it": kept, "that do not": not_said}
    left = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    more = f"{left or 'more'}: --full, --md, --html or --json"
    return [*blocks, Paragraph(text=more, tone="dim", **ONLY_SHORT)]


def _speeds(found: Which) -> list[Block]:
    """Machines as points: their memory, and the requests a second that are forecast."""
    known = [one for one in found.keep if one.requests_per_second is not None]
    if found.model is None or not known:
        return []
    points = tuple((one.bytes / GIB, one.requests_per_second or 0.0) for one in known)
    names = tuple(one.on for one in known)
    series = (Series(title="machines", points=points, joined=False, names=names),)
    curve = Curve(series=series, x="GiB of GPU memory", y="requests a second")
    return [Heading(text="Forecast of speed by memory", whole=False), curve]


def _answer(found: Which) -> str:
    """How many keep the promise, and in which order they stand."""
    count, promise = len(found.keep), _promised(found)
    everything = count + len(found.others)
    if found.model is None:
        order = "; the largest first" if count else ""
        return f"{count} of {everything} preset models keep the promise{promise}{order}"
    counts = ", ".join(map(str, found.counts))
    order = "; the fewest bytes of GPU memory first" if count else ""
    if "all_counts" in found.request:
        machines = plural(count, "machine")
        return f"{count} {machines} of {counts} equal cards keep the promise{promise}{order}"
    each = f", each with the fewest of {counts} GPUs that do" if count else f", with {counts} GPUs"
    return f"{count} of {everything} preset cards keep the promise{promise}{each}{order}"


def _promised(found: Which) -> str:
    """What was asked, as a clause; empty where that was nothing."""
    given = [
        f"{name.replace('_', ' ')} {value}"
        for name, value in found.request.items()
        if name != "all_counts"
    ]
    return f" ({', '.join(given)})" if given else ""


def _serving(found: Which) -> Table:
    """Those that keep the promise."""
    first = "machine" if found.model else "model"
    columns = (
        Column(title=first),
        *([Column(title="memory", right=True)] if found.model else []),
        Column(title="engine", aside=True),
        Column(title="shape"),
        Column(title="context", right=True),
        Column(title="KV tokens", right=True),
        Column(title="at once", right=True),
        Column(title="requests/s", right=True),
        Column(title="first token", right=True),
    )
    rows = tuple(_row(found, one) for one in found.keep)
    return Table(columns=columns, rows=rows, sortable=True)


def _row(found: Which, one: Serving) -> tuple[str, ...]:
    rate, first = one.requests_per_second, one.seconds_to_first_token
    return (
        *((one.on, format_bytes(one.bytes)) if found.model else (one.model,)),
        one.engine or "",
        f"tp {one.tp} x {one.replicas}",
        f"{one.context:,}",
        f"{one.kv_tokens:,}",
        f"{one.requests_at_once:,}",
        "" if rate is None else f"{rate:.2f}",
        "" if first is None else f"{first:.1f} s",
    )
