"""The pieces of a card's memory add up."""

from __future__ import annotations

import msgspec
import pytest

from tests.report.documents import KINDS, planned
from tests.support.plans import ledger
from turbofit.core.memory_stack import KINDS as PIECES
from turbofit.core.memory_stack import stack, sums
from turbofit.core.plan import Term
from turbofit.core.units import MIB
from turbofit.report.painters.terminal import OVER, legend
from turbofit.report.views.memory_view import memory_bar


@pytest.mark.parametrize("kind", [*KINDS, "died"])
def test_the_pieces_add_up_to_the_card(kind: str) -> None:
    for gpu in planned(kind).ledgers:
        pieces = stack(gpu)
        assert all(piece.bytes > 0 for piece in pieces)
        whole = sum(piece.bytes for piece in pieces)
        assert whole == gpu.total + max(0, -gpu.headroom)
        order = list(PIECES)
        places = [order.index(piece.kind) for piece in pieces]
        assert places == sorted(places)
        found = sums(pieces)
        held = whole - sum(found.get(kind, 0) for kind in ("loading", "left", "margin"))
        assert held == gpu.reserved + gpu.peak


def test_a_correction_below_zero_shortens_what_it_corrects() -> None:
    """A plan that fits drew more than the card has: the estimates stood there whole."""
    gpu = ledger(0)
    estimate = Term(term="kernels", phase="buffers", bytes=100 * MIB, basis="estimate")
    less = Term(term="calibration.buffers", phase="buffers", bytes=-72 * MIB, basis="measured")
    terms, steady = (*gpu.terms, estimate, less), gpu.steady + 28 * MIB
    gpu = msgspec.structs.replace(
        gpu, terms=terms, steady=steady, peak=gpu.peak + 28 * MIB, headroom=gpu.headroom - 28 * MIB
    )
    found = {piece.name: piece.bytes for piece in stack(gpu)}
    assert found["kernels"] == 28 * MIB
    assert "calibration.buffers" not in found
    drawn = memory_bar(gpu, "GPU 0")
    assert drawn.need == drawn.room
    assert not any(text.startswith(OVER) for text in legend(drawn))
