"""The environment of a pretend machine, and what its processes used."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from turbofit.core.errors import MachineError
from turbofit.core.machine import Gpu, Link, Machine
from turbofit.core.struct import NA
from turbofit.pretend.build import ACCOUNT
from turbofit.pretend.command import cuda_site, pretend_environment
from turbofit.pretend.elf import dynamic_symbols
from turbofit.pretend.scenario import MIB, pretend_twin
from turbofit.pretend.usage import Usage, read_timeline, read_usage


def test_only_the_child_is_changed() -> None:
    base = {"PATH": "/bin", "LD_LIBRARY_PATH": "/opt", "CUDA_VISIBLE_DEVICES": "1", "TM_X": "1"}
    env = pretend_environment(Path("/lib"), Path("/scenario"), base)
    assert env["LD_LIBRARY_PATH"] == "/lib:/opt"
    assert env["TURBOFIT_PRETEND_SCENARIO"] == "/scenario"
    assert env["PATH"] == "/bin"
    assert not {"CUDA_VISIBLE_DEVICES", "TM_X", "LD_PRELOAD"} & env.keys()
    assert "CUDA_VISIBLE_DEVICES" in base


def test_a_users_own_command_keeps_what_changes_memory() -> None:
    base = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "CUDA_VISIBLE_DEVICES": "1"}
    env = pretend_environment(Path("/lib"), Path("/s"), base, keep=True)
    assert env["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert "CUDA_VISIBLE_DEVICES" not in env


def test_beside_a_cuda_build_of_torch_they_come_first(libraries: Path, tmp_path: Path) -> None:
    base = {"LD_PRELOAD": "/x.so", "PYTHONPATH": "/mine"}
    env = pretend_environment(libraries, Path("/s"), base, site=tmp_path)
    names = [Path(p).name for p in env["LD_PRELOAD"].split()]
    assert names[0] == "libturbofit_pretend.so"
    assert {"libcuda.so.1", "libcudart.so.12", "libnccl.so.2"} < set(names)
    assert names[-1] == "x.so"
    first, second = env["PYTHONPATH"].split(":")
    assert (Path(first) / "sitecustomize.py").exists()
    assert second == "/mine"


def test_cpu_torch_is_no_site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = tmp_path / "torch" / "lib"
    library.mkdir(parents=True)
    (tmp_path / "torch" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert cuda_site() is None
    (library / "libtorch_cuda.so").touch()
    assert cuda_site() == tmp_path


def _gpu(index: int, **values: object) -> Gpu:
    known = {
        "index": index,
        "uuid": f"GPU-{index}",
        "name": "NVIDIA A10",
        "total": 23028 * MIB,
        "reserved": 300 * MIB,
        "used": 100 * MIB,
        "free": 22628 * MIB,
        "compute_capability": (8, 6),
        "sm_count": 72,
        "l2": 6 * MIB,
    }
    return Gpu(**(known | values))  # type: ignore[arg-type]


def test_the_twin_of_a_machine() -> None:
    machine = Machine(
        name="m",
        source="preset",
        gpus=tuple(_gpu(i) for i in range(4)),
        links=(Link(a=1, b=3, p2p_read=True, p2p_write=True), Link(a=0, b=1, p2p_read=True)),
    )
    scenario = pretend_twin(machine, [3, 1, 0])
    assert scenario.gpus[0].total == 22728 * MIB
    assert scenario.gpus[0].used == 100 * MIB
    assert scenario.peers == frozenset({(0, 1), (1, 0)})


def test_what_is_not_known_is_an_error() -> None:
    machine = Machine(name="m", source="nvml", gpus=(_gpu(0, l2=NA),))
    with pytest.raises(MachineError, match="l2 is not known"):
        pretend_twin(machine, [0])
    with pytest.raises(MachineError, match="no GPU 5"):
        pretend_twin(machine, [5])


def usage(tmp_path: Path, *lines: str) -> Usage:
    path = tmp_path / "1.timeline"
    path.write_text("\n".join(lines) + "\n")
    return read_usage(read_timeline(path))


def test_peaks_phases_and_sites(tmp_path: Path) -> None:
    seen = usage(
        tmp_path,
        "I 7 3 1,0",
        "N python  train.py --x",
        "K 1 100 900 @",
        "P load weights",
        "A 1 0 -1 512 512 9c @",
        "A 1 3 -1 4096 4096 aa @",
        "S before.py:1",
        "P step",
        "A 1 1 0 1024 1536 9d @",
        "F 9c 1024",
        "S step.py:2 forward",
        "A 1 0 -1 200 1224 9f @",
        "S later.py:3",
        "R 1 0 0 200",
        "P end",
        "O 1 0 -1 9000 500 8500 @",
        "S big.py:9",
    )
    assert (seen.pid, seen.parent, seen.command) == (7, 3, "python  train.py --x")
    peak = seen.peaks[1]
    assert (peak.size, peak.phase, peak.site) == (1536, "step", "step.py:2 forward")
    assert seen.phases == {1: {"load weights": 512, "step": 1536, "end": 200}}
    assert seen.ends == {1: {"load weights": 512, "step": 200, "end": 200}}
    assert seen.contexts == {1: 100}
    (refusal,) = seen.refused
    assert (refusal.requested, refusal.left, refusal.short) == (9000, 500, 8000)
    assert (refusal.phase, refusal.site, refusal.kind) == ("end", "big.py:9", "cudaMalloc")


def test_a_native_trace_names_the_call(libraries: Path, tmp_path: Path) -> None:
    library = libraries / ACCOUNT
    at = next(s.offset for s in dynamic_symbols(library) if s.name == "pretend_pool_malloc")
    seen = usage(
        tmp_path, "I 7 3 0", f"L {library}", f"A 0 0 -1 512 512 9c @{at + 1:x}", "L nowhere.so",
        f"O 0 0 -1 9 5 9 @{at + 1:x}",
    )  # fmt: skip
    assert seen.peaks[0].site == "pretend_pool_malloc"
    assert seen.refused[0].site is None


def test_an_empty_timeline(tmp_path: Path) -> None:
    seen = usage(tmp_path)
    assert (seen.pid, seen.peaks, seen.refused) == (0, {}, [])
