"""Each check: in order, failing, unreadable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.diagnose.conftest import Healthy, card, server_card
from tests.nvml.standin import LOST, P2P_ALL, P2P_NVLINK, UNKNOWN_ERROR, Mig, Process, Scenario
from tests.waiting import HANG
from turbofit.core.machine import Host, Machine
from turbofit.core.struct import NA
from turbofit.core.units import GIB, MIB
from turbofit.diagnose.doctor import examine as examine_module
from turbofit.diagnose.doctor import sources as sources_module
from turbofit.diagnose.doctor.about_links import acs_control
from turbofit.diagnose.doctor.about_packages import satisfies
from turbofit.diagnose.doctor.finding import Finding
from turbofit.diagnose.doctor.sources import Sources
from turbofit.model.presets import preset_model
from turbofit.planning.compatibility import compatibility

Make = Callable[..., Healthy]
Find = Callable[..., Finding]


def two(**changes: Any) -> Scenario:
    """Two server cards that reach each other over NVLink."""
    return Scenario([server_card(0, **changes), server_card(1, **changes)], p2p=P2P_NVLINK)


@pytest.fixture(autouse=True)
def roomy_host(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The host's figures, which a test may change before it looks."""
    host: dict[str, Any] = {
        "ram_total": 64 * GIB, "ram_available": 48 * GIB, "shm_available": 32 * GIB, "cpus": 16,
    }  # fmt: skip
    real = examine_module.measure

    def measure(environ: Any) -> Machine:
        return msgspec.structs.replace(real(environ), host=Host(**host))

    monkeypatch.setattr(examine_module, "measure", measure)
    return host


def test_a_machine_in_order(checkup: Any, sources: Make) -> None:
    report = checkup(two(), sources())
    assert {one.state for one in report.findings} == {"ok"}, [
        one for one in report.findings if one.state != "ok"
    ]
    assert report.exit_code == 0
    assert len({one.check for one in report.findings}) == len(report.findings) >= 24


def test_every_finding_but_ok_has_a_reason_and_a_fix(checkup: Any, sources: Make) -> None:
    places = sources(WORLD_SIZE="4")
    places.packages.clear()
    report = checkup(Scenario([card(0, used=23 * GIB, total=24576 * MIB), card(1)]), places)
    bad = [one for one in report.findings if one.state in ("warning", "stops")]
    assert len(bad) > 4
    assert all(one.why and one.fix for one in bad)
    assert report.exit_code == 3
    assert report.count("stops") == sum(one.state == "stops" for one in report.findings)


def test_no_driver_is_exit_4_with_the_rest_still_checked(checkup: Any, sources: Make) -> None:
    report = checkup(None, sources())
    assert report.exit_code == 4
    assert report.machine is None
    first = report.findings[0]
    assert (first.check, first.state) == ("nvml", "stops")
    states = {one.check: one.state for one in report.findings}
    assert states["lmdeploy"] == "ok"
    assert states["driver_cuda"] == states["host_memory"] == "unreadable"


PACKAGES = [
    ("lmdeploy", "stops", lambda s: s.packages.pop("lmdeploy")),
    ("lmdeploy", "stops", lambda s: s.packages.update(lmdeploy="0.9.2")),
    ("lmdeploy", "warning", lambda s: s.packages.update(lmdeploy="0.19.0")),
    ("lmdeploy", "warning", lambda s: s.packages.update(lmdeploy="0.17.1")),
    ("pairing", "warning", lambda s: s.packages.update(torch="2.13.0+cpu")),
    ("pairing", "warning", lambda s: s.packages.update(transformers="5.0.2")),
    ("pairing", "unreadable", lambda s: setattr(s, "demands", None)),
    ("pairing", "unreadable", lambda s: setattr(s, "demands", ["numpy"])),
    ("turbomind", "stops", lambda s: _remove(s, "lmdeploy/turbomind")),
    ("turbomind", "unreadable", lambda s: _remove(s, "lmdeploy")),
    ("driver_cuda", "stops", lambda s: _torch(s, "'13.0'")),
    ("driver_cuda", "stops", lambda s: _torch(s, "None")),
    ("driver_cuda", "unreadable", lambda s: _remove(s, "torch")),
    ("torch_architectures", "stops", lambda s: setattr(s, "built", ["sm_80"])),
    ("torch_architectures", "unreadable", lambda s: setattr(s, "built", None)),
    ("torch_architectures", "unreadable", lambda s: _torch(s, "None")),
]


