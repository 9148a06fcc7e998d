"""Forecast, rehearsed and measured side by side: the figures that at least two of them have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from msgspec.structs import replace

from turbofit.core.messages import indices
from turbofit.core.struct import Struct
from turbofit.report.views.plan.memory_view import fold_indices

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from turbofit.core.plan import GpuLedger, Plan
    from turbofit.core.run_report import RunReport

__all__ = ["ForecastSide", "sides"]

#: Phases of a rehearsal that belong to loading: what comes before the cache is allocated.
_LOADING: Final = ("import", "context", "weights", "prepare", "engine", "build", "load", "sizing")
#: Of these figures more is worse; of the others less.
_IN_USE: Final = "in use"
#: Nobody sets a smaller ratio.
_LEAST: Final = 1e-6


class ForecastSide(Struct):
    """One figure, in bytes or tokens; None where nobody told it."""

    what: str
    forecast: int | None = None
    rehearsed: int | None = None
    measured: int | None = None
    unit: Literal["bytes", "tokens"] = "bytes"


def sides(plan: Plan, run: RunReport | None = None) -> list[tuple[str, tuple[ForecastSide, ...]]]:
    """The figures of each set of equal GPUs, under its title; sets without any are left out.

    Of what was rehearsed or measured on a set the worst stands for it: the least that was free, the
    most that was in use or that a term took. A rehearsal knows the first group's only; where groups
    have settings of their own, each one's.
    """
    found = []
    ledgers = {ledger.index: ledger for ledger in plan.gpus}
    for members, _ in fold_indices(plan.gpus):
        equal = [ledgers[index] for index in members]
        each = [_of_gpu(plan, ledger, run) for ledger in equal]
        rows = [*map(_worst, zip(*each, strict=True)), *_terms(equal)]
        told = tuple(row for row in rows if row.rehearsed is not None or row.measured is not None)
        if told:
            worst = ", the worst of them" if _several(plan, members, told) else ""
            found.append((f"GPU {indices(members)}{worst}", told))
    return found


def _several(plan: Plan, members: Sequence[int], rows: Iterable[ForecastSide]) -> bool:
    """Whether figures of more than one GPU of a set may be known."""
    if any(row.measured is not None for row in rows):
        return len(members) > 1
    return sum(_place(plan, _group(plan, index), index) is not None for index in members) > 1


def _of_gpu(plan: Plan, ledger: GpuLedger, run: RunReport | None) -> list[ForecastSide]:
    group = _group(plan, ledger.index)
    return _whole(plan.of_group(group), group, ledger, run)


def _worst(rows: Sequence[ForecastSide]) -> ForecastSide:
    """One figure of equal GPUs: the forecast, with the worst that was rehearsed and measured."""
    worst = max if rows[0].what.startswith(_IN_USE) else min
    rehearsed = [row.rehearsed for row in rows if row.rehearsed is not None]
    measured = [row.measured for row in rows if row.measured is not None]
    return replace(
        rows[0],
        rehearsed=worst(rehearsed, default=None),
        measured=worst(measured, default=None),
    )


def _terms(ledgers: Sequence[GpuLedger]) -> Iterable[ForecastSide]:
    """The terms of equal GPUs that a rehearsal told, each with the most of it on any of them."""
    for terms in zip(*(ledger.ledger for ledger in ledgers), strict=True):
        seen = [term.rehearsed for term in terms if term.rehearsed is not None]
        first = terms[0]
        if seen and first.term != "kv_cache":
            yield ForecastSide(what=first.term, forecast=first.bytes, rehearsed=max(seen))


class _Rehearsed(NamedTuple):
    """What a rehearsal showed of one GPU, in bytes and KV tokens; None where it did not."""

    loading: int | None = None
    free: int | None = None
    region: int | None = None
    tokens: int | None = None
    ready: int | None = None
    worst_case: int | None = None


def _rehearsed(plan: Plan, place: int | None) -> _Rehearsed:
    """The figures of the GPU at a place in its group; none where that was not rehearsed."""
    rehearsal = plan.rehearsal
    if rehearsal is None or place is None:
        return _Rehearsed()
    timeline, cache = rehearsal.timeline, rehearsal.cache
    loading = [one.peak[place] for one in timeline if one.phase in _LOADING]
    served = rehearsal.outcome == "served"
    cases = [one.peak[place] for one in timeline if served and one.phase.startswith("case ")]
    free = [one for one in cache.free if one is not None] if cache else []
    return _Rehearsed(
        loading=max(loading, default=None),
        free=min(free, default=None),
        region=cache.region[place] if cache else None,
        tokens=cache.tokens if cache else None,
        ready=next((one.end[place] for one in timeline if one.phase == "ready"), None),
        worst_case=max(cases, default=None),
    )


def _whole(plan: Plan, group: int, ledger: GpuLedger, run: RunReport | None) -> list[ForecastSide]:
    """Loading, rest and peak of a GPU; the cache of its group, whose plan this is."""
    rehearsed = _rehearsed(plan, _place(plan, group, ledger.index))
    return [
        ForecastSide(
            what="in use while loading, at most",
            forecast=ledger.load_peak,
            rehearsed=rehearsed.loading,
        ),
        *_cache(plan, ledger, rehearsed, run),
        ForecastSide(what="in use at rest", forecast=ledger.steady, rehearsed=rehearsed.ready),
        *_peaks(plan, ledger, rehearsed, run),
    ]


def _cache(
    plan: Plan, ledger: GpuLedger, rehearsed: _Rehearsed, run: RunReport | None
) -> Iterator[ForecastSide]:
    """The free memory of which the cache is a share, and the cache itself."""
    ratio = plan.settings.cache_max_entry_count
    cache = next((term.bytes for term in ledger.ledger if term.term == "kv_cache"), None)
    yield ForecastSide(
        what="free when the cache was sized, least of the group",
        forecast=round(cache / ratio) if cache and ratio > _LEAST and _sized(plan) else None,
        rehearsed=rehearsed.free,
        measured=_actual(plan, run, ledger, "free when the cache was sized"),
    )
    yield ForecastSide(
        what="KV cache",
        forecast=cache,
        rehearsed=rehearsed.region,
        measured=_actual(plan, run, ledger, "KV cache"),
    )
    yield ForecastSide(
        what="KV tokens",
        forecast=plan.kv.tokens,
        rehearsed=rehearsed.tokens,
        measured=_actual(plan, run, ledger, "KV tokens"),
        unit="tokens",
    )


def _peaks(
    plan: Plan, ledger: GpuLedger, rehearsed: _Rehearsed, run: RunReport | None
) -> Iterator[ForecastSide]:
    """The most that is in use: in the worst case, and in the engine's whole life."""
    # A pretend run tells the most of its whole life, which may be while it loads.
    highest = _actual(plan, run, ledger, "in use at most")
    worst = highest if ledger.most == ledger.peak else None
    after = _actual(plan, run, ledger, "in use after the check")
    yield ForecastSide(
        what="in use in the worst case",
        forecast=ledger.peak,
        rehearsed=rehearsed.worst_case,
        measured=worst if after is None else after,
    )
    yield ForecastSide(
        what="in use at most, loading included",
        forecast=ledger.most,
        measured=highest if worst is None else None,
    )


def _sized(plan: Plan) -> bool:
    """Whether the cache is a share of what is free."""
    return not plan.engine.on_torch


def _group(plan: Plan, index: int) -> int:
    """The number of the group that a GPU belongs to; 0 where it is in none."""
    members = enumerate(plan.parallel.groups)
    return next((number for number, group in members if index in group), 0)


def _place(plan: Plan, group: int, index: int) -> int | None:
    """Where a GPU stands in its group, if that was rehearsed; else only the first one was."""
    members = plan.parallel.groups[group] if plan.parallel.groups else ()
    rehearsed = group == 0 or bool(plan.by_group)
    return members.index(index) if rehearsed and index in members else None


def _actual(plan: Plan, run: RunReport | None, ledger: GpuLedger, *names: str) -> int | None:
    """What a run showed of a GPU, or of the group that it belongs to."""
    if run is None:
        return None
    for group, row in run.rows:
        of_gpu = ledger.index == row.gpu if row.gpu is not None else True
        groups = plan.parallel.groups
        of_group = 0 <= group < len(groups) and ledger.index in groups[group]
        if row.what in names and of_gpu and of_group:
            return row.actual
    return None
