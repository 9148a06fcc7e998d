"""A command's process group where this process has other threads, as a server has."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

from tests.support.waiting import HANG
from turbofit.pretend.environment import SCENARIO
from turbofit.pretend.group import run_group

_COMMAND = """
import pathlib, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"],
                         start_new_session=True)
pathlib.Path("left").write_text(str(child.pid))
open("go").read()  # a pipe: until the test has started its own child
"""


def test_what_another_thread_started_is_left_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "go")
    command = [sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r}){_COMMAND}"]
    env, codes = {**os.environ, SCENARIO: "this one"}, list[int]()
    thread = threading.Thread(target=lambda: codes.append(run_group(command, env)))
    thread.start()
    with (tmp_path / "go").open("w"):  # the command is there now, and has left a child
        other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        thread.join(HANG)
        assert codes == [0]
        assert other.poll() is None
        assert not Path("/proc", (tmp_path / "left").read_text()).exists()
    finally:
        other.communicate(b"\n", HANG)
