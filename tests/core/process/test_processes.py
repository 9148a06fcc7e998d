"""What /proc says of a process, while it lives and after its end."""

from __future__ import annotations

import os
import subprocess
import sys

from turbofit.core.process.processes import every_stat, start_time, stat_of


def test_a_process_has_a_parent_and_a_start_until_it_ends() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        pid = process.pid
        assert start_time(pid) > 0
        assert int(dict(every_stat())[pid][1]) == os.getpid()
        process.kill()
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert stat_of(pid)[0] == "Z"  # it has ended, and we have not waited for it
        assert start_time(pid) == 0
    assert stat_of(pid) == []
    assert start_time(pid) == 0
