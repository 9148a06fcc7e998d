"""A machine as text: its GPUs, who holds them, its links, and what was measured of it."""

from __future__ import annotations

from msgspec.structs import replace

from tests.support.plans import machine
from turbofit.core.machine import Holder, Link
from turbofit.core.struct import NA
from turbofit.report.painters.terminal import paint
from turbofit.report.views.machine_view import machine_view


def test_holders_are_the_first_few_and_warnings_all() -> None:
    holders = tuple(Holder(pid=pid, name=f"python{pid}", bytes=pid << 30) for pid in range(1, 6))
    found = machine(2)
    held = replace(found.gpus[1], holders=holders)
    warnings = tuple(f"warning {number}" for number in range(5))
    found = replace(found, gpus=(found.gpus[0], held), warnings=warnings)
    text = paint(machine_view(found), short=True)
    assert "python5 (5) 5.0 GiB of GPU 1; python4 (4) 4.0 GiB of GPU 1;" in text
    assert "2 more" in text
    assert all(warning in text for warning in warnings)


def test_links_and_what_could_not_be_read() -> None:
    cards = list(machine(3).gpus)
    pcie = replace(cards[2].pcie, generation=NA, width=16)
    cards[2] = replace(cards[2], free=NA, mig=True, pcie=pcie)
    links = (
        Link(a=0, b=1, p2p_read=True, p2p_write=True, nvlinks=4),
        Link(a=0, b=2, p2p_read=False, p2p_write=False, ancestor="node"),
        Link(a=1, b=2, p2p_read=True, p2p_write=False, ancestor="system"),
    )
    found = replace(machine(3), gpus=tuple(cards), links=links, visible=(0, 1))
    text = paint(machine_view(found))
    lines = text.splitlines()
    links = lines[lines.index("Links") + 1 :][:3]
    assert links == [
        "  - 1 pair (0-1): NVLink, 4 lanes",
        "  - 1 pair (0-2): no peer access, through host memory (in a NUMA node)",
        "  - 1 pair (1-2): peer access one way alone (between NUMA nodes)",
    ]
    assert "(not visible)" in text
    assert "NA x16" in text
