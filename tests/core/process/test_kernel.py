"""What the kernel says of processes; `tests/serving/test_leases.py` tells groups by it."""

from __future__ import annotations

from pathlib import Path

from turbofit.core.process import kernel


def test_kills_are_the_groups_own_else_the_machines(tmp_path: Path) -> None:
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"

    def kills() -> int | None:
        return kernel.host_kills(proc=str(proc), cgroup=str(cgroup))

    (proc / "self").mkdir(parents=True)
    (cgroup / "user" / "me").mkdir(parents=True)
    assert kills() is None
    (proc / "vmstat").write_text("nr_free_pages 3\noom_kill 7\n")
    assert kills() == 7
    (cgroup / "memory.events").write_text("low 0\noom 1\noom_kill 2\n")
    assert kills() == 2
    (proc / "self" / "cgroup").write_text("0::/user/me\n")
    (cgroup / "user" / "me" / "memory.events").write_text("oom_kill 1\noom_group_kill 0\n")
    assert kills() == 1
    assert kernel.host_kills() is None or kernel.host_kills() >= 0  # this machine's
