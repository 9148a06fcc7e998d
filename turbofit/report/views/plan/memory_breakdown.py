"""The memory of a GPU from empty to full, in pieces that add up to the card."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    from turbofit.core.plan import GpuLedger, Term

__all__ = ["KINDS", "Kind", "StackPiece", "stack", "sums"]

Kind = Literal[
    "reserved", "before", "context", "weights", "cache", "buffers", "transient", "loading", "left",
    "margin",
]  # fmt: skip

#: Each kind in the order of the stack: the letter that stands for it, and what it is.
KINDS: Final[dict[Kind, tuple[str, str]]] = {
    "reserved": ("r", "kept by the driver"),
    "before": ("o", "held by others"),
    "context": ("c", "CUDA and libraries"),
    "weights": ("W", "weights"),
    "cache": ("K", "KV cache"),
    "buffers": ("b", "buffers"),
    "transient": ("t", "worst request"),
    "loading": ("l", "only while loading"),
    "left": (".", "free above the margin"),
    "margin": ("m", "margin"),
}

#: A negative term: it gives back what another term took.
_RETURNED: Final = ".returned"


class StackPiece(NamedTuple):
    """A named part of a card. ``term`` is the ledger's, where it is one of its lines."""

    kind: Kind
    name: str
    bytes: int
    term: Term | None = None


def stack(ledger: GpuLedger) -> tuple[StackPiece, ...]:
    """The pieces in order; they add up to the card's total, or beyond it where it is too small.

    Lines of the ledger that are 0 are left out; of the transients the peak counts, once, as what
    it has above the state at rest. Where loading needs more than the peak, that is a piece too.
    """
    pieces = [StackPiece("reserved", "reserved", ledger.reserved)]
    pieces += _held(ledger)
    worst = next((term for term in ledger.ledger if term.worst), None)
    name = worst.term if worst else "worst request"
    pieces.append(StackPiece("transient", name, ledger.peak - ledger.steady, worst))
    pieces.append(StackPiece("loading", "loading", ledger.load_peak - ledger.peak))
    pieces.append(StackPiece("left", "left", ledger.headroom - ledger.margin))
    pieces.append(StackPiece("margin", "margin", min(ledger.margin, ledger.headroom)))
    return tuple(piece for piece in pieces if piece.bytes > 0)


def sums(pieces: Iterable[StackPiece]) -> dict[Kind, int]:
    """Bytes of each kind that is there, in the order of the stack."""
    found = dict.fromkeys(KINDS, 0)
    for piece in pieces:
        found[piece.kind] += piece.bytes
    return {kind: size for kind, size in found.items() if size}


def _held(ledger: GpuLedger) -> list[StackPiece]:
    """What is there at rest, line by line; what the lines do not tell apart comes last."""
    terms = [term for term in ledger.ledger if term.phase != "transient"]
    sizes = {term.term: term.bytes for term in terms}
    for term in terms:
        base = term.term.removesuffix(_RETURNED)
        if term.bytes < 0 and base in sizes and base != term.term:
            sizes[base] += sizes.pop(term.term)
    pieces = [
        StackPiece(term.phase, term.term, sizes[term.term], term)
        for term in terms
        if term.phase != "transient" and term.term in sizes
    ]
    rest = ledger.steady - sum(piece.bytes for piece in pieces)
    return [*pieces, StackPiece("buffers", "not told apart", rest)]