def _remove(places: Healthy, folder: str) -> None:
    import shutil

    shutil.rmtree(places.root / folder)


def _torch(places: Healthy, cuda: str) -> None:
    (places.root / "torch/version.py").write_text(f"cuda: Optional[str] = {cuda}\n")


@pytest.mark.parametrize(("check", "state", "spoil"), PACKAGES)
def test_packages(find: Find, sources: Make, check: str, state: str, spoil: Any) -> None:
    places = sources()
    spoil(places)
    assert find(check, two(), places).state == state


def test_a_pair_that_does_not_run_the_model(find: Find, sources: Make) -> None:
    places, llava = sources(), preset_model("llava-1.5-7b")
    found = find("front_ends", two(), places, model=llava)
    assert found.state == "stops"
    assert found.fix.endswith("pip install 'transformers<5'")
    assert "fails at every image" in found.seen
    assert find("front_ends", two(), places, model=preset_model("qwen2-vl-7b")).state == "ok"
    places.packages["transformers"] = "4.57.6"
    assert find("front_ends", two(), places, model=llava).state == "ok"
    places.packages["transformers"] = "4.53.3"  # LMDeploy's metadata exclude it
    found = find("front_ends", two(), places, model=preset_model("internvl3-8b-hf"))
    assert found.state == "warning"
    assert "GptOssConfig" in found.seen


def test_families_that_the_pair_does_not_run(find: Find, sources: Make) -> None:
    places = sources()
    places.packages["transformers"] = compatibility().transformers["0.18"][-1]
    found = find("front_ends", two(), places)
    assert found.state == "ok"
    assert "Glm4vForConditionalGeneration (<=5.19.0)" in found.seen
    assert "Llava" not in found.seen
    assert "+" not in found.seen
    places.packages["transformers"] = "4.56.2"
    found = find("front_ends", two(), places)
    assert found.state == "warning"
    assert "Qwen3VLForConditionalGeneration" in found.seen
    assert ">=4.57.6" in found.seen
    assert "Qwen2VL" not in found.seen
    del places.packages["transformers"]
    assert find("front_ends", two(), places).state == "unreadable"


def test_two_wheels_of_nccl_own_one_file(find: Find, sources: Make) -> None:
    places = sources()
    places.packages["nvidia-nccl-cu13"], places.records["nvidia-nccl-cu13"] = "2.29.7", 300
    found = find("nccl", two(), places)
    assert found.state == "ok"
    assert "nvidia-nccl-cu12 2.32.3, written over nvidia-nccl-cu13 2.29.7" in found.seen
    library = places.root / "libnccl.so.2"
    library.write_bytes(bytes(300))
    found = find("nccl", two(), places)
    assert found.state == "warning"
    assert found.fix.endswith("nvidia-nccl-cu12==2.32.3")
    library.write_bytes(bytes(7))
    assert find("nccl", two(), places).state == "unreadable"
    library.unlink()
    found = find("nccl", two(), places)
    assert found.state == "stops"
    assert found.fix == "pip install --force-reinstall --no-deps nvidia-nccl-cu12==2.32.3"
    places.records.clear()
    assert find("nccl", two(), places).state == "unreadable"


def test_an_old_driver(find: Find, sources: Make) -> None:
    scenario = two()
    scenario.cuda = 11080
    found = find("driver_cuda", scenario, sources())
    assert found.state == "stops"
    assert "12.8" in found.seen
    scenario.cuda, scenario.driver = 12000, "520.61.05"
    assert find("driver_cuda", scenario, sources()).state == "stops"
    scenario.driver = None
    assert find("driver_cuda", scenario, sources()).state == "unreadable"


