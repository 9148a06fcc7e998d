"""A running server as a document: engines, memory against the forecast, what was held back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.core.messages import plural
from turbofit.core.units import format_bytes
from turbofit.report.painters.document import FactList, Heading, Items, Paragraph, table
from turbofit.report.views.plan.memory_view import fold, memory_bar
from turbofit.report.views.shared_blocks import PRETENDED, last_events

if TYPE_CHECKING:
    from collections.abc import Mapping

    from turbofit.core.plan import GpuLedger, Plan
    from turbofit.core.run_report import RunReport
    from turbofit.observe.live import LiveEngine, LiveServer
    from turbofit.report.painters.document import Block, Table

_EVENTS: Final = 5
_NONE: Final = "-"


def watch_view(
    plan: Plan,
    run: RunReport | None,
    now: LiveServer | None,
    before: tuple[LiveServer, float] | None,
    used: Mapping[int, int],
) -> list[Block]:
    """One screen.

    Args:
        plan: what it runs.
        run: its record, None where only an address is known.
        now: what the gateway says, None where it is not open (yet).
        before: an earlier look, and how many seconds lie between.
        used: bytes in use on each GPU, everybody's; empty where NVML was not asked.
    """
    blocks: list[Block] = [Heading(plan.model.name), FactList(_facts(run, now))]
    if run is not None and run.pretend:
        blocks.append(Paragraph(PRETENDED, tone="warn"))
    if now is not None:
        blocks.append(_engines(now, before))
    blocks += _memory(plan, used)
    if now is not None:
        blocks += _held_back(now)
    return [*blocks, *(last_events(run, _EVENTS) if run is not None else [])]


def _facts(run: RunReport | None, now: LiveServer | None) -> tuple[tuple[str, str], ...]:
    facts = []
    if run is not None:
        facts.append(("state", f"{run.state}, started {run.started}, start {len(run.attempts)}"))
        if run.urls:
            facts.append(("at", ", ".join(run.urls)))
        facts += [("defaults", words) for words in run.defaults]
    if now is not None:
        facts.append(
            ("queue", f"{now.waiting:,} {plural(now.waiting, 'request')} waiting for room")
        )
        facts.append(("answered", f"{now.requests:,} since the gateway opened"))
        if now.failures:
            facts.append(("failed", f"{now.failures:,} that an engine did not finish"))
        if now.suspects or now.convicted or now.clients_refused:
            facts.append(("deaths", _deaths(now)))
    return tuple(facts)


def _deaths(now: LiveServer) -> str:
    """What became of requests that engines died of, and of those who sent them."""
    requests, clients = plural(now.convicted, "request"), plural(now.clients_refused, "client")
    return (
        f"{now.suspects:,} suspected, {now.convicted:,} {requests} and "
        f"{now.clients_refused:,} {clients} refused"
    )


def _engines(now: LiveServer, before: tuple[LiveServer, float] | None) -> Table:
    numbers = ("at it", "units", "running", "KV used", "prompt tok/s", "output tok/s")
    earlier = {one.index: one for one in before[0].engines} if before else {}
    seconds = before[1] if before else 0.0
    rows = (_row(one, earlier.get(one.index), seconds) for one in now.engines)
    return table(("engine", "up", *numbers), rows, right=numbers)


def _row(one: LiveEngine, before: LiveEngine | None, seconds: float) -> tuple[str, ...]:
    return (
        str(one.index),
        "yes" if one.up else "no",
        str(one.in_flight),
        f"{one.units:,}",
        _NONE if one.running is None else str(one.running),
        _NONE if one.cache_used is None else f"{one.cache_used:.0%}",
        _rate(one.prompt_tokens, before.prompt_tokens if before else None, seconds),
        _rate(one.generated_tokens, before.generated_tokens if before else None, seconds),
    )


def _rate(now: float | None, before: float | None, seconds: float) -> str:
    """Tokens a second between two looks; an engine that was started again begins from 0."""
    if now is None or before is None or seconds <= 0:
        return _NONE
    return f"{(now - before if now >= before else now) / seconds:,.0f}"


def _memory(plan: Plan, used: Mapping[int, int]) -> list[Block]:
    """The forecast as a bar; what is in use now beside it, where NVML tells."""
    blocks: list[Block] = [Heading("Memory against the forecast")]
    ledgers = [(f"GPU {one.index}", one) for one in plan.gpus] if used else fold(plan.gpus)
    for title, ledger in ledgers:
        usage = _usage(ledger, used.get(ledger.index))
        blocks.append(memory_bar(ledger, f"{title}: {usage}"))
    return blocks


def _usage(ledger: GpuLedger, used: int | None) -> str:
    forecast = (
        f"forecast {format_bytes(ledger.steady)} at rest, {format_bytes(ledger.most)} at most"
    )
    if used is None:
        return forecast
    over = used - ledger.most
    more = f", {format_bytes(over)} over" if over > 0 else ""
    return f"{format_bytes(used)} in use now{more}; {forecast}"


def _held_back(now: LiveServer) -> list[Block]:
    blocks: list[Block] = []
    for title, found in (("Lowered to the plan", now.limited), ("Refused", now.refused)):
        if found:
            most = sorted(found.items(), key=lambda item: -item[1])
            items = tuple(f"{count:,} x {what}" for what, count in most[:_EVENTS])
            blocks += [Heading(title), Items(items)]
    return blocks
