"""What is believed of a measurement, and what a later plan makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from turbofit.core.machine import CardSpeed, Machine, Measured, PairSpeed, ReduceSpeed
from turbofit.machine.learned import keep, recall, with_measured
from turbofit.machine.spec import parse_spec
from turbofit.planning.speed import LinkClass, all_reduce_of, card_of, group_class, rates

CARDS = tuple(CardSpeed(index=i, bandwidth=8.4e11, flops=5.6e13) for i in (0, 1))


def machine(spec: str = "2xrtx3090") -> Machine:
    made = parse_spec(spec)
    return replace(made, gpus=tuple(replace(g, uuid=f"GPU-{g.index}") for g in made.gpus))


def pair(source: int, target: int, *, peer: bool = True, right: bool = True) -> PairSpeed:
    return PairSpeed(
        source=source, target=target, peer=peer and right, right=right, bandwidth=2e10,
        latency=1e-5, host_bandwidth=8e9,
    )  # fmt: skip


def after(on: Machine, *pairs: PairSpeed) -> Machine:
    return with_measured(on, Measured(torch="2.9", cards=CARDS, pairs=pairs))


def test_peers_are_those_that_a_checked_copy_proved() -> None:
    promised, denied = machine("2xrtx3090,p2p=all"), machine("2xrtx3090,p2p=none")
    for second, peers in (
        (pair(1, 0), True), (pair(1, 0, peer=False), False), (pair(1, 0, right=False), False),
    ):  # fmt: skip
        found = after(promised, pair(0, 1), second)
        assert found.link(0, 1).peers is peers
        assert ("wrong data" in " ".join(found.warnings)) is not second.right
    alone = after(promised, pair(0, 1, right=False))
    assert not alone.link(0, 1).peers, "one wrong copy is enough"
    found = after(denied, pair(0, 1), pair(1, 0))
    assert group_class(found, found.gpus) == LinkClass.PCIE_PEER
    assert not after(denied, pair(0, 1)).link(0, 1).peers


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


def test_it_is_kept_for_these_gpus_and_this_driver(state: Path) -> None:
    on = machine()
    assert recall(on) == on
    assert not (state / "learned").exists()
    found = Measured(torch="2.9", cards=CARDS, pairs=(pair(0, 1), pair(1, 0)))
    path = keep(on, found)
    assert recall(on).measured == found
    assert recall(replace(on, driver="1.2")).measured is None
    assert recall(machine("1xrtx3090")).measured is None
    first, second = on.gpus
    swapped = (replace(first, uuid=second.uuid), replace(second, uuid=first.uuid))
    assert recall(replace(on, gpus=swapped)).measured is None
    path.write_text("{")
    assert recall(on) == on
