from __future__ import annotations

from pathlib import Path

import pytest

from turbofit.core.struct import NA
from turbofit.core.units import GIB
from turbofit.machine.host import read_host


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
