"""Helpers for several processes on one pretend machine: each runs code with cudart by ctypes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.pretend.child import CARD, PRELUDE
from tests.support.waiting import HANG
from turbofit.pretend.environment import pretend_environment
from turbofit.pretend.scenario import Scenario
from turbofit.pretend.shared import SharedRecord, read_shared
from turbofit.pretend.timeline import Event, read_timeline

MORE = """
def uuid_of(device):
    b = ctypes.create_string_buffer(16)
    assert account.pretend_uuid(device, b) == 0
    return b.raw.hex()
def count():
    n = ctypes.c_int(); rt.cudaGetDeviceCount(byref(n)); return n.value
def say(value):
    print(json.dumps(value), flush=True)
def wait():
    return sys.stdin.readline()
"""


@dataclass
class Machine:
    """A folder with a scenario, the shared file and the timelines."""

    libraries: Path
    folder: Path

    def env(self, **more: str) -> dict[str, str]:
        return {**pretend_environment(self.libraries, self.folder / "scenario"), **more}

    def start(self, code: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-S", "-c", PRELUDE + MORE + textwrap.dedent(code)],
            env=self.env(**env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, code: str, **env: str) -> Any:
        process = self.start(code, **env)
        out, _ = process.communicate(timeout=HANG)
        assert process.returncode == 0
        lines = [json.loads(line) for line in out.splitlines()]
        return lines[-1] if lines else None

    @property
    def shared(self) -> SharedRecord:
        return read_shared(self.folder / "shared")

    def timeline(self, pid: int, suffix: str = "") -> list[Event]:
        return list(read_timeline(self.folder / "timelines" / f"{pid}{suffix}.timeline"))

    def timelines(self) -> set[str]:
        return set(os.listdir(self.folder / "timelines"))


def make(libraries: Path, folder: Path, scenario: Scenario | None = None) -> Machine:
    """A fresh pretend machine for several processes."""
    (folder / "timelines").mkdir()
    scenario = scenario or Scenario((CARD,), timeline_limit=1 << 20)
    text = scenario.text(f"{folder / 'timelines'}/", str(folder / "shared"))
    (folder / "scenario").write_text(text)
    return Machine(libraries, folder)


def ask(process: subprocess.Popen[str]) -> Any:
    """The next line that a child says."""
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


def tell(process: subprocess.Popen[str]) -> None:
    """Lets a child go on that waits."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