def test_a_v100_with_torch_for_cuda_13(find: Find, sources: Make) -> None:
    places = sources()
    places.built = ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120", "compute_120"]
    v100 = Scenario([card(name="Tesla V100-SXM2-32GB", cc=70, total=32768 * MIB)])
    found = find("torch_architectures", v100, places)
    assert found.state == "stops"
    assert "CUDA 12" in found.fix
    assert find("compute_capability", v100, sources()).state == "warning"
    none = Scenario([card(name="Nobody", cc=None)])
    assert find("compute_capability", none, sources()).state == "unreadable"


def test_visible_devices(find: Find, sources: Make) -> None:
    found = find("cuda_visible_devices", two(), sources(CUDA_VISIBLE_DEVICES="1"))
    assert found.state == "warning"
    assert "GPU 0" in found.seen


def test_all_hidden_stops_and_the_machine_is_still_read(checkup: Any, sources: Make) -> None:
    report = checkup(two(), sources(CUDA_VISIBLE_DEVICES="5"))
    assert report.exit_code == 3
    states = {one.check: one.state for one in report.findings}
    assert states["cuda_visible_devices"] == "stops"
    assert states["gpus"] == "ok"


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


@pytest.mark.parametrize("check", ["pcie", "persistence", "ecc", "thermal"])
def test_a_described_machine_has_no_condition(find: Find, sources: Make, check: str) -> None:
    assert find(check, None, sources(), on="2xl4").state == "unreadable"


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
    _remove(places, "sys/kernel")
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
    _remove(places, "sys/bus")
    assert find("acs", scenario, places).state == "unreadable"


def test_acs_control_of_a_loop_ends() -> None:
    data = bytearray(4096)
    data[0x100:0x104] = (0x0001 | 0x100 << 20).to_bytes(4, "little")
    assert acs_control(bytes(data)) is None
    assert acs_control(b"") is None


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


@pytest.mark.parametrize(
    ("available", "state"),
    [(48 * GIB, "ok"), (6 * GIB, "warning"), (2 * GIB, "stops"), (NA, "unreadable")],
)
def test_host_memory(
    find: Find, sources: Make, roomy_host: dict[str, Any], available: Any, state: str
) -> None:
    roomy_host["ram_available"] = available
    assert find("host_memory", two(), sources()).state == state


@pytest.mark.parametrize(
    ("available", "alone", "state"),
    [
        (64 * MIB, False, "stops"), (600 * MIB, False, "warning"), (4 * GIB, False, "ok"),
        (64 * MIB, True, "ok"), (NA, False, "unreadable"),
    ],
)  # fmt: skip
def test_shared_memory(
    find: Find, sources: Make, roomy_host: dict[str, Any], available: Any, alone: bool, state: str
) -> None:
    roomy_host["shm_available"] = available
    scenario = Scenario([card(0)] if alone else [card(0), card(1)])
    assert find("shared_memory", scenario, sources()).state == state


def test_locked_memory(find: Find, sources: Make) -> None:
    places = sources()
    places.locked = 64 * 1024
    assert find("locked_memory", two(), places).state == "ok"
    (places.root / "sys/class/infiniband/mlx5_0").mkdir()
    found = find("locked_memory", two(), places)
    assert found.state == "warning"
    assert "mlx5_0" in found.seen
    places.locked = NA
    assert find("locked_memory", two(), places).state == "unreadable"


def test_disk(find: Find, sources: Make) -> None:
    places = sources(HF_HOME="/data/hub")
    places.disk = (5 * GIB, True)
    found = find("disk", two(), places)
    assert found.state == "warning"
    assert "/data/hub" in found.seen
    places.disk = (500 * GIB, False)
    assert find("disk", two(), places).state == "warning"
    places.disk = None
    assert find("disk", two(), places).state == "unreadable"


