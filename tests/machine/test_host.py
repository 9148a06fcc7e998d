from __future__ import annotations

from pathlib import Path

import pytest

from turbofit.core.struct import NA
from turbofit.core.units import GIB
from turbofit.machine.host import host_kills, read_host, usable_cores

MEMORY = {"proc/meminfo": "MemTotal: 67108864 kB\nMemAvailable:   33554432 kB\n"}


@pytest.mark.parametrize(
    ("files", "total", "available"),
    [
        (
            {
                "proc/self/cgroup": "0::/pod/container\n",
                "cgroup/pod/container/memory.max": "max\n",
                "cgroup/pod/container/memory.current": f"{GIB}\n",
                "cgroup/pod/memory.max": f"{16 * GIB}\n",
                "cgroup/pod/memory.current": f"{10 * GIB}\n",
                "cgroup/pod/memory.stat": f"anon 5\ninactive_file {2 * GIB}\n",
            },
            16 * GIB, 8 * GIB,
        ),
        (
            {
                "proc/self/cgroup": "0::/../../elsewhere\n",
                "cgroup/memory.max": f"{4 * GIB}\n",
                "cgroup/memory.current": f"{5 * GIB}\n",
            },
            4 * GIB, 0,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/a\n4:memory:/a\n",
                "cgroup/memory/a/memory.limit_in_bytes": f"{8 * GIB}\n",
                "cgroup/memory/a/memory.usage_in_bytes": f"{3 * GIB}\n",
                "cgroup/memory/a/memory.stat": f"total_inactive_file {GIB}\n",
                "cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "cgroup/memory/memory.usage_in_bytes": f"{40 * GIB}\n",
            },
            8 * GIB, 6 * GIB,
        ),
        (
            {
                "proc/meminfo": "MemTotal: lots\n\x00\nMemAvailable\n",
                "proc/self/cgroup": "nonsense\n0::\n",
                "cgroup/memory.max": "12 apples",
            },
            NA, NA,
        ),
    ],
    ids=["a parent's limit", "a path that the container does not show", "version 1", "garbage"],
)  # fmt: skip
def test_memory_is_what_the_cgroup_leaves(tmp_path: Path, files, total, available):
    for name, text in {**MEMORY, **files}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    host = read_host(**{name: str(tmp_path / name) for name in ("proc", "cgroup", "shm")})
    assert (host.ram_total, host.ram_available, host.shm_available) == (total, available, NA)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"proc/self/cgroup": "0::/pod/a\n", "cgroup/pod/a/cpu.max": "max 100000\n"}, 8),
        (
            {
                "proc/self/cgroup": "0::/pod/a\n",
                "cgroup/pod/a/cpu.max": "350000 100000\n",
                "cgroup/pod/cpu.max": "400000 100000\n",
            },
            3,
        ),
        ({"proc/self/cgroup": "0::/\n", "cgroup/cpu.max": "20000 100000\n"}, 1),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/a\n4:memory:/a\n",
                "cgroup/cpu/a/cpu.cfs_quota_us": "-1\n",
                "cgroup/cpu/a/cpu.cfs_period_us": "100000\n",
                "cgroup/cpu/cpu.cfs_quota_us": "600000\n",
                "cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            6,
        ),
        ({"proc/self/cgroup": "0::/\n", "cgroup/cpu.max": "apples 0\n"}, 8),
        ({"proc/self/cgroup": "0::/\n", "cgroup/cpu.max": "1600000 100000\n"}, 8),
    ],
    ids=["no quota", "a quota with a half", "less than one", "version 1", "garbage", "a large one"],
)  # fmt: skip
def test_cores_are_what_the_quota_and_the_affinity_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files, cores
):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    where = {name: str(tmp_path / name) for name in ("proc", "cgroup")}
    assert usable_cores(**where) == read_host(**where).cpus == cores


def test_kills_are_the_groups_own_else_the_machines(tmp_path: Path) -> None:
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"

    def kills() -> int | None:
        return host_kills(proc=str(proc), cgroup=str(cgroup))

    (proc / "self").mkdir(parents=True)
    (cgroup / "user" / "me").mkdir(parents=True)
    assert kills() is None
    (proc / "vmstat").write_text("nr_free_pages 3\noom_kill 7\n")
    assert kills() == 7
    (proc / "self" / "cgroup").write_text("0::/\n")
    (cgroup / "memory.events").write_text("low 0\noom 1\noom_kill 2\n")
    assert kills() == 2
    (proc / "self" / "cgroup").write_text("0::/user/me\n")
    (cgroup / "user" / "me" / "memory.events").write_text("oom_kill 1\noom_group_kill 0\n")
    assert kills() == 1
    assert host_kills() is None or host_kills() >= 0  # this machine's
