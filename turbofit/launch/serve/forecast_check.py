"""Forecast beside actual, once an engine is ready: its own figures, and the GPU's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from turbofit.core.run_report import RunFigure
from turbofit.core.units import mib
from turbofit.memory.account import POOL_WARMUP
from turbofit.observe.forecast import cache_beside, tokens_beside

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from turbofit.core.plan import Kv, Plan
    from turbofit.launch.engine.supervised_engine import SupervisedEngine

__all__ = ["as_launched", "beside", "lines"]


def beside(plan: Plan, engine: SupervisedEngine, held: Mapping[int, int]) -> list[RunFigure]:
    """Figures of one engine.

    Args:
        plan: the forecast.
        engine: ready.
        held: bytes in use on each GPU now, by the machine's index: NVML's, or the pretend card's.
    """
    rows: list[RunFigure] = []
    tracker = engine.tracker
    if tracker.budget is not None:
        rows += [
            _row(one.what, one.forecast, one.actual) for one in cache_beside(plan, tracker.budget)
        ]
        if tracker.slab is not None:
            one = tokens_beside(plan, tracker.budget, tracker.slab)
            rows.append(replace(_row(one.what, one.forecast, one.actual), unit="tokens"))
    if engine.timeline is not None:
        rows += _pretend_rows(plan, engine)
        return rows
    for index in plan.parallel.groups[engine.group]:
        ledger = next(gpu for gpu in plan.gpus if gpu.index == index)
        if index in held:
            # The pool keeps its high-water mark, so that after the check it stands at the peak.
            rows.append(_row("in use after the check", ledger.peak, held[index], gpu=index))
    return rows


def as_launched(plan: Plan, cached: Mapping[int, int | None]) -> Plan:
    """The plan with the KV tokens that its engines have, where that is less than planned.

    The gateway lets requests reserve no more. Under: an engine that is started again may have less.

    Args:
        plan: the forecast.
        cached: tokens by an engine's group, as it says; None where it does not.
    """

    def of(kv: Kv, groups: Iterable[int]) -> Kv:
        known = [tokens for group in groups if (tokens := cached.get(group)) is not None]
        return replace(kv, tokens=min([kv.tokens, *known]))

    parts = tuple(
        replace(part, kv=of(part.kv, [group])) for group, part in enumerate(plan.by_group)
    )
    return replace(plan, kv=of(plan.kv, cached), by_group=parts)


def lines(rows: Sequence[RunFigure]) -> list[str]:
    """The rows for people."""
    return [_line(row) for row in rows]


def _pretend_rows(plan: Plan, engine: SupervisedEngine) -> list[RunFigure]:
    from turbofit.launch.engine.pretended import PretendReaders

    rows = []
    for seen in PretendReaders(plan).seen(engine.group, engine.timeline):
        ledger = next(gpu for gpu in plan.gpus if gpu.index == seen.gpu)
        pools = [t.bytes for t in ledger.ledger if t.phase == "transient"]
        pools += [t.bytes for t in ledger.ledger if t.term == POOL_WARMUP]
        most = max(pools, default=0)
        if seen.pool is not None:
            rows.append(_row("executor pool at most", most, seen.pool, gpu=seen.gpu))
        rows.append(_row("in use at most", ledger.most, seen.peak, gpu=seen.gpu))
    return rows


def _row(what: str, forecast: int, actual: int, gpu: int | None = None) -> RunFigure:
    return RunFigure(what=what, forecast=forecast, actual=actual, gpu=gpu)


def _line(row: RunFigure) -> str:
    where = "" if row.gpu is None else f"GPU {row.gpu}: "
    if row.unit == "tokens":
        return f"{where}{row.what}: {row.actual:,} (forecast {row.forecast:,})"
    over = row.actual - row.forecast
    said = "unaccounted" if over > 0 else "less than forecast"
    return (
        f"{where}{row.what}: {mib(row.actual)} MiB (forecast {mib(row.forecast)}; "
        f"{mib(abs(over))} {said})"
    )
