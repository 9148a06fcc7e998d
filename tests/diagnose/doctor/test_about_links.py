"""Checks of the links between cards: peers, IOMMU, ACS."""

from __future__ import annotations

from tests.diagnose.conftest import Healthy, card
from tests.diagnose.doctor.support import Find, Make, remove
from tests.nvml.standin import P2P_ALL, P2P_NVLINK, Scenario
from turbofit.diagnose.doctor.about_links import acs_control


def test_peers_of_consumer_cards(find: Find, sources: Make) -> None:
    scenario = Scenario([card(index) for index in range(4)])
    scenario.pairs[0, 2] = P2P_NVLINK
    for one, other in ((0, 2), (2, 0)):
        scenario.gpus[one].links = [scenario.gpus[other].bus] * 4
    found = find("peer_access", scenario, sources())
    assert found.state == "warning"
    assert "0-1" in found.seen
    assert "0-2" not in found.seen
    assert "NVLink joins 0-2" in found.fix
    assert "GeForce" in found.why
    scenario.p2p = None
    scenario.pairs = {}
    assert find("peer_access", scenario, sources()).state == "unreadable"
    assert find("peer_access", Scenario([card(0)]), sources()).state == "ok"


def test_iommu(find: Find, sources: Make) -> None:
    scenario = Scenario([card(0), card(1)], p2p=P2P_ALL)
    places = sources()
    assert find("iommu", scenario, places).state == "ok"
    (places.root / "sys/kernel/iommu_groups/0").mkdir()
    assert find("iommu", scenario, places).state == "warning"
    (places.root / "proc/cmdline").write_text("quiet iommu=pt")
    assert find("iommu", scenario, places).state == "ok"
    remove(places, "sys/kernel")
    assert find("iommu", scenario, places).state == "unreadable"
    assert find("iommu", Scenario([card(0), card(1)]), places).state == "ok"


def _bridge(places: Healthy, name: str, config: bytes) -> None:
    folder = places.root / "sys/bus/pci/devices" / name
    folder.mkdir()
    (folder / "class").write_text("0x060400\n")
    (folder / "config").write_bytes(config)


def _config(control: int) -> bytes:
    """A configuration space whose second extended capability is ACS."""
    data = bytearray(4096)
    data[0x100:0x104] = (0x0001 | 1 << 16 | 0x140 << 20).to_bytes(4, "little")
    data[0x140:0x144] = (0x000D | 1 << 16).to_bytes(4, "little")
    data[0x146:0x148] = control.to_bytes(2, "little")
    return bytes(data)


def test_acs(find: Find, sources: Make) -> None:
    scenario = Scenario([card(0), card(1)], p2p=P2P_ALL)
    places = sources()
    _bridge(places, "0000:00:01.0", _config(0))
    assert find("acs", scenario, places).state == "ok"
    _bridge(places, "0000:00:02.0", b"\0" * 64)
    assert find("acs", scenario, places).state == "unreadable"
    _bridge(places, "0000:00:03.0", _config(0x1D))
    found = find("acs", scenario, places)
    assert found.state == "warning"
    assert "0000:00:03.0" in found.seen
    remove(places, "sys/bus")
    assert find("acs", scenario, places).state == "unreadable"


def test_acs_control_of_a_loop_ends() -> None:
    data = bytearray(4096)
    data[0x100:0x104] = (0x0001 | 0x100 << 20).to_bytes(4, "little")
    assert acs_control(bytes(data)) is None
    assert acs_control(b"") is None
