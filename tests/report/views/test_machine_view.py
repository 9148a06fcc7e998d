"""A machine as text: its GPUs, who holds them, its links, and what was measured of it."""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from tests.support.plans import machine
from turbofit.core.machine import CardSpeed, Holder, Link, Machine, Measured, PairSpeed, ReduceSpeed
from turbofit.core.struct import NA
from turbofit.core.units import MIB
from turbofit.machine.spec import parse_spec
from turbofit.report.painters import terminal
from turbofit.report.painters.terminal import paint
from turbofit.report.views.machine_view import machine_view


def lines(found: Machine) -> list[str]:
    return paint(machine_view(found), short=True).splitlines()


def test_equal_gpus_are_one_row() -> None:
    eight = lines(parse_spec("8xa100-80g"))
    assert len(eight) <= 10
    assert sum("A100" in line for line in eight) == 1
    assert any(line.split()[0] == "0-7" for line in eight)
    assert max(map(len, eight)) <= 80
    mixed = lines(parse_spec("rtx3090+2xrtx4090"))
    assert [line.split()[0] for line in mixed if "GeForce" in line] == ["0", "1-2"]


def test_holders_are_the_first_few_and_warnings_all() -> None:
    holders = tuple(Holder(pid=pid, name=f"python{pid}", bytes=pid << 30) for pid in range(1, 6))
    found = machine(2)
    held = replace(found.gpus[1], holders=holders)
    warnings = tuple(f"warning {number}" for number in range(5))
    text = "\n".join(lines(replace(found, gpus=(found.gpus[0], held), warnings=warnings)))
    assert "python5 (5) 5.0 GiB of GPU 1; python4 (4) 4.0 GiB of GPU 1;" in text
    assert "2 more" in text
    assert all(warning in text for warning in warnings)


def test_what_was_measured_is_told_by_the_slowest() -> None:
    measured = Measured(
        torch="2.12.1",
        cards=(
            CardSpeed(index=0, bandwidth=8e11, flops=7e13),
            CardSpeed(index=1, bandwidth=7e11, flops=8e13),
        ),
        pairs=(
            PairSpeed(
                source=0, target=1, bandwidth=2e10, host_bandwidth=1e10, latency=1e-5, peer=True,
                right=False,
            ),
        ),
    )  # fmt: skip
    text = " ".join("\n".join(lines(replace(machine(2), measured=measured))).split())
    assert "a card at least 700 GB/s, 70.0 TFLOP/s; a pair at least 20.0 GB/s" in text
    assert "1 pairs copy wrong data" in text


def test_a_measured_machine_shows_what_cards_and_links_reached() -> None:
    pairs = tuple(
        PairSpeed(
            source=a, target=1 - a, peer=a == 0, right=a == 0, bandwidth=2.2e10, latency=9e-6,
            host_bandwidth=8e9,
        )
        for a in (0, 1)
    )  # fmt: skip
    found = Measured(
        torch="2.9",
        cards=(CardSpeed(index=0, bandwidth=8.41e11, flops=6.1e13),),
        pairs=pairs,
        reduces=(ReduceSpeed(gpus=(0, 1), size=8192, seconds=2.1e-5, right=True),),
        left_out=("pair of [1, 0]: no time left",),
    )
    text = terminal.paint(machine_view(msgspec.structs.replace(machine(2), measured=found)))
    lines = [line.split() for line in text.splitlines()]
    assert ["0", "841", "61.0"] in lines
    assert ["0-1", "22.0", "8.0", "9.0", "peer", "access"] in lines
    assert ["1-0", "22.0", "8.0", "9.0", "wrong", "data"] in lines
    assert ["0+1", "8,192", "21", "right"] in lines
    assert "no time left" in text


def test_the_machine() -> None:
    holder = Holder(pid=4711, name="python", bytes=3 * 1024 * MIB)
    cards = list(machine(3).gpus)
    cards[2] = msgspec.structs.replace(cards[2], holders=(holder,), free=NA, mig=True)
    links = (
        Link(a=0, b=1, p2p_read=True, p2p_write=True, nvlinks=4),
        Link(a=0, b=2, p2p_read=False, p2p_write=False, ancestor="node"),
        Link(a=1, b=2, p2p_read=True, p2p_write=False, ancestor="system"),
    )
    seen = msgspec.structs.replace(
        machine(3), gpus=tuple(cards), links=links, visible=(0, 1), warnings=("odd",)
    )
    text = terminal.paint(machine_view(seen))
    lines = text.splitlines()
    assert "4711" in text
    assert "3,072.0" in text
    assert "odd" in text
    links = lines[lines.index("Links") + 1 :][:3]
    assert links == [
        "  - 1 pair (0-1): NVLink, 4 lanes",
        "  - 1 pair (0-2): no peer access, through host memory (in a NUMA node)",
        "  - 1 pair (1-2): peer access one way alone (between NUMA nodes)",
    ]
    assert "(not visible)" in text
    assert "NA" in text
    assert "nobody" in terminal.paint(machine_view(machine(1)))


def test_a_generation_of_pcie_that_could_not_be_read_is_na_alone() -> None:
    (card,) = machine(1).gpus
    known = msgspec.structs.replace(card.pcie, generation=NA, width=16)
    seen = msgspec.structs.replace(machine(1), gpus=(msgspec.structs.replace(card, pcie=known),))
    assert "NA x16" in terminal.paint(machine_view(seen))
