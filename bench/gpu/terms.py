"""Computes from a trial the terms that no rehearsal sees, before the cache and after it.

A row's ``over`` is forecast minus measured, of all bytes in use up to its phase. Memory taken
before the cache changes the cache's size; this is subtracted here, so that each figure is of its
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
    """Return a trial's phases on one GPU; none of several, since some are read of one only."""
    rows = trial.phases
    return {} if len({row["gpu"] for row in rows}) > 1 else {row["phase"]: row for row in rows}


def charged(trial: Trial, names: tuple[str, ...]) -> dict[str, int]:
    """Return the bytes of the named terms that the plan estimates."""
    ledger = trial.plan.ledgers[0].terms
    return {t.term: t.bytes for t in ledger if t.term in names and t.basis == "estimate"}


def before_cache(trial: Trial) -> int | None:
    """Return the bytes of context, cuBLAS and kernels; None if the free memory is unknown."""
    row = _rows(trial).get("context and weights")
    return None if row is None else sum(charged(trial, BEFORE).values()) - int(row["over"])


def after_cache(trial: Trial) -> int | None:
    """Return the bytes of kernels and holes in pools after the cache was sized, or None."""
    rows = _rows(trial)
    if not {"context and weights", "cache", "steady"} <= set(rows):
        return None
    *_, last = rows.values()
    over = last["over"] - rows["context and weights"]["over"] - rows["cache"]["over"]
    return sum(charged(trial, AFTER).values()) - int(over)


def sums(trial: Trial) -> Iterator[tuple[str, int, int]]:
    """Yield the charged and measured bytes of terms that a trial shows together, and of the cache.

    Of the cache: its bytes by the formula from the memory that was free, and its real bytes.
    """
    for when, measured, terms in (
        ("before", before_cache(trial), BEFORE),
        ("after", after_cache(trial), AFTER),
    ):
        if measured is not None:
            found = charged(trial, terms)
            yield f"{when} the cache: {' + '.join(found)}", sum(found.values()), measured
    ratio = trial.plan.engines[0].settings.cache_max_entry_count
    for seen in trial.document.seen[:1]:
        if seen.free is not None and seen.region is not None:
            yield f"kv_cache: {ratio:.3f} of what was free", int(ratio * seen.free), seen.region


def cases(trial: Trial) -> Iterator[tuple[str, int, int]]:
    """Yield each worst case with its forecast and measured growth over the state before it."""
    rows = _rows(trial)
    base = rows.get("kernels") or rows.get("steady")
    for name, row in rows.items():
        if base is None or name in ("context and weights", "cache", "steady", "kernels"):
            continue
        grown = row["forecast"] - base["forecast"], row["measured"] - base["measured"]
        if any(grown):
            yield name, *grown
        base = row
