"""The views of a plan's rehearsal and run, compared with its forecast, and of running servers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.core.memory_stack import equal_ledgers
from turbofit.core.messages import indices
from turbofit.core.plan import alike
from turbofit.core.struct import Struct
from turbofit.core.units import MIB, format_bytes, mib
from turbofit.report.painters.document import (
    PRETENDED,
    Heading,
    Paragraph,
    known_facts,
    listed,
    table,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from turbofit.core.plan import EnginePlan, GpuLedger, Plan
    from turbofit.core.run_report import RunReport
    from turbofit.core.struct import Document
    from turbofit.report.painters.document import Block, Tone

#: The number of events that are shown.
_EVENTS: Final = 10
#: The phases of a rehearsal that belong to loading, before the cache is allocated.
_LOADING: Final = ("import", "context", "weights", "prepare", "engine", "build", "load", "sizing")
#: The first words of the names of figures that are bytes in use. Of several GPUs the largest such
#: figure is the worst. Of any other figure the smallest value is the worst.
_IN_USE: Final = "in use"
#: The only figure that is not in bytes.
_TOKENS: Final = "KV tokens"
_FREE: Final = "free when the cache was sized, least of the group"


def rehearsal_and_run_blocks(plan: Plan, run: RunReport | None) -> list[Block]:
    """Return the rehearsal and the run, each compared with the forecast."""
    return [*_rehearsal(plan), *(_run(run) if run else []), *_sides(plan, run)]


def _rehearsal(plan: Plan) -> list[Block]:
    """Return how the rehearsal on pretend GPUs ended, once for each set of equal engines."""
    rehearsal = plan.rehearsal
    if rehearsal is None:
        return []
    blocks: list[Block] = [Heading("Rehearsal")]
    sets = alike(plan.engines)
    for numbers in sets:
        engine = plan.engines[numbers[0]]
        group_rehearsal = engine.rehearsal
        if group_rehearsal is None:
            continue
        where = f"GPU {indices(engine.gpus)}: " if len(sets) > 1 else ""
        text = (
            f"{where}{group_rehearsal.outcome} in {group_rehearsal.seconds:.1f} s with LMDeploy"
            f" {group_rehearsal.engine_version} {PRETENDED}"
        )
        tone: Tone = "good" if group_rehearsal.outcome == "served" else "bad"
        blocks.append(Paragraph(text, tone=tone))
        if (death := group_rehearsal.death) is not None:
            text = f"the engine ended in phase {death.phase}, at {death.where}"
            if death.asked is not None and death.left is not None:
                text += f": {format_bytes(death.asked)} asked, {format_bytes(death.left)} left"
            blocks.append(Paragraph(text, tone="bad"))
    title = "Not measured by the rehearsal, taken from the forecast"
    return [*blocks, *listed(title, rehearsal.not_known, "dim", level=3)]


def _run(run: RunReport) -> list[Block]:
    """Return the state of a run, the ends of its starts, and its last events."""
    ended = run.ended
    message = ended.get("message", "") if isinstance(ended, dict) else (ended or "")
    state = f"{run.state} ({message})" if message else run.state
    facts = {"state": state, "started": run.started, "LMDeploy": run.lmdeploy}
    if last := run.last:
        why = f", the last: {last.why}" if last.why else ""
        facts |= {"starts": f"{len(run.attempts)}{why}", "restarts": str(last.restarts)}
        if last.memory_back is not None:
            facts["memory"] = "came back" if last.memory_back else "did not all come back"
    blocks: list[Block] = [Heading("Run"), known_facts(facts)]
    if run.pretend:
        blocks.append(Paragraph(PRETENDED, tone="warn"))
    for attempt in run.attempts:
        if attempt.ended:
            text = f"start {attempt.number} ended: {attempt.ended.get('message', '')}"
            blocks.append(Paragraph(text, tone="bad"))
    events = (f"{event.at} {event.kind}: {event.text}" for event in run.events[-_EVENTS:])
    return [*blocks, *listed("Last events", events, level=3)]


def _sides(plan: Plan, run: RunReport | None) -> list[Block]:
    """Return tables of forecast, rehearsed and measured figures, for each set of equal GPUs."""
    blocks: list[Block] = []
    for title, rows in sides(plan, run):
        names = ["forecast"]
        names += [
            name
            for name in ("rehearsed", "measured")
            if any(getattr(row, name) is not None for row in rows)
        ]
        pretend = run is not None and run.pretend
        titles = ["pretend run" if name == "measured" and pretend else name for name in names]
        numbers = (*titles, "over the forecast")
        cells = (
            (
                f"{row.what} (number)" if row.what == _TOKENS else row.what,
                *(_figure(row, getattr(row, name)) for name in names),
                _over(row),
            )
            for row in rows
        )
        rehearsed = ", rehearsed" if len(titles) > 2 else ""
        text = f"Forecast{rehearsed} and {titles[-1]} on {title}"
        facts = table(("in MiB", *numbers), cells, right=numbers, wrap=("in MiB",))
        blocks += [Heading(text), facts]
    return blocks


def _figure(row: _Side, value: int | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if row.what == _TOKENS else mib(value)


def _over(row: _Side) -> str:
    """Return the measured (or rehearsed) figure minus the forecast, as a text with its sign."""
    actual = row.measured if row.measured is not None else row.rehearsed
    if actual is None or row.forecast is None:
        return "-"
    over = actual - row.forecast
    return f"{over:+,}" if row.what == _TOKENS else f"{over / MIB:+,.1f}"


class _Side(Struct):
    """One figure as forecast, rehearsed and measured, in bytes or tokens; None if unknown."""

    what: str
    forecast: int | None = None
    rehearsed: int | None = None
    measured: int | None = None


def sides(plan: Plan, run: RunReport | None = None) -> list[tuple[str, tuple[_Side, ...]]]:
    """Return for each set of equal GPUs a title and its figures.

    The rehearsed and the measured figure of a set are the worst GPU's. Sets without rehearsed or
    measured figures are left out.
    """
    sets = []
    ledgers = {ledger.index: ledger for ledger in plan.ledgers}
    for members, first in equal_ledgers(plan.ledgers):
        equal = [ledgers[index] for index in members]
        rehearsed = [_rehearsed(plan, ledger.index) for ledger in equal]
        measured = [_actual(plan, run, ledger) for ledger in equal]
        forecast = _forecast(plan, plan.engines[_group(plan, first.index)], first)
        rows = [
            _Side(
                what=what,
                forecast=value,
                rehearsed=_worst(what, rehearsed),
                measured=_worst(what, measured),
            )
            for what, value in forecast.items()
        ]
        rows += _terms(equal)
        shown = tuple(row for row in rows if row.rehearsed is not None or row.measured is not None)
        if shown:
            compared = measured if any(row.measured is not None for row in shown) else rehearsed
            worst = ", the worst of them" if sum(map(bool, compared)) > 1 else ""
            sets.append((f"GPU {indices(members)}{worst}", shown))
    return sets


def _worst(what: str, figures: Sequence[dict[str, int | None]]) -> int | None:
    values = [value for of_gpu in figures if (value := of_gpu.get(what)) is not None]
    return (max if what.startswith(_IN_USE) else min)(values, default=None)


def _terms(ledgers: Sequence[GpuLedger]) -> Iterable[_Side]:
    """Yield the rehearsed terms of equal GPUs, each with the largest rehearsed bytes."""
    for terms in zip(*(ledger.terms for ledger in ledgers), strict=True):
        rehearsed = [term.rehearsed for term in terms if term.rehearsed is not None]
        first = terms[0]
        if rehearsed and first.term != "kv_cache":
            yield _Side(what=first.term, forecast=first.bytes, rehearsed=max(rehearsed))


def _forecast(plan: Plan, engine: EnginePlan, ledger: GpuLedger) -> dict[str, int | None]:
    return {
        "in use while loading, at most": ledger.load_peak,
        _FREE: None if plan.backend.on_torch else ledger.free_for_cache,
        "KV cache": ledger.bytes_of("kv_cache") or None,
        _TOKENS: engine.kv.tokens,
        "in use at rest": ledger.steady,
        "in use in the worst case": ledger.peak,
        "in use at most, loading included": ledger.most,
    }


def _rehearsed(plan: Plan, index: int) -> dict[str, int | None]:
    """Return the rehearsed figures of a GPU; empty if its group was not rehearsed."""
    group = _group(plan, index)
    rehearsal = plan.engines[group].rehearsal
    # Only the first of several equal engines is rehearsed.
    if rehearsal is None or all(numbers[0] != group for numbers in alike(plan.engines)):
        return {}
    place, cache = plan.groups[group].index(index), rehearsal.cache
    timeline, served = rehearsal.timeline, rehearsal.outcome == "served"
    loading = [moment.peak[place] for moment in timeline if moment.phase in _LOADING]
    cases = [
        moment.peak[place] for moment in timeline if served and moment.phase.startswith("case ")
    ]
    ready = (moment.end[place] for moment in timeline if moment.phase == "ready")
    figures = {
        "in use while loading, at most": max(loading, default=None),
        "in use at rest": next(ready, None),
        "in use in the worst case": max(cases, default=None),
    }
    figures[_FREE] = min((size for size in cache.free if size is not None), default=None)
    figures |= {"KV cache": cache.region[place], _TOKENS: cache.tokens}
    return figures


def _actual(plan: Plan, run: RunReport | None, ledger: GpuLedger) -> dict[str, int | None]:
    """Return the figures that a run measured of a GPU or of its group."""
    groups = plan.groups
    figures: dict[str, int] = {}
    for group, row in run.rows if run is not None else ():
        of_group = 0 <= group < len(groups) and ledger.index in groups[group]
        if of_group and row.gpu in (None, ledger.index):
            figures.setdefault(row.what, row.actual)
    # A run on pretend GPUs measures one peak for its whole time. If the forecast has its highest
    # use after loading, this peak stands for the worst case.
    highest = figures.get("in use at most")
    worst = highest if ledger.most == ledger.peak else None
    return {
        _FREE: figures.get("free when the cache was sized"),
        "KV cache": figures.get("KV cache"),
        _TOKENS: figures.get(_TOKENS),
        "in use in the worst case": figures.get("in use after the check", worst),
        "in use at most, loading included": highest if worst is None else None,
    }


def _group(plan: Plan, index: int) -> int:
    """Return the number of a GPU's group; 0 for a GPU without a group."""
    members = enumerate(plan.groups)
    return next((number for number, group in members if index in group), 0)


def _state(server: Document) -> str:
    """Return the state of a run in words; a run of another command than `serve` is no server."""
    notes = [] if server["command"] == "serve" else [f"no server: {server['command']}"]
    notes += ["pretend"] if server["pretend"] else []
    return f"{server['state']} ({', '.join(notes)})" if notes else str(server["state"])


def servers_view(document: Document) -> list[Block]:
    """Return the servers of `turbofit ps`, one per line."""
    if not document["servers"]:
        return [Paragraph("no server of this user runs here")]
    rows = (
        (
            server["run"],
            server["model"],
            _state(server),
            str(server["pid"]),
            " ".join(server["urls"]),
        )
        for server in document["servers"]
    )
    titles = ("run", "model", "state", "pid", "address")
    # A terminal has no column for the model: the name of a run begins with the model's name.
    return [table(titles, rows, right=("pid",), wrap=("state", "address"), aside=("model",))]
