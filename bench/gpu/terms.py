"""What a trial says of the terms that no rehearsal sees, before the cache and after it.

A row's ``over`` is forecast minus measured, of all that is in use up to its phase. What was taken
before the cache changes the cache's size, which is taken out here again; so each figure is of its
own terms, in bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.gpu.results import Trial

#: Terms of the ledger that exist on a real card only.
BEFORE = ("cuda_context", "cublas", "torch_kernels", "communicator")
AFTER = ("kernel_modules", "pool_growth")


def _rows(trial: Trial) -> dict[str, dict[str, Any]]:
    """Of the one GPU; nothing of several, since one of them alone tells some phases."""
    rows = trial.phases
    return {} if len({row["gpu"] for row in rows}) > 1 else {row["phase"]: row for row in rows}


def charged(trial: Trial, names: tuple[str, ...]) -> dict[str, int]:
    """Bytes that are estimates of the plan, by term."""
    ledger = trial.plan.gpus[0].ledger
    return {t.term: t.bytes for t in ledger if t.term in names and t.basis == "estimate"}


def before_cache(trial: Trial) -> int | None:
    """What context, cuBLAS and kernels took, where the engine's log tells what was free then."""
    row = _rows(trial).get("context and weights")
    return None if row is None else sum(charged(trial, BEFORE).values()) - int(row["over"])


def after_cache(trial: Trial) -> int | None:
    """What kernels and holes in pools took after the cache was sized, in the worst case."""
    rows = _rows(trial)
    if not {"context and weights", "cache", "steady"} <= set(rows):
        return None
    *_, last = rows.values()
    over = last["over"] - rows["context and weights"]["over"] - rows["cache"]["over"]
    return sum(charged(trial, AFTER).values()) - int(over)


def sums(trial: Trial) -> Iterator[tuple[str, int, int]]:
    """Terms that a trial shows together: charged and measured bytes; and the cache.

    Of the cache: what the formula gives of the memory that was free, and what there was.
    """
    for when, measured, terms in (
        ("before", before_cache(trial), BEFORE),
        ("after", after_cache(trial), AFTER),
    ):
        if measured is not None:
            found = charged(trial, terms)
            yield f"{when} the cache: {' + '.join(found)}", sum(found.values()), measured
    ratio = trial.plan.settings.cache_max_entry_count
    for seen in trial.document.seen[:1]:
        if seen.free is not None and seen.region is not None:
            what = f"kv_cache: {ratio:.3f} of what was free"
            yield what, int(ratio * seen.free), seen.region


def cases(trial: Trial) -> Iterator[tuple[str, int, int]]:
    """What each worst case took above the state before it: name, forecast and measured growth."""
    rows = _rows(trial)
    base = rows.get("kernels") or rows.get("steady")
    for name, row in rows.items():
        if base is None or name in ("context and weights", "cache", "steady", "kernels"):
            continue
        grown = row["forecast"] - base["forecast"], row["measured"] - base["measured"]
        if any(grown):
            yield name, *grown
        base = row
