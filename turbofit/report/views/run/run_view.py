"""A run of `serve` as a document: how it went, each attempt, and what it measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from turbofit.core.units import MIB, mib
from turbofit.report.painters.document import Column, FactList, Heading, Items, Paragraph, Table
from turbofit.report.views.run.forecast_vs_actual import sides

if TYPE_CHECKING:
    from turbofit.core.plan import Plan
    from turbofit.core.run_report import RunAttempt, RunReport
    from turbofit.report.painters.document import Block
    from turbofit.report.views.run.forecast_vs_actual import ForecastSide

__all__ = ["run_blocks", "sides_blocks"]

_EVENTS = 10
#: What a run on pretend GPUs shows is not measured.
_PRETEND = "pretend run"


def run_blocks(plan: Plan, run: RunReport) -> list[Block]:
    """How the run of the plan went."""
    blocks: list[Block] = [Heading(text="Run"), FactList(facts=_facts(run))]
    if run.pretend:
        text = "on pretend GPUs: memory is the engine's own, words and speed are not real"
        blocks.append(Paragraph(text=text, tone="warn"))
    for attempt in run.attempts:
        if attempt.ended:
            text = f"start {attempt.number} ended: {attempt.ended.get('message', '')}"
            blocks.append(Paragraph(text=text, tone="bad"))
    blocks += _moments(plan, run.last)
    if run.events:
        items = tuple(f"{one.at} {one.kind}: {one.text}" for one in run.events[-_EVENTS:])
        blocks += [Heading(text="Last events"), Items(items=items)]
    return blocks


def sides_blocks(plan: Plan, run: RunReport | None = None) -> list[Block]:
    """Forecast, rehearsed and measured, a table for each set of equal GPUs."""
    blocks: list[Block] = []
    for title, rows in sides(plan, run):
        measured = any(row.measured is not None for row in rows)
        rehearsed = any(row.rehearsed is not None for row in rows)
        names = ["forecast"] + ["rehearsed"] * rehearsed + ["measured"] * measured
        titles = [
            _PRETEND if name == "measured" and run and run.pretend else name for name in names
        ]
        columns = (
            Column(title="in MiB", wrap=True),
            *(Column(title=name, right=True) for name in titles),
            Column(title="over the forecast", right=True),
        )
        cells = tuple((_what(row), *_cells(row, names), _over(row)) for row in rows)
        heading = f"{', '.join(titles[:-1])} and {titles[-1]}"
        text = f"{heading[0].upper()}{heading[1:]} on {title}"
        blocks += [Heading(text=text), Table(columns=columns, rows=cells)]
    return blocks


def _facts(run: RunReport) -> tuple[tuple[str, str], ...]:
    ended = run.ended
    message = ended.get("message", "") if isinstance(ended, dict) else (ended or "")
    state = f"{run.state} ({message})" if message else run.state
    facts = [("state", state), ("started", run.started), ("LMDeploy", run.lmdeploy)]
    starts = len(run.attempts)
    last = run.last
    if last is not None:
        why = f", the last: {last.why}" if last.why else ""
        facts.append(("starts", f"{starts}{why}"))
        facts.append(("restarts", str(last.restarts)))
        if last.memory_back is not None:
            back = "came back" if last.memory_back else "did not all come back"
            facts.append(("memory", back))
    return tuple(facts)


def _moments(plan: Plan, attempt: RunAttempt | None) -> list[Block]:
    if attempt is None or not attempt.moments:
        return []
    gpus = [str(gpu.index) for gpu in plan.gpus]
    seen = [index for index in gpus if any(index in one.used for one in attempt.moments)]
    columns: tuple[Column, ...] = (
        Column(title="phase", wrap=True),
        Column(title="after s", right=True),
        *(Column(title=f"GPU {index} MiB", right=True) for index in seen),
    )
    rows = tuple(
        (one.phase, f"{one.at:,.1f}", *(_size(one.used.get(index)) for index in seen))
        for one in attempt.moments
    )
    return [Heading(text="Phases of the last start"), Table(columns=columns, rows=rows)]


def _size(value: int | None) -> str:
    return "-" if value is None else mib(value)


def _what(row: ForecastSide) -> str:
    return f"{row.what} (number)" if row.unit == "tokens" else row.what


def _cells(row: ForecastSide, names: list[str]) -> list[str]:
    return [_figure(row, getattr(row, name)) for name in names]


def _figure(row: ForecastSide, value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if row.unit == "tokens" else mib(value)


def _over(row: ForecastSide) -> str:
    """What was seen above the forecast; below it with a minus."""
    seen = row.measured if row.measured is not None else row.rehearsed
    if seen is None or row.forecast is None:
        return "-"
    over = seen - row.forecast
    if row.unit == "tokens":
        return f"{over:+,}"
    return f"{over / MIB:+,.1f}"
