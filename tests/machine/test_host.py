from __future__ import annotations

from pathlib import Path

import pytest

from turbofit.core.machine import Gpu, Host, Machine
from turbofit.core.struct import NA, to_json
from turbofit.core.units import GIB
from turbofit.machine.host import read_host, unified_memory_note
from turbofit.machine.source import machine_from


class Tree:
    """Fake `/proc`, `/sys/fs/cgroup` and `/dev/shm`."""

    def __init__(self, root: Path) -> None:
        self.proc, self.cgroup, self.shm = root / "proc", root / "cgroup", root / "shm"
        self.shm.mkdir()
        self.put(self.proc / "meminfo", "MemTotal: 67108864 kB\nMemAvailable:   33554432 kB\n")

    def put(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def read(self):
        return read_host(proc=str(self.proc), cgroup=str(self.cgroup), shm=str(self.shm))


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_cgroup_v2_limit_of_a_parent(tree: Tree):
    tree.put(tree.proc / "self/cgroup", "0::/pod/container\n")
    tree.put(tree.cgroup / "pod/container/memory.max", "max\n")
    tree.put(tree.cgroup / "pod/container/memory.current", f"{GIB}\n")
    tree.put(tree.cgroup / "pod/memory.max", f"{16 * GIB}\n")
    tree.put(tree.cgroup / "pod/memory.current", f"{10 * GIB}\n")
    tree.put(tree.cgroup / "pod/memory.stat", f"anon 5\ninactive_file {2 * GIB}\n")
    host = tree.read()
    assert (host.ram_total, host.ram_available) == (16 * GIB, 8 * GIB)


def test_cgroup_v2_path_that_the_container_does_not_show(tree: Tree):
    tree.put(tree.proc / "self/cgroup", "0::/../../elsewhere\n")
    tree.put(tree.cgroup / "memory.max", f"{4 * GIB}\n")
    tree.put(tree.cgroup / "memory.current", f"{5 * GIB}\n")
    assert tree.read().ram_available == 0


def test_cgroup_v1(tree: Tree):
    tree.put(tree.proc / "self/cgroup", "5:cpu,cpuacct:/a\n4:memory:/a\n")
    tree.put(tree.cgroup / "memory/a/memory.limit_in_bytes", f"{8 * GIB}\n")
    tree.put(tree.cgroup / "memory/a/memory.usage_in_bytes", f"{3 * GIB}\n")
    tree.put(tree.cgroup / "memory/a/memory.stat", f"total_inactive_file {GIB}\n")
    tree.put(tree.cgroup / "memory/memory.limit_in_bytes", "9223372036854771712\n")
    tree.put(tree.cgroup / "memory/memory.usage_in_bytes", f"{40 * GIB}\n")
    host = tree.read()
    assert (host.ram_total, host.ram_available) == (8 * GIB, 6 * GIB)


def test_nothing_readable_is_na(tmp_path: Path):
    host = read_host(proc=str(tmp_path / "p"), cgroup=str(tmp_path / "c"), shm=str(tmp_path / "s"))
    assert (host.ram_total, host.ram_available, host.shm_available) == (NA, NA, NA)


def test_garbage_is_na(tree: Tree):
    tree.put(tree.proc / "meminfo", "MemTotal: lots\n\x00\nMemAvailable\n")
    tree.put(tree.proc / "self/cgroup", "nonsense\n0::\n")
    tree.put(tree.cgroup / "memory.max", "12 apples")
    host = tree.read()
    assert (host.ram_total, host.ram_available) == (NA, NA)


def gpu(name: str, capability=NA, index: int = 0, size=64 * GIB) -> Gpu:
    return Gpu(
        index=index, uuid=f"GPU-{index}", name=name, total=size, reserved=0, used=0, free=size,
        compute_capability=capability,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "capability", "says"),
    [
        ("NVIDIA GB10", (12, 1), "shares the host's memory"), ("Orin (nvgpu)", (8, 7), "shares"),
        ("NVIDIA Thor", (11, 0), "shares"), ("some name", (8, 7), "shares"),
        ("some name", (5, 3), "shares"), ("some name", (12, 1), "shares"),
        ("NVIDIA Jetson AGX Orin", NA, "shares"), ("NVIDIA GH200 480GB", (9, 0), "NUMA node"),
        ("NVIDIA GB200", (10, 0), "NUMA node"),
    ],
)  # fmt: skip
def test_shared_memory_counts_page_cache_as_used(name, capability, says):
    note = unified_memory_note(gpu(name, capability))
    assert says in note
    assert name in note
    assert "page cache" in note
    assert "drop_caches" in note
    assert "github.com/" in note


@pytest.mark.parametrize(
    ("name", "capability"),
    [("NVIDIA GeForce RTX 3090", (8, 6)), ("NVIDIA B200", (10, 0)), ("NVIDIA RTX A6000", NA)],
)
def test_a_card_with_memory_of_its_own_has_no_note(name, capability):
    assert unified_memory_note(gpu(name, capability)) is None


def machine(*gpus: Gpu) -> Machine:
    return Machine(
        name="m", source="snapshot", gpus=gpus, links=(), host=Host(ram_total=NA, ram_available=NA),
        visible=tuple(range(len(gpus))),
    )  # fmt: skip


def test_a_machine_says_so_once_for_each_kind_of_card(tmp_path):
    path = tmp_path / "orin.json"
    cards = [gpu("Orin", (8, 7)), gpu("Orin", (8, 7), 1), gpu("NVIDIA L4", (8, 9), 2)]
    path.write_text(to_json(machine(*cards)))
    found = machine_from(str(path))
    assert len([text for text in found.warnings if "page cache" in text]) == 1
    path.write_text(to_json(found))
    assert machine_from(str(path)).warnings == found.warnings
