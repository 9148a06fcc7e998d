"""What would happen at one ratio, in the order of the start: the first thing that goes wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, Literal

from msgspec.structs import replace

from turbofit.core.plan import GpuLedger, Term
from turbofit.core.struct import Struct
from turbofit.core.units import format_bytes
from turbofit.memory.account import POOL_WARMUP, TEMPORARIES, Account

#: Terms of a ledger as people say them.
_NAMES: Final = {
    "text_prefill": "the longest prompts",
    "sampling": "a full batch sampling with top_k=0",
    "vision_request": "one image request at the limit",
    "vision_forward": "image requests that meet in one forward",
    "kv_cache": "the cache",
}
_OTHERS: Final = "others"
#: Terms that a sentence holds.
_SHOWN: Final = 3
#: The share of a card below which what others hold decides nothing.
_WORTH_A_WORD: Final = 0.01

OutcomeKind = Literal["serves", "load", "buffers", "hang", "warmup", "request", "margin"]


class StartOutcome(Struct):
    """How a start ends: ``kind`` names the phase, ``missing`` the bytes, ``text`` is for people."""

    kind: OutcomeKind
    text: str
    gpu: int | None = None
    term: str = ""
    missing: int = 0

    @property
    def serves(self) -> bool:
        """Whether no request within the vision load kills it (the margin may still be short)."""
        return self.kind in ("serves", "margin")


def outcome_at(account: Account, ratio: float) -> StartOutcome:
    """What happens to a group that is started with this ratio."""
    return next(_outcomes(account, ratio), StartOutcome(kind="serves", text="serves"))


def outcomes_at(account: Account, ratio: float) -> list[StartOutcome]:
    """Everything that would go wrong, the first of each kind, in the order of the start."""
    first: dict[str, StartOutcome] = {}
    for outcome in _outcomes(account, ratio):
        first.setdefault(outcome.kind, outcome)
    return list(first.values())


def outcome_without_cache(account: Account) -> StartOutcome:
    """Why no ratio at all fits: loading, or what must live beside the cache."""
    ledgers = account.at(0.0).ledgers
    outcome = next(_loading(ledgers), None)
    if outcome is not None:
        return outcome
    tightest = min(ledgers, key=lambda ledger: ledger.headroom - ledger.margin)
    missing = max(1, tightest.margin - tightest.headroom)
    text = (
        f"GPU {tightest.index} has no room for a cache: {format_bytes(missing)} short of the"
        f" margin of {format_bytes(tightest.margin)} before the first KV block"
        f" ({_makeup(tightest, worst=True)})"
    )
    return _failure("request", tightest, missing, text, _largest(tightest.ledger, "transient"))


def _outcomes(account: Account, ratio: float) -> Iterator[StartOutcome]:
    ledgers = account.at(ratio).ledgers
    yield from _loading(ledgers)
    if account.free <= 0:
        yield outcome_without_cache(account)
    yield from _starting(account, ratio, ledgers)
    yield from _serving(account, ledgers)
    for ledger in ledgers:
        if not ledger.fits:
            missing = ledger.margin - ledger.headroom
            text = (
                f"serves with {format_bytes(ledger.headroom)} to spare on GPU {ledger.index},"
                f" {format_bytes(missing)} less than the margin"
            )
            yield _failure("margin", ledger, missing, text, "")


def _loading(ledgers: Sequence[GpuLedger]) -> Iterator[StartOutcome]:
    for ledger in ledgers:
        missing = ledger.load_peak - _usable(ledger)
        if missing > 0:
            weights = sum(
                term.bytes
                for term in ledger.ledger
                if term.phase == "weights" and term.term != TEMPORARIES
            )
            before = sum(t.bytes for t in ledger.ledger if t.phase in ("before", "context"))
            staging = ledger.load_peak - before - weights
            staged = f", torch's staging of tensors {format_bytes(staging)}" if staging else ""
            others = _others(ledger)
            by_others = f"others hold {format_bytes(others)}, " if others else ""
            text = (
                f"runs out of memory while loading: GPU {ledger.index} is"
                f" {format_bytes(missing)} short of a load peak of"
                f" {format_bytes(ledger.load_peak)}"
                f" ({by_others}weights {format_bytes(weights)}{staged})"
            )
            yield _failure("load", ledger, missing, text, _largest(ledger.ledger, "weights"))


def _starting(
    account: Account, ratio: float, ledgers: Sequence[GpuLedger]
) -> Iterator[StartOutcome]:
    ledgers = [_without(ledger, account.grown) for ledger in ledgers]
    for ledger in ledgers:
        missing = ledger.steady - _pool(ledger.ledger) - _usable(ledger)
        if missing > 0:
            yield _short("buffers", ledger, missing, "while starting, right after the cache")
    missing = account.cache_shortfall_at(ratio)
    if missing:
        blocks, needed = account.blocks_at(ratio), account.least_blocks
        needs = account.cache_shortfall.format(more=format_bytes(missing))
        text = f"never starts: the cache holds {blocks} KV blocks of the {needed} {needs}"
        yield _failure("hang", ledgers[0], missing, text)
    for ledger in ledgers:
        missing = ledger.steady - _usable(ledger)
        if missing > 0:
            yield _short("warmup", ledger, missing, account.warmup_words)


def _serving(account: Account, ledgers: Sequence[GpuLedger]) -> Iterator[StartOutcome]:
    for ledger in ledgers:
        base = ledger.steady - _pool(ledger.ledger)
        deadly = [
            term
            for term in ledger.ledger
            if term.phase == "transient" and base + term.bytes > _usable(ledger)
        ]
        if deadly:
            first = min(deadly, key=lambda term: term.bytes)
            missing, case = base + first.bytes - _usable(ledger), _NAMES.get(first.term, first.term)
            pool, left = _pool(ledger.ledger), _usable(ledger) - ledger.steady
            where = f"{format_bytes(pool)} are held and {format_bytes(left)} are free"
            if left < 0:  # the warm-up holds nothing, or holes in the pool take what it held
                where = f"{format_bytes(max(0, pool + left))} are free"
            text = (
                f"starts, then {account.dies} on {case} ({first.note}): it needs"
                f" {format_bytes(first.bytes)} of {account.allocator} where"
                f" {where} on GPU {ledger.index} ({format_bytes(missing)} short)"
            )
            yield _failure("request", ledger, missing, text, first.term)


def _short(kind: OutcomeKind, ledger: GpuLedger, missing: int, when: str) -> StartOutcome:
    text = (
        f"runs out of memory {when}: GPU {ledger.index} is {format_bytes(missing)} short"
        f" ({_makeup(ledger)})"
    )
    return _failure(kind, ledger, missing, text)


def _failure(
    kind: OutcomeKind, ledger: GpuLedger, missing: int, text: str, term: str = "kv_cache"
) -> StartOutcome:
    return StartOutcome(kind=kind, gpu=ledger.index, term=term, missing=missing, text=text)


def _makeup(ledger: GpuLedger, *, worst: bool = False) -> str:
    """What takes the memory, for people: first other processes, then the largest terms.

    ``worst``: the worst request is what did not fit, so that it counts too.
    """
    sizes: dict[str, int] = {}
    for term in ledger.ledger:
        if term.phase != "transient" and term.term != _OTHERS:
            name = term.phase if term.phase == "weights" else _NAMES.get(term.term, term.term)
            sizes[name] = sizes.get(name, 0) + term.bytes
    requests = [term for term in ledger.ledger if term.phase == "transient"] if worst else []
    if requests:
        largest = max(requests, key=lambda term: term.bytes)
        sizes[_NAMES.get(largest.term, largest.term)] = max(
            largest.bytes, sizes.pop(POOL_WARMUP, 0)
        )
    order = sorted((name for name in sizes if sizes[name]), key=lambda name: -sizes[name])[:_SHOWN]
    others = _others(ledger)
    parts = [f"others hold {format_bytes(others)}"] if others else []
    parts += [f"{name} {format_bytes(sizes[name])}" for name in order]
    return f"{', '.join(parts)}; the card has {format_bytes(_usable(ledger))}"


def _without(ledger: GpuLedger, names: Sequence[str]) -> GpuLedger:
    """What the GPU holds before these terms come."""
    later = sum(term.bytes for term in ledger.ledger if term.term in names)
    terms = tuple(term for term in ledger.ledger if term.term not in names)
    return replace(ledger, ledger=terms, steady=ledger.steady - later)


def _others(ledger: GpuLedger) -> int:
    """Bytes that other processes hold, where they matter."""
    size = sum(term.bytes for term in ledger.ledger if term.term == _OTHERS)
    return size if size >= ledger.total * _WORTH_A_WORD else 0


def _largest(ledger: Sequence[Term], phase: str) -> str:
    return max(
        (term for term in ledger if term.phase == phase), key=lambda term: term.bytes, default=_NONE
    ).term


def _pool(ledger: Sequence[Term]) -> int:
    return next((term.bytes for term in ledger if term.term == POOL_WARMUP), 0)


def _usable(ledger: GpuLedger) -> int:
    return ledger.total - ledger.reserved


_NONE = Term(term="", phase="before", bytes=0, basis="formula")
