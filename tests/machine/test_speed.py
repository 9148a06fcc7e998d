"""What a later plan makes of measured speeds."""

from __future__ import annotations

import pytest

from tests.machine.test_learned import CARDS, machine
from turbofit.core.machine import Machine, Measured, ReduceSpeed
from turbofit.machine.learned import with_measured
from turbofit.planning.speed import all_reduce_of, card_of, rates


def test_measured_rates_take_the_place_of_assumed_ones() -> None:
    on = machine()
    times = ((8192, 2e-5), (1 << 20, 1.2e-4), (32 << 20, 3.2e-3))

    def measured(*, right: bool) -> Machine:
        reduces = tuple(
            ReduceSpeed(gpus=(0, 1), size=size, seconds=seconds, right=right)
            for size, seconds in times
        )
        return with_measured(on, Measured(torch="2.9", cards=CARDS, reduces=reduces))

    found = measured(right=True)
    own = all_reduce_of(found, found.gpus, rates())
    for size, seconds in (times[0], times[2]):
        assert own.seconds(size) == pytest.approx(seconds, rel=0.01)
    card = card_of(found.gpus, rates(), found.measured)
    assert card.bandwidth == pytest.approx(8.4e11 / 0.9 * rates().memory_efficiency)
    assert card.flops == pytest.approx(5.6e13 / 0.75 * rates().compute_efficiency)
    unbelieved = measured(right=False)
    assert all_reduce_of(unbelieved, on.gpus, rates()) == all_reduce_of(on, on.gpus, rates())
