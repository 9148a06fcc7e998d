"""A machine with GPUs for tests: the real pynvml over a stand-in `libnvidia-ml.so.1`.

How to use it in a test::

    def test_serve_waits(nvml_machine):
        scenario = four_3090(nvlinks=[(0, 2), (1, 3)])
        env = nvml_machine(scenario)                    # a dict to put into a child's environment
        subprocess.run([...], env={**os.environ, **env})

        scenario.gpus[1].used += 2 * GIB                # another process grows …
        scenario.gpus[1].compute.append(Process(4711, 2 * GIB, "python3"))
        nvml_machine(scenario)                          # … and the running child sees it at once

The child needs nothing but the two variables of the dict: `LD_LIBRARY_PATH`, by which pynvml's
`CDLL("libnvidia-ml.so.1")` finds the stand-in, and `NVML_STANDIN_SCENARIO`, the file that it reads
again on every call. In the test's own process write
`with in_process(nvml_library, scenario, tmp_path):`
instead, since the loader reads `LD_LIBRARY_PATH` only once.

The scenario classes are plain and mutable; sizes are bytes. `None` means "not supported" wherever
NVML can say so. `Gpu.error` (e.g. `LOST`) answers every question about that GPU with that code.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest

from turbofit.core.units import MIB
from turbofit.rehearsal.pretend.build import build as libraries_in
from turbofit.rehearsal.pretend.libraries import ACCOUNT, PretendError

LIBRARY = "libnvidia-ml.so.1"
LOST = 15
#: (read, write, NVLink) statuses: 0 OK, 5 not supported.
P2P_ALL = (0, 0, 5)
P2P_NONE = (5, 5, 5)
P2P_NVLINK = (0, 0, 0)


@dataclass
class Process:
    """A process on a GPU; ``size`` None: its memory cannot be seen; ``name`` None: nor its name."""

    pid: int
    size: int | None
    name: str | None = None


@dataclass
class Mig:
    """One MIG instance."""

    uuid: str
    total: int
    used: int = 0
    reserved: int = 0
    sms: int = 16
    gi: int | None = 1
    ci: int | None = 0
    name: str | None = None
    compute: list[Process] = field(default_factory=list)


@dataclass
class Gpu:
    """One GPU. ``links``: for each NVLink lane the other end's bus, ``"switch"`` or None (off)."""

    name: str
    uuid: str
    total: int | None
    reserved: int = 0
    used: int = 0
    bus: int | None = None
    cc: int | None = None
    cores: int | None = None
    pcie_generation: int | None = 4
    pcie_width: int | None = 16
    links: list[int | str | None] | None = None
    compute: list[Process] = field(default_factory=list)
    graphics: list[Process] = field(default_factory=list)
    mig: bool | None = None
    migs: list[Mig] = field(default_factory=list)
    error: int | None = None
    no_handle: int | None = None


@dataclass
class Scenario:
    """A machine. ``p2p`` and ``ancestor`` are for all pairs, ``pairs`` for single ones.

    ``back``: what NVML says from the second GPU to the first, if it is not the same.
    """

    gpus: list[Gpu]
    driver: str | None = "570.124.06"
    cuda: int = 12080
    p2p: tuple[int, int, int] | None = P2P_NONE
    ancestor: int | None = 30
    pairs: dict[tuple[int, int], tuple[int, int, int]] = field(default_factory=dict)
    back: tuple[int, int, int] | None = None
    init_error: int | None = None

    def text(self) -> str:
        """The scenario as the library reads it."""
        lines: list[str] = [f"gpus {len(self.gpus)}", f"cuda {self.cuda}"]
        _put(lines, "driver", self.driver)
        _put(lines, "init_error", self.init_error)
        _put(lines, "p2p", _join(self.p2p))
        _put(lines, "ancestor", self.ancestor)
        if self.back is not None:
            lines.append(f"p2p.1.0 {_join(self.back)}")
        for (a, b), statuses in self.pairs.items():
            lines += [f"p2p.{a}.{b} {_join(statuses)}", f"p2p.{b}.{a} {_join(statuses)}"]
        for index, gpu in enumerate(self.gpus):
            _gpu_lines(lines, index, gpu)
        return "\n".join(lines) + "\n"

    def write(self, path: Path) -> None:
        """Replace the scenario file at once, so that no reader sees half of it."""
        temporary = path.with_suffix(".new")
        temporary.write_text(self.text())
        os.replace(temporary, path)


def gpu_3090(index: int = 0, **changes: object) -> Gpu:
    """An RTX 3090 with 24268 MiB for CUDA."""
    gpu = Gpu(
        name="NVIDIA GeForce RTX 3090",
        uuid=f"GPU-{index:08x}-3090-3090-3090-000000003090",
        total=24576 * MIB,
        reserved=308 * MIB,
        bus=0x10 + 0x10 * index,
        cc=86,
        cores=10496,
        links=[None] * 4,
    )
    return _changed(gpu, changes)


