"""The outcome of a start at one ratio: the engine serves, or a step of the start fails."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, Literal, NamedTuple

from turbofit.core.memory_stack import TERMS
from turbofit.core.plan import GpuLedger, Term
from turbofit.core.units import format_bytes
from turbofit.memory.account import POOL_WARMUP, STATE_CACHE, TEMPORARIES, Account

_OTHERS: Final = "others"
_OF_STATES: Final = (
    "while starting (No enough gpu memory for state cache): the states of --max-batch-size"
    " requests take {states}, and only a smaller one helps"
)
#: The most terms named in a sentence.
_SHOWN: Final = 3
#: The least share of a card for which a sentence mentions the memory of other processes.
_WORTH_A_WORD: Final = 0.01

OutcomeKind = Literal[
    "serves", "load", "buffers", "hang", "warmup", "request", "load_margin", "margin"
]


class StartOutcome(NamedTuple):
    """The outcome of a start: its ``kind``, the ``missing`` bytes, and the ``text`` for people."""

    kind: OutcomeKind
    missing: int
    text: str

    @property
    def serves(self) -> bool:
        """Whether every request within the vision load succeeds; the margin may still be missed."""
        return self.kind in ("serves", "load_margin", "margin")


def outcome_at(account: Account, ratio: float) -> StartOutcome:
    """Return the outcome of a start of the engine with this ratio."""
    return next(_outcomes(account, ratio), StartOutcome("serves", 0, "serves"))


def outcome_without_cache(account: Account) -> StartOutcome:
    """Return the outcome if no ratio fits, with the reason.

    The reason is the memory for loading, or the memory without the cache. The outcome's kind is
    ``load_margin`` if the engine can load, but not with the margin free. A smaller margin is then
    enough.
    """
    ledgers = account.ledgers_at(0.0)
    for outcome in _loading(ledgers):
        return outcome
    tightest = min(ledgers, key=lambda one: one.headroom - one.margin)
    if tightest.headroom >= tightest.margin:
        # What LMDeploy divides may be less than what is free.
        least = account.least_blocks * account.block_bytes
        missing = max(account.missing_without_ratio(), least - account.ratio_base)
        return _too_few_blocks(account, 0, missing)
    if tightest.load_peak > tightest.peak:
        missing = account.missing_at(0.0)
        text = (
            f"while it loads, GPU {tightest.index} is {format_bytes(missing)} short of"
            f" {_kept(tightest)}, by a load peak of {_load_makeup(tightest)}"
        )
        return StartOutcome("load_margin", missing, text)
    missing = account.missing_without_ratio()
    text = (
        f"GPU {tightest.index} has no room for a cache: {format_bytes(missing)} short of"
        f" {_kept(tightest)} beside the least cache"
        f" ({_makeup(tightest, tightest.terms, worst=True)})"
    )
    return StartOutcome("request", missing, text)


def _outcomes(account: Account, ratio: float) -> Iterator[StartOutcome]:
    """Yield all failures at one ratio, in the order of a start; nothing if the margins hold."""
    ledgers = account.ledgers_at(ratio)
    yield from _loading(ledgers)
    if account.free <= 0:
        yield outcome_without_cache(account)._replace(kind="request")
    yield from _starting(account, ratio, ledgers)
    yield from _serving(account, ledgers)
    for ledger in ledgers:
        if not ledger.fits:
            missing = ledger.margin - ledger.headroom
            yield StartOutcome("margin", missing, _not_kept(ledger, missing))


def _loading(ledgers: Sequence[GpuLedger]) -> Iterator[StartOutcome]:
    """Yield a failure for each card that lacks memory for the load peak."""
    for ledger in ledgers:
        missing = ledger.load_peak - ledger.usable
        if missing > 0:
            text = (
                f"runs out of memory while loading: GPU {ledger.index} is"
                f" {format_bytes(missing)} short of a load peak of {_load_makeup(ledger)}"
            )
            yield StartOutcome("load", missing, text)


def _load_makeup(ledger: GpuLedger) -> str:
    """Return the peak of loading and its parts, in words."""
    weights = ledger.bytes_in("weights") - ledger.bytes_of(TEMPORARIES)
    staging = ledger.load_peak - ledger.bytes_in("before", "context") - weights
    staged = f", torch's staging of tensors {format_bytes(staging)}" if staging else ""
    others = _others(ledger)
    by_others = f"others hold {format_bytes(others)}, " if others else ""
    peak = format_bytes(ledger.load_peak)
    return f"{peak} ({by_others}weights {format_bytes(weights)}{staged})"


def _starting(
    account: Account, ratio: float, ledgers: Sequence[GpuLedger]
) -> Iterator[StartOutcome]:
    """Yield the failures of a start, before the first request."""

    def short(kind: OutcomeKind, when: str, *later: str) -> Iterator[StartOutcome]:
        """Yield a failure for each card that lacks memory before the terms ``later`` are allocated.

        Terms that only requests make grow (``account.grown``) do not count.
        """
        for ledger in ledgers:
            terms = [term for term in ledger.terms if term.term not in account.grown]
            steady = sum(t.bytes for t in terms if t.phase != "transient" and t.term not in later)
            missing = steady - ledger.usable
            if missing > 0:
                states = ledger.bytes_of(STATE_CACHE)
                if kind == "buffers" and states > ledger.free_for_cache:
                    when = _OF_STATES.format(states=format_bytes(states))
                text = (
                    f"runs out of memory {when}: GPU {ledger.index} is {format_bytes(missing)}"
                    f" short ({_makeup(ledger, terms)})"
                )
                yield StartOutcome(kind, missing, text)

    yield from short("buffers", "while starting, right after the cache", POOL_WARMUP)
    missing = account.cache_shortfall_at(ratio)
    if missing:
        yield _too_few_blocks(account, account.blocks_at(ratio), missing)
    yield from short("warmup", account.warmup_words)


def _too_few_blocks(account: Account, blocks: int, missing: int) -> StartOutcome:
    """Return the outcome of a cache with fewer blocks than the engine asks for."""
    needs = account.cache_shortfall.format(more=format_bytes(missing))
    text = f"never starts: the cache holds {blocks} KV blocks of the {account.least_blocks} {needs}"
    return StartOutcome("hang", missing, text)


def _serving(account: Account, ledgers: Sequence[GpuLedger]) -> Iterator[StartOutcome]:
    """Yield a failure for each card that lacks memory for a worst request after the start."""
    for ledger in ledgers:
        pool, left = ledger.bytes_of(POOL_WARMUP), ledger.usable - ledger.steady
        deadly = [term for term in _transients(ledger.terms) if term.bytes > pool + left]
        if deadly:
            first = min(deadly, key=lambda term: term.bytes)
            missing, case = first.bytes - pool - left, TERMS.get(first.term, first.term)
            where = f"{format_bytes(pool)} are held and {format_bytes(left)} are free"
            if left < 0:  # holes in driver pools take a part of the warm-up's memory
                where = f"{format_bytes(max(0, pool + left))} are free"
            text = (
                f"starts, then {account.dies} on {case} ({first.note}): it needs"
                f" {format_bytes(first.bytes)} of {account.allocator} where"
                f" {where} on GPU {ledger.index} ({format_bytes(missing)} short)"
            )
            yield StartOutcome("request", missing, text)


def _not_kept(ledger: GpuLedger, missing: int) -> str:
    """Say that an engine serves, but on this GPU takes more than the margin or budget admits."""
    if ledger.budget is None:
        kept = f"keeps {format_bytes(ledger.headroom)} free in the worst case"
        return f"GPU {ledger.index} {kept}, {format_bytes(missing)} short of {_kept(ledger)}"
    taken = f"{format_bytes(ledger.most - ledger.used)} of GPU {ledger.index} in the worst case"
    return f"takes {taken}, {format_bytes(missing)} too much for {_kept(ledger)}, margin included"


def _kept(ledger: GpuLedger) -> str:
    """Return the margin or the budget that a GPU must keep, in words and bytes."""
    if ledger.budget is None:
        return f"the margin of {format_bytes(ledger.margin)}"
    return f"the budget of {format_bytes(ledger.budget)}"


def _makeup(ledger: GpuLedger, terms: Sequence[Term], *, worst: bool = False) -> str:
    """List the largest parts of the memory in words: other processes, then the largest terms.

    ``worst``: include the largest transient, because the worst request did not fit.
    """
    sizes: dict[str, int] = {}
    for term in terms:
        if term.phase != "transient" and term.term != _OTHERS:
            name = term.phase if term.phase == "weights" else TERMS.get(term.term, term.term)
            sizes[name] = sizes.get(name, 0) + term.bytes
    requests = _transients(terms) if worst else []
    if requests:
        largest = max(requests, key=lambda term: term.bytes)
        sizes[TERMS.get(largest.term, largest.term)] = max(largest.bytes, sizes.pop(POOL_WARMUP, 0))
    order = sorted((name for name in sizes if sizes[name]), key=lambda name: -sizes[name])[:_SHOWN]
    others = _others(ledger)
    parts = [f"others hold {format_bytes(others)}"] if others else []
    parts += [f"{name} {format_bytes(sizes[name])}" for name in order]
    return f"{', '.join(parts)}; the card has {format_bytes(ledger.usable)}"


def _others(ledger: GpuLedger) -> int:
    """Return the bytes that other processes hold; 0 if the bytes are too few to mention."""
    size = ledger.bytes_of(_OTHERS)
    return size if size >= ledger.total * _WORTH_A_WORD else 0


def _transients(terms: Sequence[Term]) -> list[Term]:
    return [term for term in terms if term.phase == "transient"]