def test_port(find: Find, sources: Make) -> None:
    places = sources()
    places.port = "port 23333 cannot be used: Address already in use"
    found = find("port", two(), places)
    assert found.state == "stops"
    assert "23333" in found.fix
    places.port = "port 80 cannot be used: Permission denied"
    assert find("port", two(), places, port=80).state == "unreadable"


def test_a_real_port_that_is_taken() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        problem = Sources({}).port_problem("127.0.0.1", taken.getsockname()[1])
    assert problem is not None
    assert "in use" in problem


def test_rank_launcher(find: Find, sources: Make) -> None:
    found = find("rank_launcher", two(), sources(WORLD_SIZE="4", LOCAL_RANK="0"))
    assert found.state == "stops"
    assert "WORLD_SIZE=4" in found.seen
    alone = Scenario([card(0)])
    assert find("rank_launcher", alone, sources(WORLD_SIZE="4")).state == "ok"


@pytest.mark.parametrize(
    ("name", "value"),
    [("CUDA_LAUNCH_BLOCKING", "1"), ("CUDA_MODULE_LOADING", "EAGER"), ("TM_LOG_LEVEL", "DEBUG"),
     ("LD_PRELOAD", "/x/libturbofit_pretend.so")],
)  # fmt: skip
def test_variables(find: Find, sources: Make, name: str, value: str) -> None:
    found = find("environment", two(), sources(**{name: value}))
    assert found.state == "warning"


def test_real_sources_never_fail(tmp_path: Path) -> None:
    places = Sources({"PATH": "/nowhere"}, str(tmp_path))
    assert places.text("proc/cmdline") is None
    assert places.names("sys") is None
    assert places.data("x") is None
    assert places.version("no-such-package-at-all") is None
    assert places.requires("no-such-package-at-all") is None
    assert places.package_folder("no_such_package_at_all") is None
    assert places.recorded("no-such-package-at-all", "x") is None
    assert places.recorded("msgspec", "no-such-file") is None
    path, size = places.recorded("msgspec", "inspect.py") or (tmp_path, 0)
    assert path.stat().st_size == size
    assert places.kernel_log() is None
    assert places.disk_free(str(tmp_path / "a/b")) is not None
    (tmp_path / "var/log").mkdir(parents=True)
    (tmp_path / "var/log/kern.log").write_text("NVRM: Xid (PCI:0000:01:00): 31")
    assert "Xid" in (places.kernel_log() or "")
    limit = Sources({}).locked_memory()
    assert limit is None or limit == NA or limit >= 0


@pytest.mark.parametrize(
    ("script", "answer"),
    [
        ("#!/bin/sh\necho sm_80 sm_90\n", ["sm_80", "sm_90"]),
        ("#!/bin/sh\nkill -STOP $$\n", None),
        ("#!/bin/sh\nexit 1\n", None),
    ],
)
def test_torch_is_asked_in_a_child_with_a_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, answer: list[str] | None
) -> None:
    python = tmp_path / "python"
    python.write_text(script)
    python.chmod(0o755)
    monkeypatch.setattr(sources_module.sys, "executable", str(python))
    monkeypatch.setattr(sources_module, "CHILD_SECONDS", 0.1 if "STOP" in script else HANG)
    assert Sources().torch_architectures() == answer


@pytest.mark.parametrize(
    ("version", "bounds", "fits"),
    [
        ("2.12.1", "<=2.12.1,>=2.0.0", True), ("2.13.0+cpu", "<=2.12.1", False),
        ("5.0.3", "!=5.0.*", False), ("5.1", "!=5.0.*,>=4.56.0", True), ("2", ">=2.0.0", True),
        ("3.1", "~=3.0", True), ("4.0", "~=3.0", False), ("1.0", "", True), ("1.0", "==1.0", True),
    ],
)  # fmt: skip
def test_bounds(version: str, bounds: str, fits: bool) -> None:
    assert satisfies(version, bounds) is fits
