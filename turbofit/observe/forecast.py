"""The plan's figures beside the engine's own, as soon as its log tells them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.core.run_report import RunFigure
from turbofit.core.units import MIB, mib

if TYPE_CHECKING:
    from turbofit.core.plan import GpuLedger, Plan
    from turbofit.observe.log_events import CacheBudget, Slab

#: Phases whose terms are there when the cache is sized.
BEFORE_CACHE: Final = ("before", "context", "weights")
#: The cache's region is handed out in pages of this size, aligned to it.
#: Source: lmdeploy 0.16.0 src/turbomind/memory/page.h::PageAllocator
_PAGE: Final = 32 * MIB


def cached_tokens(budget: int, slab: Slab, block_tokens: int) -> int:
    """Tokens that a KV region of this size holds: pages of 32 MiB, slabs of them, blocks in slabs.

    The region's start is rarely aligned, so that one page is taken off, as the engine loses it.
    """
    pages = max(0, budget - (_PAGE - 1)) // _PAGE
    slabs = pages // max(1, slab.slab_size // _PAGE)
    return slabs * (slab.slab_size // slab.object_size) * block_tokens


def free_for_cache(ledger: GpuLedger) -> int:
    """Bytes of a GPU that are free when the cache is sized, by the account."""
    used = sum(term.bytes for term in ledger.ledger if term.phase in BEFORE_CACHE)
    return ledger.total - ledger.reserved - used


def in_words(figure: RunFigure) -> str:
    """A figure for people: how far off the forecast was."""
    forecast, actual = figure.forecast, figure.actual
    off = f", {(actual - forecast) / forecast:+.1%}" if forecast else ""
    what = figure.what if figure.gpu is None else f"GPU {figure.gpu}: {figure.what}"
    if figure.unit == "tokens":
        return f"{what}: {actual:,} (forecast {forecast:,}{off})"
    return f"{what}: {mib(actual)} MiB (forecast {mib(forecast)}{off})"


def cache_beside(plan: Plan, budget: CacheBudget) -> tuple[RunFigure, ...]:
    """Free memory when the cache was sized, and the cache (bytes a GPU)."""
    planned = plan.settings.cache_max_entry_count
    # Beside other engines a start has a ratio of its own. The log shows three decimals.
    ratio = planned if abs(planned - budget.ratio) < 0.001 else budget.ratio
    cache = plan.kv.region_bytes
    free = round(cache / ratio) if ratio else 0
    return (
        RunFigure(what="free when the cache was sized", forecast=free, actual=budget.free),
        RunFigure(what="KV cache", forecast=cache, actual=budget.budget),
    )


def tokens_beside(plan: Plan, budget: CacheBudget, slab: Slab) -> RunFigure:
    """Tokens that the cache holds."""
    tokens = cached_tokens(budget.budget, slab, plan.settings.cache_block_seq_len)
    if plan.model.text.delta is not None:
        tokens = _beside_states(plan, budget.budget)
    return RunFigure(what="KV tokens", forecast=plan.kv.tokens, actual=tokens, unit="tokens")


def _beside_states(plan: Plan, region: int) -> int:
    """Tokens of a hybrid model, whose sequences have states in the same cache."""
    from turbofit.memory.turbomind.cache import cache_shape, tokens_planned
    from turbofit.memory.turbomind.weights import load_constants

    constants = load_constants()
    shape = cache_shape(plan.model.text, plan.settings, constants)
    return tokens_planned(region, shape, constants, plan.settings)
