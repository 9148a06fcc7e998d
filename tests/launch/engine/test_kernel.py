from __future__ import annotations

import os
from pathlib import Path

from turbofit.launch.engine import kernel


def test_kills_are_the_groups_own_else_the_machines(tmp_path: Path) -> None:
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (cgroup / "user" / "me").mkdir(parents=True)
    assert kernel.host_kills(proc=str(proc), cgroup=str(cgroup)) is None
    (proc / "vmstat").write_text("nr_free_pages 3\noom_kill 7\n")
    assert kernel.host_kills(proc=str(proc), cgroup=str(cgroup)) == 7
    (cgroup / "memory.events").write_text("low 0\noom 1\noom_kill 2\n")
    assert kernel.host_kills(proc=str(proc), cgroup=str(cgroup)) == 2
    (proc / "self" / "cgroup").write_text("0::/user/me\n")
    (cgroup / "user" / "me" / "memory.events").write_text("oom_kill 1\noom_group_kill 0\n")
    assert kernel.host_kills(proc=str(proc), cgroup=str(cgroup)) == 1


def test_the_drivers_errors_in_words(tmp_path: Path) -> None:
    log = tmp_path / "kmsg"
    log.write_text(
        "6,1,1000000,-;NVRM: Xid (PCI:0000:01:00): 31, pid=1, too early\n"
        "6,2,5000000,-;something else\n"
        "4,3,6000000,-;NVRM: Xid (PCI:0000:01:00): 79, pid='<unknown>', GPU has fallen off\n"
        "4,4,6500000,-;NVRM: Xid (PCI:0000:02:00): 999, what\n"
        "4,4,6600000,-;NVRM: Xid (PCI:0000:02:00): 999, what\n"
    )
    assert kernel.driver_errors(5.0, str(log)) == (
        "Xid 79 on 0000:01:00: the card has fallen off the bus: power, heat or seat; the machine "
        "must be rebooted",
        "Xid 999 on 0000:02:00",
    )
    assert kernel.driver_errors(0.0, str(tmp_path / "none")) == ()


def test_this_machine_answers_or_says_none() -> None:
    assert kernel.host_kills() is None or kernel.host_kills() >= 0
    assert kernel.uptime() > 0
    assert isinstance(kernel.driver_errors(kernel.uptime()), tuple)
    assert os.path.exists("/proc")
