"""How far a rehearsal's child is, as its notes say."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.waiting import HANG
from turbofit.core.process.progress import Step, listened
from turbofit.pretend.environment import find_turbofit
from turbofit.rehearse.turbomind import run
from turbofit.rehearse.turbomind.notes import Notes


def test_how_far_the_child_is_told(tmp_path: Path) -> None:
    spec: Any = SimpleNamespace(cases=("first", "second"))
    heard: list[Step | None] = []
    run._tell(spec, tmp_path)  # nobody listens
    with listened(heard.append):
        run._tell(spec, tmp_path)
        notes = Notes(tmp_path / "report.json")
        notes.at("ready")
        run._tell(spec, tmp_path)
        notes.write(running="first")
        run._tell(spec, tmp_path)
        notes.data["cases"].append({"name": "first"})
        notes.write(running="second")
        run._tell(spec, tmp_path)
    starting = Step("starting the engine on pretend GPUs")
    cases = [Step("rehearsing worst cases on pretend GPUs", done, 2) for done in (0, 1)]
    assert heard == [starting, starting, *cases]


#: The parent starts a child, tells its number, and waits to be killed.
_PARENT = """
import os, signal, subprocess, sys
code = "import os, signal; from turbofit.rehearse.turbomind.child import end_with_parent; "
code += f"end_with_parent({os.getpid()}); print(os.getpid(), flush=True); signal.pause()"
subprocess.Popen([sys.executable, "-c", code])
signal.pause()
"""


def test_a_killed_parent_leaves_no_child_behind() -> None:
    env = {**os.environ}
    find_turbofit(env)
    parent = subprocess.Popen([sys.executable, "-c", _PARENT], stdout=subprocess.PIPE, env=env)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    try:
        out, _ = parent.communicate(timeout=HANG)  # ends when nobody holds the pipe any more
    except subprocess.TimeoutExpired:
        os.kill(child, signal.SIGKILL)
        raise
    assert out == b""


def test_a_child_whose_parent_is_gone_does_not_begin() -> None:
    words = [sys.executable, "-m", "turbofit.rehearse.turbomind.child", "none", "none", "none"]
    env = {**os.environ}
    find_turbofit(env)
    done = subprocess.run(
        [*words, str(2**30)], env=env, capture_output=True, timeout=HANG, check=False
    )
    assert (done.returncode, done.stderr) == (1, b"")
