"""Checks of the cards: who uses them, whether they are in order."""

from __future__ import annotations

import pytest

from tests.diagnose.conftest import card, server_card
from tests.diagnose.doctor.support import Find, Make, two
from tests.nvml.standin import LOST, P2P_NVLINK, UNKNOWN_ERROR, Mig, Process, Scenario
from turbofit.core.units import GIB, MIB
from turbofit.diagnose.doctor.examine import examine


def test_visible_devices(find: Find, sources: Make) -> None:
    found = find("cuda_visible_devices", two(), sources(CUDA_VISIBLE_DEVICES="1"))
    assert found.state == "warning"
    assert "GPU 0" in found.seen


def test_mixed_cards_numbered_by_speed(find: Find, sources: Make) -> None:
    mixed = Scenario([card(0), card(1, name="NVIDIA GeForce RTX 4090", cc=89, cores=16384)])
    found = find("cuda_visible_devices", mixed, sources(CUDA_VISIBLE_DEVICES="0,1"))
    assert found.state == "warning"
    assert "PCI_BUS_ID" in found.seen


def test_a_lost_gpu(find: Find, sources: Make) -> None:
    scenario = Scenario([server_card(0), server_card(1, error=LOST)], p2p=P2P_NVLINK)
    found = find("gpus", scenario, sources())
    assert found.state == "stops"
    assert "GPU 1" in found.seen


def test_others_on_the_card(find: Find, sources: Make) -> None:
    scenario = two(used=3 * GIB)
    scenario.gpus[0].compute = [Process(4711, 2 * GIB, "python3")]
    found = find("holders", scenario, sources())
    assert found.state == "warning"
    assert "GPU 0: python3[4711] 2.0 GiB" in found.seen
    assert "GPU 1: unknown (another container?) 3.0 GiB" in found.seen
    scenario.gpus[1].total = None
    assert find("holders", scenario, sources()).state == "unreadable"


def test_full_cards(find: Find, sources: Make) -> None:
    assert find("free_memory", two(used=80 * 1024 * MIB - GIB), sources()).state == "stops"
    one_full = Scenario([server_card(0), server_card(1, used=79 * GIB)], p2p=P2P_NVLINK)
    assert find("free_memory", one_full, sources()).state == "warning"
    unknown = Scenario([server_card(0, total=None)])
    assert find("free_memory", unknown, sources()).state == "unreadable"


def test_mig(find: Find, sources: Make) -> None:
    part = Mig(uuid="MIG-1", total=20 * GIB)
    cut = Scenario([server_card(0, mig=True, migs=[part])])
    assert find("mig", cut, sources()).state == "warning"
    empty = Scenario([server_card(0, mig=True), server_card(1)], p2p=P2P_NVLINK)
    assert find("mig", empty, sources()).state == "stops"


CONDITIONS = [
    ("pcie", "warning", {"pcie_width_now": 8}),
    ("pcie", "warning", {"pcie_generation_now": 3}),
    ("pcie", "ok", {"pcie_generation_now": 1, "pstate": 8}),
    ("pcie", "unreadable", {"pcie_width_now_error": UNKNOWN_ERROR}),
    ("persistence", "warning", {"persistence": 0}),
    ("persistence", "unreadable", {"persistence_error": UNKNOWN_ERROR}),
    ("ecc", "warning", {"ecc_errors": 2}),
    ("ecc", "stops", {"rows_failed": 1}),
    ("ecc", "warning", {"rows_pending": 1}),
    ("ecc", "unreadable", {"ecc_errors_error": UNKNOWN_ERROR}),
    ("ecc", "unreadable", {"ecc_error": UNKNOWN_ERROR}),
    ("thermal", "warning", {"slow": 0x40, "temperature": 96}),
    ("thermal", "ok", {"slow": 0x04}),
    ("thermal", "unreadable", {"slow_error": UNKNOWN_ERROR}),
]


@pytest.mark.parametrize(("check", "state", "condition"), CONDITIONS)
def test_conditions(
    find: Find, sources: Make, check: str, state: str, condition: dict[str, int]
) -> None:
    scenario = Scenario([server_card(0), server_card(1, condition=condition)], p2p=P2P_NVLINK)
    assert find(check, scenario, sources()).state == state


def test_cards_without_ecc_are_in_order(find: Find, sources: Make) -> None:
    scenario = Scenario([card(0)])
    for name in ("ecc", "ecc_errors", "rows_pending", "rows_failed"):
        del scenario.gpus[0].condition[name]
    found = find("ecc", scenario, sources())
    assert (found.state, found.seen) == ("ok", "these cards have no ECC")


def test_a_described_machine_has_no_condition(sources: Make) -> None:
    """Its cards do not exist: nothing of them is unreadable."""
    found = {one.check for one in examine(sources(), on="2xl4").findings}
    assert not found & {"pcie", "persistence", "ecc", "thermal", "driver_cuda"}
    assert {"gpus", "peer_access", "host_memory"} <= found


def test_xid(find: Find, sources: Make) -> None:
    places = sources()
    places.log = "NVRM: Xid (PCI:0000:41:00): 79, GPU has fallen off the bus."
    found = find("xid", two(), places)
    assert found.state == "warning"
    assert "79" in found.seen
    assert "hardware" in found.why
    places.log = "NVRM: Xid (PCI:0000:41:00): 13, Graphics Exception"
    assert "programs" in find("xid", two(), places).why
    places.log = None
    assert find("xid", two(), places).state == "unreadable"
