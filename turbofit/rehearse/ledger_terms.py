"""The ledger's terms of one card, as the plan's ledger names its phases; bytes."""

from __future__ import annotations

from turbofit.memory.shared_terms import POOL_WARMUP
from turbofit.rehearse.turbomind.ledger import Ledger, Pool


def executor_pool(ledger: Ledger, index: int) -> Pool | None:
    """The pool from which all activations of a card come; None before its engine started."""
    found = [p for p in ledger.pools.values() if p.device == index and p.owner == "executor"]
    return found[0] if found else None


def card_terms(ledger: Ledger, index: int, used: int) -> dict[str, int | None]:
    """What a card held when the engine was ready, by term; None for what was not reached.

    Args:
        ledger: read from the rehearsal's timeline.
        index: the card.
        used: bytes that the scenario says others hold.

    Returns:
        ``before`` (others), ``context`` (communicators), ``weights``, ``prepare`` (temporaries
        of weight preparation that are still held when free memory is read), ``cache``,
        ``buffers`` (persistent, made after the cache), ``pool_warmup`` (the executor pool's
        high-water mark), and ``steady``, their sum without the temporaries.
    """
    end = ledger.cards[index].end
    executor = executor_pool(ledger, index)
    warm = executor.held_end.get("ready") if executor else None
    context = _less(_less(end.get("context"), end.get("import")), _default(ledger, index))
    weights = _weights(ledger, index)
    prepared = _less(_less(_less(end.get("prepare"), end.get("import")), context), weights)
    cache = _less(end.get("cache"), end.get("engine"))
    ready = _less(end.get("ready"), end.get("import"))
    buffers = ready
    for part in (context, weights, cache, warm):
        buffers = _less(buffers, part)
    return {
        "before": used,
        "context": context,
        "weights": weights,
        "prepare": prepared,
        "cache": cache,
        "buffers": buffers,
        POOL_WARMUP: warm,
        "steady": None if ready is None else ready + used,
    }


def _less(value: int | None, part: int | None) -> int | None:
    return None if value is None or part is None else value - part


def _default(ledger: Ledger, index: int) -> int:
    """What the default pool, which is the weights' pool, held when the contexts were made."""
    return sum(
        pool.held_end.get("context", 0)
        for pool in ledger.pools.values()
        if pool.device == index and pool.owner == "default"
    )


def _weights(ledger: Ledger, index: int) -> int | None:
    """What the default pool must hold for the weights alone, once they are prepared."""
    for pool in ledger.pools.values():
        live = pool.live_end.get("prepare")
        if pool.device == index and pool.owner == "default" and live is not None:
            return -(-live // ledger.pool_step) * ledger.pool_step
    return None


def load_peak(ledger: Ledger, index: int) -> int:
    """The most that a card held until its weights were ready, others not counted."""
    peak = ledger.cards[index].peak
    return max((peak.get(k, 0) for k in ("import", "context", "weights", "prepare")), default=0)
