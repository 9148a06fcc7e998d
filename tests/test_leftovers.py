from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import REPO, alive

LEAVES = """
import subprocess, sys

def test_that_ends_what_it_starts():
    subprocess.run([sys.executable, "-c", ""], check=True)

def test_that_leaves_one():
    code = "import time; print(flush=True); time.sleep(9999)"
    child = subprocess.Popen(
        [sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE
    )
    child.stdout.readline()
    print("left:", child.pid)
    del child
"""


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
@pytest.mark.parametrize("workers", [[], ["-n", "1"]])
def test_a_run_that_leaves_a_process_fails_by_the_test_s_name(workers, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(LEAVES)
    environ = {**os.environ, "PYTHONPATH": str(REPO), "_TURBOFIT_TEST_PATIENCE": "0.1"}
    argv = [sys.executable, "-m", "pytest", "-p", "tests.support.leftovers", "-rP", *workers]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*argv, *more, "test_it.py"], cwd=tmp_path, env=environ, capture_output=True, text=True,
            check=False,
        )  # fmt: skip

    clean = run("-k", "ends_what")
    assert (clean.returncode, "processes that this run" in clean.stdout) == (0, False)
    red = run()
    assert (red.returncode, "2 passed" in red.stdout) == (1, True)
    (line,) = [line for line in red.stdout.splitlines() if "time.sleep(9999)" in line]
    assert line.startswith("test_it.py::test_that_leaves_one (call): ")
    assert not alive(int(red.stdout.partition("left: ")[2].split()[0]))