def gpu_h100(index: int = 0, **changes: object) -> Gpu:
    """An H100 SXM behind NVSwitch."""
    gpu = Gpu(
        name="NVIDIA H100 80GB HBM3",
        uuid=f"GPU-{index:08x}-0100-0100-0100-000000000100",
        total=81559 * MIB,
        reserved=479 * MIB,
        bus=0x10 + 0x10 * index,
        cc=90,
        cores=16896,
        pcie_generation=5,
        links=["switch"] * 18,
        mig=False,
    )
    return _changed(gpu, changes)


def four_3090(nvlinks: Sequence[tuple[int, int]] = (), count: int = 4) -> Scenario:
    """RTX 3090s without peer access, but for the pairs that an NVLink bridge joins."""
    scenario = Scenario([gpu_3090(index) for index in range(count)])
    for a, b in nvlinks:
        for one, other in ((a, b), (b, a)):
            scenario.gpus[one].links = [scenario.gpus[other].bus] * 4
        scenario.pairs[a, b] = P2P_NVLINK
    return scenario


def build(folder: Path) -> Path:
    """The stand-in, alone in a folder which is then fit for `LD_LIBRARY_PATH`.

    It is the pretend machine's own NVML (rehearsal/pretend/csrc/nvml*.c), told to play a script.
    """
    try:
        libraries = libraries_in()
    except PretendError:
        pytest.skip("no C compiler")
    for name in (ACCOUNT, LIBRARY):
        shutil.copy2(libraries / name, folder / name)
    return folder / LIBRARY


@contextlib.contextmanager
def in_process(library: Path, scenario: Scenario | None, folder: Path) -> Iterator[Path]:
    """Let this process's pynvml use the stand-in; yields the scenario file, to be rewritten."""
    import pynvml

    path = folder / "nvml-scenario"
    if scenario is None:
        path.unlink(missing_ok=True)
    else:
        scenario.write(path)
    with (
        mock.patch.object(pynvml, "nvmlLib", ctypes.CDLL(str(library))),
        mock.patch.object(pynvml, "_nvmlGetFunctionPointer_cache", {}),
        mock.patch.dict(os.environ, {"NVML_STANDIN_SCENARIO": str(path)}),
    ):
        yield path


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled stand-in, built once a session."""
    return build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def nvml_machine(nvml_library: Path, tmp_path: Path) -> Callable[[Scenario | None], dict[str, str]]:
    """``nvml_machine(scenario)``: the variables by which a child process sees that machine.

    Called again in the same test it changes the machine under running children. ``None`` is a
    machine without a driver.
    """
    path = tmp_path / "nvml-scenario"

    def install(scenario: Scenario | None) -> dict[str, str]:
        if scenario is None:
            path.unlink(missing_ok=True)
        else:
            scenario.write(path)
        inherited = os.environ.get("LD_LIBRARY_PATH")
        folders = [str(nvml_library.parent), *([inherited] if inherited else [])]
        return {"LD_LIBRARY_PATH": ":".join(folders), "NVML_STANDIN_SCENARIO": str(path)}

    return install


def _put(lines: list[str], key: str, value: object) -> None:
    if value is not None:
        lines.append(f"{key} {value}")


def _join(statuses: tuple[int, ...] | None) -> str | None:
    return None if statuses is None else " ".join(map(str, statuses))


def _gpu_lines(lines: list[str], index: int, gpu: Gpu) -> None:
    key = f"gpu.{index}"
    for attribute in (
        "name", "uuid", "total", "reserved", "used", "bus", "cc", "cores", "pcie_generation",
        "pcie_width", "error", "no_handle",
    ):  # fmt: skip
        _put(lines, f"{key}.{attribute}", getattr(gpu, attribute))
    _put(lines, f"{key}.mig", None if gpu.mig is None else int(gpu.mig))
    if gpu.links is not None:
        lines.append(f"{key}.nvlinks {len(gpu.links)}")
        for lane, end in enumerate(gpu.links):
            _put(lines, f"{key}.nvlink.{lane}", end)
    _process_lines(lines, key, "compute", gpu.compute)
    _process_lines(lines, key, "graphics", gpu.graphics)
    for slot, part in enumerate(gpu.migs):
        for attribute in ("uuid", "total", "used", "reserved", "sms", "gi", "ci"):
            _put(lines, f"{key}.mig.{slot}.{attribute}", getattr(part, attribute))
        _put(lines, f"{key}.mig.{slot}.name", part.name or f"{gpu.name} MIG 1g")
        _process_lines(lines, f"{key}.mig.{slot}", "compute", part.compute)


def _process_lines(lines: list[str], key: str, kind: str, processes: list[Process]) -> None:
    lines.append(f"{key}.{kind} {len(processes)}")
    for position, process in enumerate(processes):
        size = -1 if process.size is None else process.size
        lines.append(f"{key}.{kind}.{position} {process.pid} {size}")
        _put(lines, f"process.{process.pid}", process.name)


def _changed(gpu: Gpu, changes: dict[str, object]) -> Gpu:
    for name, value in changes.items():
        setattr(gpu, name, value)
    return gpu
