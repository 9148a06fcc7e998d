"""What was measured on a machine is kept for it, and for no other."""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace

from turbofit.core.machine import CardSpeed, Machine, Measured, PairSpeed
from turbofit.machine.learned import keep, recall, with_measured
from turbofit.machine.spec import parse_spec
from turbofit.planning.speed import LinkClass, group_class

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
