"""What /proc says of a process, its group and its children, while it lives and after its end."""

from __future__ import annotations

import os
import subprocess
import sys

from turbofit.core.process.stat import (
    every_stat,
    group_of,
    members,
    processor_seconds,
    start_time,
    stat_of,
)


def test_a_session_has_its_members_until_it_ends() -> None:
    words = [sys.executable, "-c", "sum(range(10**7)); print(flush=True); input()"]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        pid, began = process.pid, start_time(process.pid)
        assert began > 0
        assert group_of(pid) == pid
        assert members(pid, began) == [pid]
        assert members(pid, began + 1) == []  # the number is another leader's now
        assert processor_seconds(pid) > 0
        assert int(dict(every_stat())[pid][1]) == os.getpid()
        process.kill()
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert stat_of(pid)[0] == "Z"  # it has ended, and we have not waited for it
        assert start_time(pid) == 0
        assert members(pid, began) == []
    assert stat_of(pid) == []
    assert group_of(pid) == start_time(pid) == 0
