"""Helpers that run calls of the pretend libraries in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.waiting import HANG
from turbofit.core.units import MIB
from turbofit.rehearsal.pretend.command import pretend_environment
from turbofit.rehearsal.pretend.scenario import PretendGpu, Scenario, write_scenario
from turbofit.rehearsal.pretend.usage import Event, SharedRecord, read_shared, timeline_events

CARD = PretendGpu("Pretend RTX 3090", total=1000 * MIB, used=100 * MIB)
PRELUDE = """
import ctypes, json, os, resource, sys, threading, time
MIB = 1024 * 1024
folder = os.environ["TURBOFIT_PRETEND_LIBRARIES"]
account = ctypes.CDLL(f"{folder}/libturbofit_pretend.so", mode=ctypes.RTLD_GLOBAL)
rt = ctypes.CDLL(f"{folder}/libcudart.so.12")
cu = ctypes.CDLL(f"{folder}/libcuda.so.1")
nccl = ctypes.CDLL(f"{folder}/libnccl.so.2")
size_t, void_p, byref, u64 = ctypes.c_size_t, ctypes.c_void_p, ctypes.byref, ctypes.c_uint64
rt.cudaGetErrorString.restype = ctypes.c_char_p
account.pretend_held.restype = size_t

def free():
    a, b = size_t(), size_t()
    assert rt.cudaMemGetInfo(byref(a), byref(b)) == 0
    return a.value // MIB

def malloc(mib):
    p = void_p()
    code = rt.cudaMalloc(byref(p), size_t(int(mib * MIB)))
    return p if code == 0 else code

def pool(threshold=None):
    p = void_p()
    props = (ctypes.c_int * 22)(1, 0, 1, 0)
    assert rt.cudaMemPoolCreate(byref(p), props) == 0
    if threshold is not None:
        rt.cudaMemPoolSetAttribute(p, 4, byref(u64(threshold)))
    return p

def take(p, mib):
    out = void_p()
    code = rt.cudaMallocFromPoolAsync(byref(out), size_t(int(mib * MIB)), p, None)
    return out if code == 0 else code

def uuid_of(device):
    b = ctypes.create_string_buffer(16)
    assert account.pretend_uuid(device, b) == 0
    return b.raw.hex()
def count():
    n = ctypes.c_int(); rt.cudaGetDeviceCount(byref(n)); return n.value
def say(value=None):
    print(json.dumps(value), flush=True)
def wait():
    return sys.stdin.readline()
done = say
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
            [sys.executable, "-S", "-c", PRELUDE + textwrap.dedent(code)],
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
        return events_of(self.folder / "timelines" / f"{pid}{suffix}.timeline")

    def timelines(self) -> set[str]:
        return set(os.listdir(self.folder / "timelines"))


def events_of(timeline: Path) -> list[Event]:
    with timeline.open("rb") as file:
        return list(timeline_events(file))


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


@dataclass
class Ran:
    """What a child printed as JSON, and its timeline."""

    value: Any
    events: list[Event]

    def tagged(self, tag: str) -> list[Event]:
        return [e for e in self.events if e.tag == tag]


Pretend = Callable[..., Ran]


def run(libraries: Path, folder: Path, code: str, scenario: Scenario | None = None) -> Ran:
    """Runs code on a pretend machine."""
    timeline = folder / "timeline"
    write_scenario(folder / "scenario", scenario or Scenario((CARD,)), str(timeline))
    return Ran(Machine(libraries, folder).run(code), events_of(timeline))
