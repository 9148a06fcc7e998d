"""None"""

from __future__ import annotations

from itertools import pairwise

import pytest
from msgspec.structs import replace

from turbofit.core.machine import Pcie
from turbofit.machine.spec import parse_spec
from turbofit.tuner.speed import AllReduce, all_reduce_of, rates

SIZES = [1 << 12, 1 << 20, 1 << 27]


def seconds(spec: str, size: float, ancestor: str | None = None, width: int = 16) -> float:
    machine = parse_spec(spec)
    gpus = tuple(replace(g, pcie=replace(g.pcie, width=width)) for g in machine.gpus)
    if ancestor:
        links = tuple(replace(link, ancestor=ancestor) for link in machine.links)
        machine = replace(machine, links=links)
    return all_reduce_of(replace(machine, gpus=gpus), gpus, rates()).seconds(size)


def test_one_card_reduces_nothing() -> None:
    assert seconds("1xrtx3090", 1 << 30) == 0.0


@pytest.mark.parametrize("size", SIZES)
def test_links_are_ordered_as_their_classes(size: int) -> None:
    slowest_first = [
        seconds("2xrtx3090", size, "system"),
        seconds("2xrtx3090", size, "node"),
        seconds("2xrtx3090,p2p=all", size),
        seconds("2xrtx3090,nvlink=0-1", size),
        seconds("2xa100-80g", size),
    ]
    assert all(slow >= fast for slow, fast in pairwise(slowest_first))
    assert slowest_first[0] > 1.5 * slowest_first[-1]


@pytest.mark.parametrize("size", SIZES)
def test_fewer_lanes_are_not_faster(size: int) -> None:
    assert seconds("2xl40s", size, width=8) > seconds("2xl40s", size)
    # Through the host the copies are what is slow, until the slot is slower still.
    assert seconds("2xrtx4090", size, width=8) == seconds("2xrtx4090", size)
    assert seconds("2xrtx4090", size, width=2) > seconds("2xrtx4090", size)
    assert seconds("2xa100-80g", size, width=8) == seconds("2xa100-80g", size)


@pytest.mark.parametrize("size", SIZES)
def test_four_cards_of_one_bridge_share_it_and_eight_cross_two(size: int) -> None:
    two, four, eight = (seconds(f"{n}xl40s", size) for n in (2, 4, 8))
    assert two < four < eight < 2 * four
    linked = [seconds(f"{n}xa100-80g", size) for n in (2, 4)]
    assert linked[1] / linked[0] < four / two


def test_half_a_latency_grows_with_the_tree_and_a_ring_sends_all_but_its_own() -> None:
    two, four = (AllReduce(ranks=n, latency=1e-5, bandwidth=1e9) for n in (2, 4))
    assert two.seconds(0) == 1e-5
    assert four.seconds(0) == pytest.approx(1.5e-5)
    assert two.seconds(1e9) == pytest.approx(1 + 1e-5)
    assert four.seconds(1e9) == pytest.approx(1.5 + 1.5e-5)


def test_what_is_not_known_of_a_slot_counts_as_the_older() -> None:
    machine = parse_spec("2xrtx4090,p2p=all")
    blind = tuple(replace(gpu, pcie=Pcie()) for gpu in machine.gpus)
    known = all_reduce_of(machine, machine.gpus, rates())
    older = all_reduce_of(replace(machine, gpus=blind), blind, rates())
    assert older.bandwidth == known.bandwidth / 2


def test_a_slot_of_no_lanes_is_not_known() -> None:
    machine = parse_spec("2xrtx4090,p2p=all")
    mute, blind = (
        tuple(replace(gpu, pcie=pcie) for gpu in machine.gpus)
        for pcie in (Pcie(generation=0, width=0), Pcie())
    )
    told = all_reduce_of(replace(machine, gpus=mute), mute, rates())
    assert told == all_reduce_of(replace(machine, gpus=blind), blind, rates())
