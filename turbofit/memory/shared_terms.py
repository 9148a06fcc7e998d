"""What the ledgers of all engines make their terms with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from turbofit.core.machine import Gpu
from turbofit.core.plan import Basis, Phase, Term
from turbofit.core.units import round_up

__all__ = ["AMPERE", "HOPPER", "PAGE", "POOL_WARMUP", "capability_of", "term", "transients"]

#: Their compute capabilities; cards before Ampere have no bfloat16.
AMPERE, HOPPER = (8, 0), (9, 0)
#: An allocation outside a pool takes whole pages of the driver, of this many bytes.
PAGE: Final = 2 << 20
#: The term of what the warm-up's forward leaves in the engine's pool or in torch's allocator.
POOL_WARMUP: Final = "pool_warmup"


def term(name: str, phase: Phase, size: int, basis: Basis, note: str = "") -> Term:
    """One named line of a ledger, in bytes."""
    return Term(term=name, phase=phase, bytes=size, basis=basis, note=note)


def transients(cases: Sequence[tuple[str, int, Basis, str]], step: int = 1) -> tuple[Term, ...]:
    """Alternatives that share one room, each a name, bytes, basis and note: the largest decides.

    It is found before sizes are rounded up to whole steps, which can make two of them equal.
    """
    sizes = [size for _, size, _, _ in cases]
    worst = sizes.index(max(sizes))
    return tuple(
        Term(
            term=name,
            phase="transient",
            bytes=round_up(size, step),
            basis=basis,
            note=note,
            worst=i == worst,
        )
        for i, (name, size, basis, note) in enumerate(cases)
    )


def capability_of(gpu: Gpu, unknown: tuple[int, int] = HOPPER) -> tuple[int, int]:
    """Compute capability; where it cannot be read by default Hopper's, which takes most. Over."""
    return unknown if gpu.compute_capability == "NA" else gpu.compute_capability
