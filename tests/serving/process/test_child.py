"""Who belongs to a process group, while it lives and after its end."""

from __future__ import annotations

import os
import subprocess
import sys

from turbofit.core.process.processes import start_time
from turbofit.serving.process.child import group_of, members, processor_seconds


def test_a_session_has_its_members_until_it_ends() -> None:
    words = [sys.executable, "-c", "sum(range(10**7)); print(flush=True); input()"]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        pid, began = process.pid, start_time(process.pid)
        assert group_of(pid) == pid
        assert members(pid, began) == [pid]
        assert members(pid, began + 1) == []  # the number is another leader's now
        assert processor_seconds(pid) > 0
        process.kill()
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert members(pid, began) == []
    assert group_of(pid) == 0
