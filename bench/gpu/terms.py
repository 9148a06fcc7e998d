"""What a trial says of the terms that no rehearsal sees, before the cache and after it.

A row's ``over`` is forecast minus measured, of all that is in use up to its phase. What was taken
before the cache changes the cache's size, which is taken out here again; so each figure is of its
own terms, in bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from turbofit.core.plan import GpuLedger, Plan

#: Terms of the ledger that exist on a real card only.
BEFORE = ("cuda_context", "cublas", "torch_kernels", "communicator")
AFTER = ("kernel_modules", "pool_growth")


def _rows(document: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Of the one GPU; nothing of several, since one of them alone tells some phases."""
    rows = document.get("phases", [])
    return {} if len({row["gpu"] for row in rows}) > 1 else {row["phase"]: row for row in rows}


def _estimated(ledger: GpuLedger, names: tuple[str, ...]) -> int:
    return sum(t.bytes for t in ledger.ledger if t.term in names and t.basis == "estimate")


def before_cache(plan: Plan, document: Mapping[str, Any]) -> int | None:
    """What context, cuBLAS and kernels took, where the engine's log tells what was free then."""
    row = _rows(document).get("context and weights")
    return None if row is None else _estimated(plan.gpus[0], BEFORE) - int(row["over"])


def after_cache(plan: Plan, document: Mapping[str, Any]) -> int | None:
    """What kernels and holes in pools took after the cache was sized, in the worst case."""
    rows = _rows(document)
    if not {"context and weights", "cache", "steady"} <= set(rows):
        return None
    *_, last = rows.values()
    over = last["over"] - rows["context and weights"]["over"] - rows["cache"]["over"]
    return _estimated(plan.gpus[0], AFTER) - int(over)


def cache_of(plan: Plan, document: Mapping[str, Any]) -> tuple[int, int] | None:
    """The cache that the formula gives of the memory that was free, and the one that there was."""
    seen = next(iter(document.get("seen", [])), None)
    if seen is None or seen["free"] is None or seen["region"] is None:
        return None
    return int(plan.settings.cache_max_entry_count * seen["free"]), int(seen["region"])


def cases(document: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """What each worst case took above the state before it: name, forecast and measured growth."""
    rows, found = _rows(document), []
    base = rows.get("kernels") or rows.get("steady")
    for name, row in rows.items():
        if base is None or name in ("context and weights", "cache", "steady", "kernels"):
            continue
        grown = row["forecast"] - base["forecast"], row["measured"] - base["measured"]
        if any(grown):
            found.append((name, *grown))
        base = row
    return found
