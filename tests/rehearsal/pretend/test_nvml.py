"""The real pynvml on a pretend machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.rehearsal.pretend.child import Machine, ask, make, tell
from tests.support.waiting import HANG
from turbofit.core.units import MIB
from turbofit.rehearsal.pretend.scenario import PretendGpu, Scenario

pytest.importorskip("pynvml")

CARDS = (
    PretendGpu("NVIDIA L4", total=1000 * MIB, used=100 * MIB, reserved=24 * MIB, sm=(8, 9)),
    PretendGpu("NVIDIA L4", total=1000 * MIB, sm=(8, 9)),
    PretendGpu("NVIDIA L4", total=1000 * MIB, sm=(8, 9)),
)


def nvml(machine: Machine, code: str, **env: str) -> Any:
    """Runs code with pynvml as ``n`` and the handles as ``h``; gives what it printed as JSON."""
    before = """
import json
import pynvml as n
n.nvmlInit()
MIB = 1 << 20
h = [n.nvmlDeviceGetHandleByIndex(i) for i in range(n.nvmlDeviceGetCount())]
def no(call, *args):
    try: call(*args)
    except n.NVMLError as e: return e.value
"""
    done = subprocess.run(
        [sys.executable, "-c", before + code],
        env=machine.env(**env),
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def machine(libraries: Path, tmp_path: Path) -> Machine:
    peers = frozenset({(0, 1), (1, 0)})
    return make(
        libraries, tmp_path, Scenario(CARDS, peers, context=50 * MIB, timeline_limit=1 << 20)
    )


def test_processes_and_memory_are_the_accounts(machine: Machine) -> None:
    one = machine.start("malloc(200); say(1); wait()")
    two = machine.start(
        "rt.cudaSetDevice(1); malloc(300); say(uuid_of(1)); wait()", CUDA_VISIBLE_DEVICES="2,0"
    )
    ask(one)
    uuid = ask(two)
    code = """
m2 = [n.nvmlDeviceGetMemoryInfo(x, n.nvmlMemory_v2) for x in h]
m1 = n.nvmlDeviceGetMemoryInfo(h[0])
pairs = lambda found: [(p.pid, p.usedGpuMemory // MIB) for p in found]
rows = [pairs(n.nvmlDeviceGetComputeRunningProcesses(x)) for x in h]
v2 = pairs(n.nvmlDeviceGetComputeRunningProcesses_v2(h[0]))
print(json.dumps([[(m.total // MIB, m.reserved // MIB, m.used // MIB, m.free // MIB) for m in m2],
    m1.used // MIB, rows, v2, n.nvmlDeviceGetUUID(h[0]),
    n.nvmlSystemGetProcessName(rows[0][0][0])]))
"""
    info, used, rows, v2, text, name = nvml(machine, code, CUDA_VISIBLE_DEVICES="")
    assert info == [[1024, 24, 700, 300], [1000, 0, 0, 1000], [1000, 0, 0, 1000]]
    assert used == 724
    assert sorted(rows[0]) == sorted([[one.pid, 250], [two.pid, 350]])
    assert rows[1:] == [[], []]
    assert sorted(v2) == sorted(rows[0])
    assert text.replace("-", "") == "GPU" + uuid  # CUDA and NVML agree on who is who
    assert name == sys.executable
    one.kill()
    one.wait()
    code = "print(json.dumps([p.pid for p in n.nvmlDeviceGetComputeRunningProcesses(h[0])]))"
    assert nvml(machine, code) == [two.pid]
    tell(two)
    two.communicate(timeout=HANG)


def test_what_a_device_is(machine: Machine) -> None:
    code = """
uuid = n.nvmlDeviceGetUUID(h[2])
at = lambda x: n.nvmlDeviceGetIndex(x)
print(json.dumps([len(h), n.nvmlDeviceGetName(h[0]), n.nvmlDeviceGetCudaComputeCapability(h[0]),
    at(n.nvmlDeviceGetHandleByUUID(uuid)), n.nvmlDeviceGetPciInfo(h[1]).busId,
    [at(n.nvmlDeviceGetHandleByPciBusId(f"{domain}02:00.0")) for domain in ("00000000:", "0:", "")],
    [n.nvmlDeviceGetP2PStatus(h[0], x, n.NVML_P2P_CAPS_INDEX_WRITE) for x in h[1:]],
    n.nvmlSystemGetCudaDriverVersion(), no(n.nvmlDeviceGetUtilizationRates, h[0]),
    no(n.nvmlDeviceGetHandleByUUID, "GPU-0"), no(n.nvmlDeviceGetHandleByIndex, 3),
    no(n.nvmlDeviceGetPowerUsage, h[0])]))
"""
    assert nvml(machine, code) == [
        3, "NVIDIA L4", [8, 9], 2, "00000000:02:00.0", [1, 1, 1], [0, 5], 13000, 3, 6, 2, 3,
    ]  # fmt: skip
    assert machine.shared.processes == ()  # asking leaves no trace
    assert machine.timelines() == set()


def test_without_a_machine_there_is_no_driver(libraries: Path) -> None:
    code = "import pynvml\ntry: pynvml.nvmlInit()\nexcept pynvml.NVMLError as e: print(e.value)"
    env = {"LD_LIBRARY_PATH": str(libraries), "PATH": "/usr/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("9\n", "")
