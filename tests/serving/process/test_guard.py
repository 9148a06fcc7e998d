"""A command under the guard does not outlive the process that started it."""

from __future__ import annotations

import subprocess
import sys

from tests.support.processes import gone

PROGRAM = """
import subprocess
from turbofit.serving.process.guard import guarded
words = ["sh", "-c", "sleep 1000 & echo $!; wait"]
subprocess.Popen(guarded(words), start_new_session=True).wait()
"""


def test_the_whole_group_ends_when_the_parent_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        started_by_the_command = int(parent.stdout.readline())
        parent.kill()
    assert gone(started_by_the_command)
