"""Which cards keep a promise, or which models a machine serves, as a document."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.core.messages import plural
from turbofit.core.units import format_bytes
from turbofit.report.painters.document import Column, Heading, Items, Paragraph, Table

if TYPE_CHECKING:
    from turbofit.core.which import Serving, Which
    from turbofit.report.painters.document import Block

__all__ = [
    "other_items", "promise_text", "serving_table", "which_summary", "which_text", "which_view",
]  # fmt: skip

#: Rows of a summary, and the others that it says something of; the whole text has all.
_ROWS: Final = 12
_OTHERS: Final = 3
#: Columns that a summary leaves out.
_WIDE: Final = ("engine", "shape", "KV tokens")


def which_view(found: Which) -> list[Block]:
    """The answer first, then those that keep the promise, then what the others lack."""
    title = f"Cards for {found.model}" if found.model else f"Models on {found.machine}"
    blocks: list[Block] = [
        Heading(text=title),
        Paragraph(text=which_text(found), tone="good" if found.keep else "bad"),
    ]
    if found.keep:
        blocks.append(serving_table(found))
    if found.others:
        blocks += [Heading(text="Not these"), Items(items=other_items(found))]
    return blocks


def which_summary(found: Which) -> list[Block]:
    """The answer, the first that keep the promise, and where there is more."""
    heading, text, *_ = which_view(found)
    blocks: list[Block] = [heading, text]
    others = other_items(found)
    if found.keep:
        blocks.append(_narrow(serving_table(found)))
    else:
        blocks.append(Items(items=others[:_OTHERS]))
        others = others[_OTHERS:]
    kept = max(0, len(found.keep) - _ROWS)
    counts = {"more that keep it": kept, "that do not": len(others)}
    left = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    more = f"{left or 'more'}: --full, --md, --html or --json"
    return [*blocks, Paragraph(text=more, tone="dim")]


def _narrow(table: Table) -> Table:
    """Its first rows, without the columns that a terminal has no room for."""
    places = [i for i, column in enumerate(table.columns) if column.title not in _WIDE]
    return Table(
        columns=tuple(table.columns[i] for i in places),
        rows=tuple(tuple(row[i] for i in places) for row in table.rows[:_ROWS]),
    )


def which_text(found: Which) -> str:
    """How many keep the promise, and in which order they stand."""
    count, promise = len(found.keep), promise_text(found)
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


def promise_text(found: Which) -> str:
    """What was asked, as a clause; empty where that was nothing."""
    given = [
        f"{name.replace('_', ' ')} {value}"
        for name, value in found.request.items()
        if name != "all_counts"
    ]
    return f" ({', '.join(given)})" if given else ""


def serving_table(found: Which) -> Table:
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
    return Table(columns=columns, rows=tuple(_row(found, one) for one in found.keep))


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


def other_items(found: Which) -> tuple[str, ...]:
    """What the others lack, a line each."""
    return tuple(f"{one.on if found.model else one.model}: {one.why_not}" for one in found.others)
