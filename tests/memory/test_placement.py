"""Layers on several cards and in host memory: what is counted where they run."""

from __future__ import annotations

import pytest

from tests.memory.transformers.test_account import MODEL, forecast
from turbofit.core.units import MIB
from turbofit.machine.source import machine_from
from turbofit.memory.account import Load
from turbofit.memory.placement import (
    ModelCopies,
    fewest_offloaded,
    filled,
    offloaded,
    place_all,
)


# An offloaded layer is charged where it runs.
@pytest.mark.parametrize(
    ("layers", "gpus", "load", "reserved"),
    [
        ((*[0] * 12, *[1] * 16), 2, (16384, 1, 32768), (10730, 11002)),
        ((*[0] * 8, *[None] * 13, *[0] * 7), 1, (2304, 1, 5120), (10564,)),
    ],
)
def test_layers_on_two_cards_and_in_host_memory(layers, gpus, load, reserved):
    for place, seen in enumerate(reserved):
        peak, _ = forecast(MODEL, load, place, layers, gpus=gpus)
        assert seen <= peak / MIB <= (1.06 if gpus == 2 else 1.07) * seen


def test_layers_fill_cards_in_order_and_as_few_as_possible_leave_them() -> None:
    gpus, load = machine_from("2xrtx3060").gpus, Load(tokens=4096, images=0, units=0)
    placement = place_all(ModelCopies(MODEL, "bfloat16", [gpus], {0: 0, 1: 0}), load)
    assert placement == (*[0] * placement.count(0), *[1] * placement.count(1))
    assert len(placement) == MODEL.text.layers
    alone = ModelCopies(MODEL, "bfloat16", [gpus[:1]], {0: 0})
    assert place_all(alone, load) is None
    fewest = offloaded(fewest_offloaded(alone, load))
    assert fewest
    assert filled(alone, load, len(fewest) - 1) is None
