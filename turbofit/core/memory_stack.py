"""Splits a GPU's memory into named pieces for a bar chart, and groups equal GPUs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from turbofit.core.plan import GpuLedger, Term
from turbofit.core.units import format_bytes

#: The kinds of pieces in the order of the bar, each with its letter in a drawing, and its words.
KINDS: Final = {
    "reserved": ("r", "driver"),
    "before": ("o", "held by others"),
    "context": ("c", "CUDA"),
    "weights": ("W", "weights"),
    "cache": ("K", "KV cache"),
    "buffers": ("b", "buffers"),
    "transient": ("t", "worst request"),
    "loading": ("l", "only while loading"),
    "left": (".", "free"),
    "margin": ("m", "margin"),
}

#: Terms of a ledger in words for people.
TERMS: Final = {
    "text_prefill": "the longest prompts",
    "sampling": "a full batch sampling with top_k=0",
    "vision_request": "one image request at the limit",
    "vision_forward": "image requests that meet in one forward",
    "kv_cache": "the cache",
}
#: The term in place of all terms before the cache, in a prediction from a log's free memory alone.
BEFORE_CACHE: Final = "before_cache"
#: The suffix of a negative term, which gives back a part of another term.
_RETURNED: Final = ".returned"


class StackPiece(NamedTuple):
    """A named part of a card's memory, and its term in the ledger."""

    kind: str
    name: str
    bytes: int
    term: Term | None = None


def stack(ledger: GpuLedger) -> tuple[StackPiece, ...]:
    """Return the pieces of a card's memory in the order of the bar.

    The pieces add up to the card's total, or to more if the card is too small. Only the worst
    transient term is a piece, with the bytes that this term adds to the memory used at rest.
    """
    worst = next((term for term in ledger.terms if term.worst), None)
    name = worst.term if worst else "worst request"
    pieces = (
        StackPiece("reserved", "reserved", ledger.reserved),
        *_held(ledger),
        StackPiece("transient", name, ledger.peak - ledger.steady, worst),
        StackPiece("loading", "loading", ledger.load_peak - ledger.peak),
        StackPiece("left", "left", ledger.headroom - ledger.margin),
        StackPiece("margin", "margin", min(ledger.margin, ledger.headroom) - ledger.beyond_budget),
    )
    return tuple(piece for piece in pieces if piece.bytes > 0)


def sums(pieces: Iterable[StackPiece]) -> dict[str, int]:
    """Return the bytes of all pieces of each kind, in the order of `KINDS`, without empty kinds."""
    sizes = dict.fromkeys(KINDS, 0)
    for piece in pieces:
        sizes[piece.kind] += piece.bytes
    return {kind: size for kind, size in sizes.items() if size}


def _held(ledger: GpuLedger) -> list[StackPiece]:
    """Return one piece for each term of the memory in use at rest.

    Bytes that no term explains are the last piece.
    """
    terms = [term for term in ledger.terms if term.phase != "transient"]
    sizes = {term.term: term.bytes for term in terms}
    for term in terms:
        if term.bytes < 0:
            _give_back(sizes, term, terms)
    pieces = [
        StackPiece(term.phase, term.term, sizes[term.term], term)
        for term in terms
        if term.term in sizes
    ]
    rest = ledger.steady - sum(piece.bytes for piece in pieces)
    return [*pieces, StackPiece("buffers", "unnamed", rest)]


def _give_back(sizes: dict[str, int], given: Term, terms: Sequence[Term]) -> None:
    """Subtract a negative term's bytes from the terms that it corrects.

    Bytes are taken first from the term of the same name, then from estimates of the same phase
    (which a calibration corrects), then from other terms of this phase; from large terms first.
    """
    base, alike = given.term.removesuffix(_RETURNED), [t for t in terms if t.phase == given.phase]
    alike.sort(key=lambda term: (term.term != base, term.basis != "estimate", -term.bytes))
    left = -sizes.pop(given.term)
    for name in [base, *(term.term for term in alike)]:
        taken = min(left, max(0, sizes.get(name, 0)))
        if taken:
            sizes[name] -= taken
            left -= taken


def equal_ledgers(ledgers: tuple[GpuLedger, ...]) -> list[tuple[list[int], GpuLedger]]:
    """Group GPUs with equal ledgers; return each group's indices and its first GPU's ledger."""
    sets: dict[object, tuple[list[int], GpuLedger]] = {}
    for ledger in ledgers:
        facts = (
            ledger.name, ledger.total, ledger.reserved, ledger.used, ledger.free, ledger.steady,
            ledger.load_peak, ledger.peak, ledger.margin, ledger.withheld,
            tuple((term.term, term.bytes) for term in ledger.terms),
        )  # fmt: skip
        sets.setdefault(facts, ([], ledger))[0].append(ledger.index)
    return [*sets.values()]


def memory_label(ledger: GpuLedger) -> str:
    """Say in words how much of a card is in use at most, and how much is left."""
    when = "while loading" if ledger.most > ledger.peak else "in the worst case"
    # The size of the card includes the driver's part; a budget is for the engines alone.
    used, whole = ledger.reserved + ledger.most, format_bytes(ledger.total)
    if ledger.budget is not None:
        used, whole = ledger.most - ledger.used, f"a budget of {format_bytes(ledger.budget)}"
    card = f"{format_bytes(used)} of {whole} in use {when}"
    left = ledger.headroom - ledger.beyond_budget
    if left < 0:
        # How much is missing only the verdict says: it may speak of an earlier case than this peak.
        worst = next((term.term for term in ledger.terms if term.worst), "")
        case = f" ({TERMS[worst]})" if worst in TERMS and ledger.most == ledger.peak else ""
        than = "there is" if ledger.budget is None else "the budget"
        return f"{card}{case}: more than {than}"
    wanted = format_bytes(ledger.margin - ledger.beyond_budget)
    margin = "" if ledger.fits else f" of a margin of {wanted}"
    return f"{card}, {format_bytes(left)} left{margin}"
