"""What a load measured, as blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.report.painters.document import (
    ONLY_ON_PAGE,
    Column,
    Curve,
    FactList,
    Heading,
    Items,
    Paragraph,
    Series,
    Table,
    Tiles,
)

if TYPE_CHECKING:
    from turbofit.load.result import LoadResult, Spread
    from turbofit.report.painters.document import Block

__all__ = ["load_view", "seconds_text"]


def load_view(result: LoadResult) -> list[Block]:
    """What a load measured: figures, latency, the time of the window, what was not answered."""
    failed = result.begun - result.answered
    facts = (
        ("load", _load_text(result)),
        ("window", f"{result.seconds:,.1f} s: {result.answered:,} requests answered, {failed:,} "
                   "not"),
        ("requests/s", f"{result.requests_per_second:.3f}"),
        ("tokens/s", f"{result.output_tokens_per_second:,.1f} of answers, "
                     f"{result.output_tokens:,.1f} an answer"),
        ("at once", f"{result.running:.1f} requests on average"),
    )  # fmt: skip
    tiles = (
        ("requests/s", f"{result.requests_per_second:.2f}",
         f"{result.answered:,} answered in {result.seconds:,.0f} s, {failed:,} not"),
        ("first token, median", seconds_text(result.ttft.p50),
         f"p99 {seconds_text(result.ttft.p99)}"),
        ("a token, median", seconds_text(result.tpot.p50), f"p99 {seconds_text(result.tpot.p99)}"),
        ("tokens/s", f"{result.output_tokens_per_second:,.0f}",
         f"{result.output_tokens:,.0f} an answer, {result.running:.1f} requests at once"),
    )  # fmt: skip
    rate = tuple((one.at, one.output_tokens_per_second) for one in result.moments)
    running = tuple((one.at, float(one.running)) for one in result.moments)
    over_time = (
        Curve(series=(Series(title="tokens/s", points=rate),), x="seconds", y="tokens a second"),
        Curve(series=(Series(title="requests", points=running),), x="seconds",
              y="requests under way"),
    )  # fmt: skip
    blocks: list[Block] = [
        Heading(text=f"{result.model} at {result.url}"),
        Tiles(figures=tiles, **ONLY_ON_PAGE),
        FactList(facts=facts),
        Heading(text="Latency", whole=False),
        _latency(result),
    ]
    if result.moments:
        blocks += [Heading(text="Over the time of the window", whole=False), *over_time]
    errors = _errors(result)
    if errors or result.warnings:
        blocks += [Heading(text="Requests without an answer, and warnings", whole=False), *errors]
    if result.warnings:
        blocks.append(Items(items=result.warnings, tone="warn"))
    return blocks


def _load_text(result: LoadResult) -> str:
    """The load in one line."""
    given = result.load
    prompt = "" if result.prompt_tokens is None else f"{result.prompt_tokens:,.0f} prompt tokens, "
    sizes = f"{prompt}{result.output_tokens:,.0f} tokens an answer"
    if "trace" in given:
        return f"the trace {given['trace']}; {sizes}"
    if "rate" in given:
        return f"{given['rate']} requests arrive a second; {sizes}"
    return f"a closed loop of {given.get('concurrency', 8)}; {sizes}"


def _latency(result: LoadResult) -> Table:
    """Times of requests that began in the window."""
    rows = (
        _row("first token (TTFT)", result.ttft),
        _row("token after it (TPOT)", result.tpot),
        _row("whole answer (E2E)", result.e2e),
    )
    columns = (
        Column(title=""),
        *(Column(title=name, right=True) for name in ("mean", "p50", "p90", "p99", "most")),
    )
    return Table(columns=columns, rows=rows)


def _errors(result: LoadResult) -> list[Block]:
    """What was not answered, and why."""
    blocks: list[Block] = []
    if result.errors:
        columns = (
            Column(title="not answered"),
            Column(title="requests", right=True),
            Column(title="for example", wrap=True),
        )
        rows = tuple((one.kind, f"{one.count:,}", one.example) for one in result.errors)
        blocks.append(Table(columns=columns, rows=rows))
    if result.warm_up_errors:
        text = f"{result.warm_up_errors:,} requests failed before the window"
        blocks.append(Paragraph(text=text, tone="warn"))
    return blocks


def seconds_text(value: float) -> str:
    """A time for people: ``1.23 s``, ``45.6 ms``."""
    return f"{value:,.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def _row(name: str, one: Spread) -> tuple[str, ...]:
    if not one.count:
        return (name, "-", "-", "-", "-", "-")
    times = (one.mean, one.p50, one.p90, one.p99, one.most)
    return (name, *(seconds_text(time) for time in times))
